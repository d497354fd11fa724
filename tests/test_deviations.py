"""Where ours differs from the reference, one test for each line of the README's list, in its order."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_directory, load_golden, rel_l2
from safetensors.torch import load_file, save_file
from streams import LAYERS, LateCopies, deep_model
from torch.utils._python_dispatch import TorchDispatchMode

import skyreels_fast as sf
from skyreels_fast import media
from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.conditions import History, load_pictures
from skyreels_fast.config import TEACACHE_COEFFICIENTS, TransformerConfig
from skyreels_fast.dit.model import DiT
from skyreels_fast.dit.stream import Stream
from skyreels_fast.parallel import Degrees, choose_layout
from skyreels_fast.placement import Placement
from skyreels_fast.sampling.denoise import denoise

FIRST, LAST = GOLDEN / "first.png", GOLDEN / "last.png"
Pipelines = dict[str, sf.Pipeline]


def request(**values: object) -> sf.Request:
    text = load_golden("text")
    base = {"context": text["cond"], "negative_context": text["uncond"], "height": 32, "width": 48, "seed": 3}
    base |= {"num_frames": 17, "base_num_frames": 17, "inference_steps": 2, "guidance_scale": 1.0}
    return sf.Request(**{**base, **values})


def of_video_models(**values: object) -> sf.Request:
    """The same for T2V, which knows no windows."""
    return request(**{"base_num_frames": None, **values})


def test_1_an_image_is_held_whatever_the_block(pipelines: Pipelines) -> None:
    pipe = pipelines["df"]
    asked = request(image=FIRST, num_frames=21, base_num_frames=21, causal_block_size=2, ar_step=1)
    plan = pipe.plan(asked)
    latents = pipe(plan).latents[0]
    with torch.no_grad():
        held = pipe._load()[1].encode(load_pictures(plan.settings)["image"])
    assert torch.equal(latents[:, :, :1], held)


def test_2_a_window_that_does_not_divide_into_blocks_is_refused_with_the_nearest_that_does(
    pipelines: Pipelines,
) -> None:
    with pytest.raises(ValueError, match=r"num_frames=17.*nearest valid num_frames: 13 or 21"):
        pipelines["df"].plan(request(base_num_frames=21, causal_block_size=2))
    for frames in (13, 21):
        assert pipelines["df"].plan(request(num_frames=frames, base_num_frames=21, causal_block_size=2))


def test_3_a_long_video_with_an_end_image_has_the_frames_asked_for(pipelines: Pipelines) -> None:
    result = pipelines["df"](request(num_frames=29, overlap_history=5, image=FIRST, end_image=LAST))
    assert len(result.frames) == 29
    assert [latents.shape[2] for latents in result.latents] == [5, 5]


@pytest.mark.parametrize("overlap", [5, 9, 13])
def test_4_the_whole_overlap_is_held_and_nothing_is_lost(pipelines: Pipelines, overlap: int) -> None:
    """9 and 13 frames are 3 and 4 latent frames, in blocks of 2."""
    settings = {"base_num_frames": 21, "causal_block_size": 2, "ar_step": 1, "overlap_history": overlap}
    held = (overlap - 1) // 4 + 1
    num_frames = 21 + 4 * (6 - held)
    result = pipelines["df"](request(num_frames=num_frames, **settings))
    assert len(result.frames) == num_frames
    vae = pipelines["df"]._load()[1]
    with torch.inference_mode():
        seen = vae.encode(vae.decode(result.latents[0])[:, :, -overlap:])
    assert rel_l2(result.latents[1][:, :, :held], seen) < 1e-6


def test_4_an_overlap_that_is_not_4k_plus_1_is_refused(pipelines: Pipelines) -> None:
    with pytest.raises(ValueError, match=r"overlap_history=10.*9 or 13"):
        pipelines["df"].plan(request(num_frames=41, overlap_history=10))


def test_5_noise_on_given_frames_comes_from_the_seed(pipelines: Pipelines) -> None:
    runs = [pipelines["df"](request(image=FIRST, addnoise_condition=30, seed=seed)).frames for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_6_a_portrait_video_is_extended_as_portrait_at_its_own_rate(pipelines: Pipelines, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)[:, None, None]
    frames = torch.from_numpy(np.broadcast_to(ramp, (9, 128, 64, 3)).copy())
    with media.VideoWriter(tmp_path / "portrait.mp4", 15, 128, 64) as writer:
        writer.write(frames)
    values = {"height": None, "width": None, "video": tmp_path / "portrait.mp4", "overlap_history": 5}
    settings = pipelines["df"].plan(request(**values)).settings
    assert (settings.height, settings.width, settings.fps) == (960, 544, 15)
    assert pipelines["df"].plan(request(**values, fps=24)).settings.fps == 24
    # Twice as tall as the target is wide: cropped around the middle, so the ends of the ramp are gone.
    fitted = torch.cat(list(media.VideoSource(values["video"]).fitted(64, 64)))
    assert fitted.shape == (9, 64, 64, 3)
    assert 50 < fitted.float().amin() < 80 and 175 < fitted.float().amax() < 205


def test_7_teacache_state_is_per_branch_and_window(pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window computes the same calls, with guidance or without, in pairs where there are two branches."""
    dit = type(pipelines["df"]._load()[0])
    run, computed = dit.run_branches, []

    def counted(
        self: torch.nn.Module, stream: Stream, e0: torch.Tensor, contexts: list, *args: object, **options: object
    ):
        computed.extend(contexts)
        return run(self, stream, e0, contexts, *args, **options)

    monkeypatch.setattr(dit, "run_branches", counted)
    settings = {"inference_steps": 8, "teacache": True, "teacache_coefficients": (1.0, 0.0), "teacache_thresh": 0.6}
    settings |= {"num_frames": 25, "overlap_history": 9}
    plan = pipelines["df"].plan(request(**settings))
    pipelines["df"](plan)
    alone = len(computed)
    assert alone % len(plan.windows) == 0 and alone < sum(plan.calls)
    computed.clear()
    pipelines["df"](request(**settings, guidance_scale=3.0))
    assert len(computed) == 2 * alone


def test_7_teacache_without_published_coefficients_is_an_error_and_paths_do_not_matter(pipelines: Pipelines) -> None:
    with pytest.raises(ValueError, match="teacache_coefficients"):
        pipelines["t2v"].plan(of_video_models(teacache=True))
    big = TransformerConfig(model_type="t2v", in_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    assert big.teacache_coefficients(False, 544, 960) == TEACACHE_COEFFICIENTS["t2v", False, "14B"]
    published = json.loads((GOLDEN / "teacache_coefficients.json").read_text())
    for name, values in published.items():
        kind, retention, size = name.split("/")
        key = (kind.partition("_")[0], retention == "ret", size)
        assert TEACACHE_COEFFICIENTS[key] == tuple(values)


@pytest.mark.parametrize("prompt", ["镜" * 300, "a/b\\c\0d\n", "../../etc/passwd", "." * 9, "x" * 5000])
def test_8_any_prompt_makes_a_file_name(prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = media.output_path("out", prompt, 2**63 - 1, datetime.datetime(2030, 12, 31, 23, 59, 59))
    media.check_writable(path)
    path.write_bytes(b"")
    path.with_suffix(".json").write_bytes(b"")
    assert path.resolve().parent == tmp_path / "result" / "out"


def test_9_resolution_has_a_default_and_wrong_paths_are_errors(pipelines: Pipelines, tmp_path: Path) -> None:
    settings = pipelines["t2v"].plan(of_video_models(height=None, width=None)).settings
    assert (settings.height, settings.width) == (544, 960)
    with pytest.raises(ValueError, match="no such file"):
        request(video=tmp_path / "typo.mp4", overlap_history=5)
    with pytest.raises(ValueError, match="end_image.*needs image"):
        request(end_image=LAST)


def test_10_loading_is_strict_and_lazy(tmp_path: Path) -> None:
    directory = golden_directory("t2v", tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["blocks.0.ffn.9.weight"] = weights.pop("blocks.0.ffn.2.weight")
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing blocks\.0\.ffn\.2\.weight; unknown blocks\.0\.ffn\.9\.weight"):
        sf.Pipeline.from_pretrained(directory, device="cpu")


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@torch.no_grad()
def test_11_neither_modulation_per_token_nor_a_mask_is_ever_made(pipelines: Pipelines) -> None:
    dit = pipelines["df"]._load()[0]
    context = dit.encode_context(load_golden("text")["cond"][None])
    latents = torch.randn(1, 16, 6, 32, 32)
    tokens = 6 * 16 * 16
    timestep = torch.arange(6)[None] * 100
    with _Largest() as largest:
        dit(latents, timestep, context, fps=24, causal_block_size=2)
    widest = 3 * dit.config.dim  # of what a token has: its q, k and v, or its row of the FFN
    assert largest.elements == tokens * widest < min(tokens * tokens, 6 * tokens * dit.config.dim)


def test_12_several_gpus_split_any_frame_and_only_heads_that_divide() -> None:
    """That causal attention is causal there too: tests/test_parallel.py and test_parallel_pipelines.py."""
    for processes, expected in ((8, (4, 1, 2)), (3, (3, 1, 1)), (7, (1, 7, 1))):
        asked = {"heads": 12, "guided": True, "tokens_per_frame": 34 * 60}
        assert choose_layout(Degrees(), processes, **asked) == expected
    with pytest.raises(ValueError, match="ulysses x ring that do: 4 x 2, "):
        choose_layout(Degrees(ulysses=8), 8, **asked)


def test_13_a_long_video_is_never_held_whole(pipelines: Pipelines) -> None:
    """Frames leave a latent frame at a time, and of what left only the overlap stays."""
    result = pipelines["df"](request(num_frames=25, overlap_history=5), stream=True)
    assert [len(chunk) for chunk in result.frames] == [1, 4, 4, 4, 4, 4, 4]
    history = History(limit=5)
    for chunk in torch.arange(30.0).view(1, 1, 30, 1, 1).expand(1, 3, 30, 8, 8).split([1, 9, 12, 8], dim=2):
        history.add(chunk)
        assert history.frames <= 5
    kept = torch.cat(list(history.chunks()), dim=2)
    assert kept[0, 0, :, 0, 0].tolist() == [25, 26, 27, 28, 29]


def test_13_offloading_keeps_two_blocks_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYREELS_FAST_PINNED_GIB", "1")
    checkpoint, copies = Checkpoint.open(deep_model(tmp_path, "df")), LateCopies()
    with torch.device("meta"):
        dit = DiT(checkpoint.config)
    placement = Placement("cpu", offload=True, copies=copies)
    checkpoint.load_transformer(dit, placement.home, torch.float32)
    with placement.use(dit):
        assert len(list(placement.blocks(dit))) == LAYERS
    slots = {target for target, *_ in copies.named("queue")}
    assert len(slots) == 2


def test_14_the_references_heavy_dependencies_are_not_needed() -> None:
    code = """
import sys
for name in ("moviepy", "decord", "flash_attn", "torchvision", "easydict", "diffusers", "xfuser", "cv2"):
    sys.modules[name] = None
import skyreels_fast.cli, skyreels_fast.pipeline, skyreels_fast.enhance
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_15_pixels_are_rounded() -> None:
    values = torch.tensor([-1.0, 1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 254.6 / 127.5 - 1, 1.2])
    frames = media.to_uint8(values.view(1, 1, 1, 6).expand(3, 1, 1, 6))
    assert frames[0, 0, :, 0].tolist() == [0, 255, 1, 0, 255, 255]


@pytest.mark.parametrize("mode", ["sync", "async", "t2v"])
def test_16_guidance_1_skips_the_unconditional_pass(
    mode: str, pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    run_branches = DiT.run_branches

    def counted(self: DiT, stream: Stream, e0: torch.Tensor, contexts: list, *args: object, **options: object) -> list:
        passes.append(len(contexts))
        return run_branches(self, stream, e0, contexts, *args, **options)

    monkeypatch.setattr(DiT, "run_branches", counted)
    make, model = (of_video_models, "t2v") if mode == "t2v" else (request, "df")
    staggered = {"ar_step": 1} if mode == "async" else {}
    for scale, branches in ((1.0, {1}), (6.0, {2})):
        passes.clear()
        pipelines[model](make(guidance_scale=scale, **staggered))
        assert set(passes) == branches


def test_17_latents_of_diffusion_forcing_are_float32_between_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model in bfloat16; the noise they begin as is drawn in bfloat16."""
    pipe = sf.Pipeline.from_pretrained(golden_directory("df", tmp_path), device="cpu", dtype=torch.bfloat16)
    begun = []

    def denoise_from(dit: DiT, initial: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        begun.append(initial.clone())
        return denoise(dit, initial, *args, **options)

    monkeypatch.setattr("skyreels_fast.pipeline.denoise", denoise_from)
    (latents,) = pipe(request()).latents
    (initial,) = begun
    assert initial.dtype == latents.dtype == torch.float32
    assert torch.equal(initial, initial.bfloat16().float())
    assert not torch.equal(latents, latents.bfloat16().float())
