"""What denoising needs of GPU memory: the arithmetic, and what is said and refused because of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import golden_directory, load_golden

import skyreels_fast as sf
from benchmarks.models import config
from skyreels_fast.footprint import GIB, OVERHEAD_BYTES, Footprint, activation_bytes, check_vram
from skyreels_fast.machine import Machine
from skyreels_fast.media import to_uint8
from skyreels_fast.pipeline import DiT
from skyreels_fast.vae import tiles

TOKENS = 25 * 34 * 60


def footprint(model: str, mode: str = "sync", tokens: int = TOKENS, branches: int = 2) -> Footprint:
    with torch.device("meta"):
        dit = DiT(config(model, mode))
    return Footprint.of(dit, torch.bfloat16, tokens, branches)


def test_weights_are_counted_whole() -> None:
    for model, billions in (("14B", 14.29), ("1.3B", 1.44)):
        needs = footprint(model)
        assert (sum(needs.blocks) + needs.rest) / 2e9 == pytest.approx(billions, abs=0.01)
        assert needs.total == sum(needs.blocks) + needs.rest + needs.activations + OVERHEAD_BYTES


def test_activations_hold_what_a_block_holds_at_a_time() -> None:
    """Tensors [L, D] by hand: the residual, its norm, q, k, v, the output, and two that the other branch holds."""
    cfg = config("14B", "sync")
    block = TOKENS * 5120 * 8 * 2
    keys_values = 2 * 40 * 2 * 512 * 5120 * 2
    rest = activation_bytes(cfg, torch.bfloat16, TOKENS, 2) - block - keys_values
    assert 0 < rest < 0.08 * block  # latents and velocities
    wide = config("1.3B", "sync")  # ffn_dim 8960 of dim 1536: here the hidden layer is what takes most
    tokens = 16_000
    ffn = tokens * (1536 * (4 + 2 * 2) + 8960 * 2)
    assert ffn < activation_bytes(wide, torch.bfloat16, tokens, 1) < 1.5 * ffn


def test_what_takes_more() -> None:
    cfg = config("14B", "sync")
    one = activation_bytes(cfg, torch.bfloat16, TOKENS, 1)
    assert one < activation_bytes(cfg, torch.bfloat16, TOKENS, 2) < activation_bytes(cfg, torch.float32, TOKENS, 2)
    assert activation_bytes(cfg, torch.bfloat16, TOKENS, 1, teacache=True) - one == 2 * TOKENS * 5120 * 2
    assert activation_bytes(config("14B", "i2v"), torch.bfloat16, TOKENS, 1) > one
    assert activation_bytes(cfg, torch.bfloat16, 2 * TOKENS, 1) > 1.8 * one


def test_offloading_takes_two_blocks() -> None:
    needs = footprint("14B")
    assert needs.total - needs.least == 38 * needs.blocks[0]
    assert needs.needed(offload=True, vram=None) == needs.least
    assert needs.needed(offload=False, vram=None) == needs.total
    assert needs.needed(offload=False, vram=20) == 20 * GIB
    assert needs.needed(offload=False, vram=100) == needs.total


def test_advice_names_the_flags_that_help() -> None:
    needs, card = footprint("14B"), {"total": 24 * GIB, "free": 23 * GIB, "frames_flag": "--base_num_frames"}
    said = needs.advice(offload=False, vram=None, **card)
    assert said.startswith("denoising needs about 32.5 GiB of GPU memory, the GPU has 24.0 GiB (23.0 free): try --vram")
    assert "--vram 23 (as many" in said
    assert "--offload (about 7.7 GiB)" in said and said.endswith("or fewer --base_num_frames")
    assert "--offload" not in needs.advice(offload=True, vram=None, **card)
    assert "a smaller --vram (7.7 GiB or more)" in needs.advice(offload=False, vram=22, **card)
    small = needs.advice(offload=False, vram=None, total=7 * GIB, free=7 * GIB, frames_flag="--num_frames")
    assert "--vram" not in small and "--offload" in small


@pytest.mark.parametrize("vram", [0, -3.5, float("nan"), float("inf")])
def test_budgets_that_are_none_are_refused(vram: float) -> None:
    with pytest.raises(ValueError, match=r"^--vram .*must be a number of GiB above 0$"):
        check_vram(vram, torch.device("cuda"), False)


def test_budgets_that_do_not_fit_the_rest_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^--vram 8: excludes --offload"):
        check_vram(8, torch.device("cuda"), True)
    with pytest.raises(ValueError, match=r"^--vram 8: device cpu has no GPU memory"):
        sf.Pipeline.from_pretrained("tiny", device="cpu", vram=8)
    with pytest.raises(ValueError, match=r"^--vram 7\.5: this video needs at least 7\.7 GiB of GPU memory; give"):
        footprint("14B").check(7.5)
    footprint("14B").check(7.7)


def test_a_plan_tells_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sf.Pipeline.from_pretrained(golden_directory("df", tmp_path), device="cpu", dtype=torch.float32, mode="df")
    text = load_golden("text")
    request = {"context": text["cond"], "negative_context": text["uncond"], "height": 32, "width": 48}
    plan = pipe.plan(sf.Request(num_frames=17, base_num_frames=17, **request))
    assert plan.tokens == 5 * 2 * 3
    long = pipe.plan(sf.Request(num_frames=33, base_num_frames=17, overlap_history=5, **request))
    assert long.tokens == 5 * 2 * 3
    sliding = pipe.plan(sf.Request(num_frames=33, base_num_frames=17, ar_step=6, **request))
    assert sliding.tokens == 5 * 2 * 3
    needs = pipe.machine.footprint(plan)
    assert needs.activations == activation_bytes(pipe.checkpoint.config, torch.float32, plan.tokens, 2)
    assert pipe.machine.memory_note(plan) is None
    pipe.machine._vram = 0.5
    with pytest.raises(ValueError, match=r"^--vram 0\.5: this video needs at least"):
        pipe.plan(sf.Request(num_frames=17, **request))


def test_a_small_budget_decodes_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On into a second window too, whose beginning is encoded from what the tiles gave."""
    pipe = sf.Pipeline.from_pretrained(golden_directory("df", tmp_path), device="cpu", dtype=torch.float32, mode="df")
    text = load_golden("text")
    values = {"context": text["cond"], "negative_context": text["uncond"], "height": 192, "width": 128, "seed": 3}
    values |= {"num_frames": 13, "base_num_frames": 9, "overlap_history": 5, "inference_steps": 1}
    whole = pipe(sf.Request(**values))
    assert pipe.machine.decode_bytes(pipe._dit, pipe._vae) is None
    budget = tiles.decode_bytes(pipe._vae, (1, 16, 3, 16, 16))
    monkeypatch.setattr(Machine, "decode_bytes", lambda *_: budget)
    tiled = pipe(sf.Request(**values))
    assert torch.equal(tiled.latents[0], whole.latents[0]) and not torch.equal(tiled.frames, whole.frames)
    assert tiled.frames.shape == whole.frames.shape
    pieces = pipe._vae.decode_stream(tiled.latents[0], budget)
    assert torch.equal(tiled.frames[:9], torch.cat([to_uint8(piece[0]) for piece in pieces]))
