"""Blocks that pass through two slots: the order of copies, the same result as when all stay, what is where when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_golden
from safetensors.torch import load_file, save_file
from streams import LAYERS, LateCopies, deep_model
from torch import nn

import skyreels_fast as sf
from skyreels_fast import host_memory, streaming
from skyreels_fast.checkpoint import Checkpoint, CheckpointError, fill
from skyreels_fast.encoders.image import ImageEncoder
from skyreels_fast.encoders.text import TextEncoder
from skyreels_fast.pipeline import DiT
from skyreels_fast.placement import Placement
from skyreels_fast.streaming import WeightStream, keepable, least_bytes, spread

SIZE = {"height": 32, "width": 48, "num_frames": 9, "inference_steps": 2, "seed": 1}
REQUESTS = {
    "text": ("df", {}),
    "one branch": ("df", {"guidance_scale": 1.0}),
    "windows": ("df", {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "ar_step": 1}),
    "teacache": (
        "t2v",
        {"inference_steps": 4, "teacache": True, "teacache_thresh": 9.0, "teacache_coefficients": (1, 0)},
    ),
    "image": ("i2v", {"image": GOLDEN / "first.png"}),
}


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not depend on how much memory the machine has left."""
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {mode: deep_model(tmp_path_factory.mktemp(mode), mode) for mode in ("df", "t2v", "i2v")}


class Layers(nn.Module):
    """A module whose blocks multiply: what comes out tells which weights were there."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, blocks=None) -> torch.Tensor:
        for block in self.blocks if blocks is None else blocks:
            x = block(x).tanh()
        return self.head(x)


def toy(count: int, placement: Placement, *, called: bool = False, folder: Path | None = None) -> tuple[Layers, Layers]:
    """Two modules of the same weights, the second held by `placement`; from a file in `folder` where one is given."""
    torch.manual_seed(0)
    plain = Layers(count)
    weights = {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()}
    if folder is not None:
        save_file(weights, folder / "weights.safetensors")
        weights = load_file(folder / "weights.safetensors")
    with torch.device("meta"):
        held = Layers(count)
    home = placement.encoder_home if called else placement.home
    fill(held, weights, device=home, dtype=torch.float32, what="toy")
    return plain, held


# The order of copies


@pytest.mark.parametrize("count", [3, 4, 7])
def test_two_slots_and_the_next_block_on_its_way_before_it_is_asked_for(count: int) -> None:
    copies = LateCopies()
    placement = Placement("cpu", offload=True, copies=copies)
    plain, held = toy(count, placement)
    addresses = [min(p.data_ptr() for p in block.parameters()) for block in held.blocks]
    x = torch.randn(2, 3)
    with torch.no_grad(), placement.use(held):
        for _ in range(3):
            assert torch.equal(held(x, placement.blocks(held)), plain(x))
    queued = copies.named("queue")
    assert len({target for target, *_ in queued}) == 2
    # Each block in turn, over and over, two more than were used: the next forward's first are on their way.
    assert [addresses.index(source) for _, source, _ in queued] == [i % count for i in range(3 * count + 2)]
    for use, (_, _, after) in enumerate(queued[2:]):
        # A copy is queued when the slot's last use is over, and waits for the work up to there, not for later work.
        place = copies.log.index(("mark", after))
        waits = [entry for entry in copies.log[:place] if entry[0] == "wait"]
        assert len(waits) == use + 1
        assert copies.log[place + 1][0] == "queue"


def test_between_uses_weights_are_on_the_host_and_slots_are_gone() -> None:
    placement = Placement("cpu", offload=True, copies=LateCopies())
    plain, held = toy(5, placement)
    x = torch.randn(2, 3)
    with torch.no_grad():
        for _ in range(2):
            with placement.use(held):
                iterated = iter(placement.blocks(held))
                inside = [next(iterated).weight.data_ptr() for _ in range(5)]
            outside = [block.weight.data_ptr() for block in held.blocks]
            assert not set(inside) & set(outside)
            assert torch.equal(held(x), plain(x))


def test_a_block_that_is_over_has_no_view_of_the_slot() -> None:
    """Work that keeps a block too long fails to find it on the device, in place of reading the next one's weights."""
    placement = Placement("cpu", offload=True, copies=LateCopies())
    plain, held = toy(5, placement)
    with torch.no_grad(), placement.use(held):
        seen = []
        for index, _ in enumerate(placement.blocks(held)):
            seen.append(held.blocks[index])
            for earlier, block in zip(plain.blocks, seen, strict=False):
                assert torch.equal(block.weight, earlier.weight)


@pytest.mark.parametrize("broken_at", range(5))
def test_a_forward_that_breaks_off_does_not_disturb_the_next(broken_at: int) -> None:
    placement = Placement("cpu", offload=True, copies=LateCopies())
    plain, held = toy(5, placement)
    x = torch.randn(2, 3)
    with torch.no_grad(), placement.use(held):
        for index, _ in enumerate(placement.blocks(held)):
            if index == broken_at:
                break
        assert torch.equal(held(x, placement.blocks(held)), plain(x))


def test_a_module_that_calls_its_blocks_itself(tmp_path: Path) -> None:
    copies = LateCopies()
    placement = Placement("cpu", copies=copies)
    plain, held = toy(5, placement, called=True, folder=tmp_path)
    assert all(block.weight.is_meta for block in held.blocks)
    x = torch.randn(2, 3)
    with torch.no_grad():
        for _ in range(2):
            with placement.use(held, stay=False):
                assert torch.equal(held(x), plain(x)) and torch.equal(held(x), plain(x))
    assert all(block.weight.is_meta for block in held.blocks)
    assert not copies.named("queue")  # nothing lay in pinned memory
    with pytest.raises((NotImplementedError, RuntimeError)):
        held(x)  # the hooks are gone with the use


def test_kept_blocks_are_copied_once_a_use() -> None:
    copies = LateCopies()
    placement = Placement("cpu", vram_bytes=8 * 256 + 6 * 256, copies=copies)  # a slot takes two aligned tensors
    plain, held = toy(8, placement)
    x = torch.randn(2, 3)
    with torch.no_grad(), placement.use(held, beside=2 * 256):
        for _ in range(3):
            assert torch.equal(held(x, placement.blocks(held)), plain(x))
    sources = [source for _, source, _ in copies.named("queue")]
    times = [sources.count(min(p.data_ptr() for p in block.parameters())) for block in held.blocks]
    kept = [index for index, count in enumerate(times) if count == 1]
    assert len(kept) == 4 and len({target for target, *_ in copies.named("queue")}) == 6
    assert all(count >= 3 for index, count in enumerate(times) if index not in kept)


# Which blocks are kept


def test_budget_to_blocks() -> None:
    layers = [10] * 40
    assert keepable(400, layers) == 40
    assert keepable(399, layers) == 37  # with less than three to pass, two slots hold as much
    assert keepable(250, layers) == 23
    assert keepable(29, layers) == 0 and keepable(0, layers) == 0 and keepable(-5, layers) == 0
    for budget in range(20, 420):
        kept = keepable(budget, layers)
        used = kept * 10 + (2 * 10 if kept < 40 else 0)
        assert max(used, least_bytes(layers)) <= max(budget, least_bytes(layers))
    assert keepable(20, [10, 10]) == 2 and least_bytes([10, 10]) == 20


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_streamed_blocks_are_evenly_spread(count: int) -> None:
    for chosen in range(1, count + 1):
        places = spread(count, chosen)
        assert len(set(places)) == chosen and places == sorted(places) and places[0] >= 0 and places[-1] < count
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + count], strict=True)]
        assert max(gaps) - min(gaps) <= 1
    assert sorted(streaming._scattered(count)) == list(range(count))


# Where the host has no room


def test_without_room_to_pin_blocks_come_from_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pinned = 3 * 2 * 256  # bytes: three of eight blocks
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, str(pinned / 2**30))
    monkeypatch.setattr(streaming.logger, "disabled", False)  # as other tools' configurations leave it
    copies = LateCopies()
    placement = Placement("cpu", offload=True, copies=copies)
    with caplog.at_level(logging.WARNING):
        plain, held = toy(8, placement, folder=tmp_path)
    assert [block.weight.is_meta for block in held.blocks].count(False) == 3
    (said,) = caplog.messages
    assert "5 of 8 layers are read from their files" in said
    x = torch.randn(2, 3)
    with torch.no_grad(), placement.use(held):
        for _ in range(3):
            assert torch.equal(held(x, placement.blocks(held)), plain(x))
    assert len({source for _, source, _ in copies.named("queue")}) == 3


def test_a_file_that_has_gone_is_an_error_where_its_block_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "0")
    placement = Placement("cpu", offload=True, copies=LateCopies())
    plain, held = toy(5, placement, folder=tmp_path)
    monkeypatch.setattr("skyreels_fast.transfer.os.preadv", lambda *_: 0)
    with torch.no_grad(), pytest.raises(OSError, match="ends at byte"), placement.use(held):
        held(torch.randn(2, 3), placement.blocks(held))
    monkeypatch.undo()
    with torch.no_grad(), placement.use(held):
        x = torch.randn(2, 3)
        assert torch.equal(held(x, placement.blocks(held)), plain(x))


def test_a_wrong_number_of_pinned_gib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "many")
    with pytest.raises(ValueError, match="SKYREELS_FAST_PINNED_GIB='many' is not a number of GiB"):
        sf.Pipeline.from_pretrained("tiny", device="cpu", dtype=torch.float32, offload=True)


# Whole models


@pytest.mark.parametrize("pinned_gib", ["1", "0"])
@pytest.mark.parametrize("name", REQUESTS)
def test_streamed_is_bitwise_the_same_as_resident(
    name: str, pinned_gib: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, pinned_gib)
    mode, settings = REQUESTS[name]
    text = load_golden("text")
    values = {**SIZE, "context": text["cond"], "negative_context": text["uncond"], **settings}
    if mode == "i2v":
        values["clip_features"] = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(0))
    request = sf.Request(**values)
    results = []
    for copies in (None, LateCopies()):
        directory = models[mode]
        if not (directory / "Wan2.1_VAE.pth").exists():
            (directory / "Wan2.1_VAE.pth").symlink_to(GOLDEN / "Wan2.1_VAE.pth")
        pipe = sf.Pipeline.from_pretrained(directory, device="cpu", dtype=torch.float32, offload=True, mode=mode)
        pipe.placement = Placement("cpu", offload=True, copies=copies)
        results.append(pipe(request))
    assert len(pipe.placement.blocks(pipe._dit)) == LAYERS
    assert bool(copies.named("queue")) == (pinned_gib == "1")
    for resident, streamed in zip(results[0].latents, results[1].latents, strict=True):
        assert torch.equal(resident, streamed)
    assert torch.equal(results[0].frames, results[1].frames)


def test_streamed_weights_are_checked_as_strictly(models: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(models["df"] / "model.safetensors")
    del weights["blocks.3.ffn.0.weight"]
    with torch.device("meta"):
        dit = DiT(Checkpoint.open(models["df"]).config)
    placement = Placement("cpu", offload=True, copies=LateCopies())
    with pytest.raises(CheckpointError, match=r"missing blocks\.3\.ffn\.0\.weight"):
        fill(dit, weights, dit.key_parts(), device=placement.home, dtype=torch.float32, what="toy")


def deepened(file: str, prefix: str) -> dict[str, torch.Tensor]:
    """A golden encoder's weights with LAYERS layers, none like another; mapped, as a checkpoint's are."""
    weights, generator = torch.load(GOLDEN / file, weights_only=True, mmap=True), torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.startswith(f"{prefix}0.")]:
        for index in range(1, LAYERS):
            noise = torch.randn(weights[name].shape, generator=generator)
            weights[name.replace(f"{prefix}0.", f"{prefix}{index}.")] = weights[name] + 0.01 * noise
    return weights


def both_ways(make: Callable[[], nn.Module], weights: dict[str, torch.Tensor], placement: Placement) -> list[nn.Module]:
    encoders = [make(), make()]
    for encoder, home in zip(encoders, ("cpu", placement.encoder_home), strict=True):
        fill(encoder, encoder.renamed(weights), device=home, dtype=torch.float32, what="encoder")
    return encoders


def test_the_text_encoder_streams_and_looks_words_up_on_the_host() -> None:
    golden, placement = load_golden("components"), Placement("cpu", copies=LateCopies())
    weights = deepened("t5_tiny.pth", "blocks.")
    plain, streamed = both_ways(lambda: TextEncoder(weights), weights, placement)
    expected = plain.encode_ids(golden["t5.ids"], golden["t5.mask"])
    table = streamed.model.embed_tokens.weight
    assert table.data_ptr() == weights["token_embedding.weight"].data_ptr()
    with placement.use(streamed, stay=False):
        for _ in range(2):
            assert torch.equal(streamed.encode_ids(golden["t5.ids"], golden["t5.mask"]), expected)
        assert streamed.model.embed_tokens.weight is table
    assert sum(parameter.is_meta for parameter in streamed.blocks.parameters()) == len(list(plain.blocks.parameters()))


def test_the_image_encoder_streams() -> None:
    golden, placement = load_golden("components"), Placement("cpu", copies=LateCopies())
    weights = deepened("clip_tiny.pth", "visual.transformer.")
    plain, streamed = both_ways(lambda: ImageEncoder(weights, num_heads=4), weights, placement)
    assert len(streamed.blocks) == LAYERS - 1
    with placement.use(streamed, stay=False):
        for _ in range(2):
            assert torch.equal(streamed.encode(golden["clip.image"]), plain.encode(golden["clip.image"]))
    assert all(parameter.is_meta for parameter in streamed.blocks.parameters())


def test_a_stream_takes_its_layers_in_any_dtype() -> None:
    copies = LateCopies()
    placement = Placement("cpu", offload=True, copies=copies)
    torch.manual_seed(0)
    plain = Layers(4).to(torch.bfloat16)
    with torch.device("meta"):
        held = Layers(4)
    weights = {name: tensor.detach().float() for name, tensor in plain.state_dict().items()}
    fill(held, weights, device=placement.home, dtype=torch.bfloat16, what="toy")
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    with torch.no_grad(), placement.use(held):
        assert torch.equal(held(x, placement.blocks(held)), plain(x))


def test_a_stream_goes_with_its_module() -> None:
    import gc
    import weakref

    placement = Placement("cpu", offload=True, copies=LateCopies())
    _, held = toy(4, placement)
    stream = weakref.ref(placement.blocks(held))
    assert isinstance(stream(), WeightStream)
    del held
    gc.collect()
    assert stream() is None
