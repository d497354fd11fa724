"""Streams and readers on a GPU: the same numbers, bounded memory, no waiting on the host."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_golden
from safetensors.torch import load_file, save_file
from streams import LAYERS, deep_model
from torch import Tensor, nn

import skyreels_fast as sf
from benchmarks.models import config
from skyreels_fast import host_memory
from skyreels_fast.checkpoint import fill
from skyreels_fast.encoders.text import TextEncoder
from skyreels_fast.footprint import GIB, OVERHEAD_BYTES, activation_bytes
from skyreels_fast.pipeline import DiT
from skyreels_fast.placement import Placement
from skyreels_fast.transfer import CHUNK_BYTES, Reader, located

pytestmark = pytest.mark.gpu

MIB = 2**20
WIDTH = 2048  # 16 MiB a block in float32
POOLS = {"pinned": "64", "files": "0", "both": str(5 * 16 / 1024 + 0.001)}


class Layers(nn.Module):
    """Blocks that take long, so that copies that do not wait for them, or are not waited for, would show."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))
        self.head = nn.Linear(WIDTH, 4, bias=False)  # a bias would have cuBLASLt take memory of its own

    def forward(self, x: Tensor, blocks=None, sleep: int = 0) -> Tensor:
        for block in self.blocks if blocks is None else blocks:
            if sleep:
                torch.cuda._sleep(sleep)
            x = block(x).tanh()
        return self.head(x)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(dict(Layers(12).state_dict()), file)
    return file


def held(weights: Path, placement: Placement, dtype: torch.dtype = torch.float32) -> Layers:
    with torch.device("meta"):
        module = Layers(12)
    fill(module, load_file(weights), device=placement.home, dtype=dtype, what="toy")
    return module


@contextmanager
def peak_above() -> Iterator[list[int]]:
    """Bytes allocated at the peak inside, above those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, found = torch.cuda.memory_allocated(), []
    yield found
    torch.cuda.synchronize()
    found.append(torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_weights_are_what_the_file_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 5 * CHUNK_BYTES // 4 + 12345
    tensors = {"long": torch.randn(count, generator=generator), "short": torch.randn(7, generator=generator)}
    tensors["half"] = torch.randn(3, CHUNK_BYTES // 2, generator=generator).half()
    save_file(tensors, tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")
    for sources in (mapped, tensors):
        targets = [torch.full(t.shape, torch.nan, dtype=dtype, device="cuda") for t in sources.values()]
        with Reader("cuda") as reader:
            reader.copy(zip(located(sources.values()), targets, strict=True)).wait()
        for target, expected in zip(targets, tensors.values(), strict=True):
            assert torch.equal(target.cpu(), expected.cuda().to(dtype).cpu())


def test_resident_loading_takes_no_second_copy(weights: Path) -> None:
    with peak_above() as peak:
        module = held(weights, Placement("cuda"), torch.bfloat16)
    total = sum(parameter.nbytes for parameter in module.parameters())
    assert peak[0] < total + 40 * CHUNK_BYTES  # chunks that are being cast
    assert all(parameter.is_cuda for parameter in module.parameters())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sleep", [0, 3_000_000])
def test_slots_are_written_when_free_and_read_when_full(
    weights: Path, pool: str, sleep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, POOLS[pool])
    x = torch.randn(64, WIDTH, device="cuda")
    plain = held(weights, Placement("cuda"))
    placement = Placement("cuda", offload=True)
    streamed = held(weights, placement)
    with torch.no_grad():
        expected = plain(x)
        del plain
        for _ in range(2):
            with peak_above() as peak, placement.use(streamed):
                outputs = [streamed(x, placement.blocks(streamed), sleep) for _ in range(4)]
            assert peak[0] < (2 + 1) * 16 * MIB + 8 * MIB  # two slots; what the matrix products need
            assert all(torch.equal(output, expected) for output in outputs)
    assert not any(parameter.is_cuda for parameter in streamed.parameters())


def test_pinned_blocks_cost_no_host_synchronisation(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "64")
    placement = Placement("cuda", offload=True)
    streamed = held(weights, placement)
    assert all(block.weight.is_pinned() for block in streamed.blocks)
    x = torch.randn(8, WIDTH, device="cuda")
    with torch.no_grad(), placement.use(streamed):
        streamed(x, placement.blocks(streamed))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            start = torch.cuda.Event()
            start.record()
            for _ in range(2):
                streamed(x, placement.blocks(streamed))
            assert not start.query()  # all is queued, and the device has not begun
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_budget_is_kept(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "64")
    x = torch.randn(8, WIDTH, device="cuda")
    with torch.no_grad():
        expected = held(weights, Placement("cuda"))(x)
        for blocks in (3, 7, 12, 20):
            placement = Placement("cuda", vram_bytes=(blocks * 16 + 49) * MIB)
            streamed = held(weights, placement)
            with peak_above() as peak, placement.use(streamed, beside=48 * MIB):
                for _ in range(2):
                    assert torch.equal(streamed(x, placement.blocks(streamed)), expected)
            assert (min(blocks, 12) - 1) * 16 * MIB < peak[0] < (min(blocks, 12) * 16 + 24) * MIB


def test_the_host_memory_is_unpinned_with_its_module(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, "64")
    placement = Placement("cuda", offload=True)
    streamed = held(weights, placement)
    kept = streamed.blocks[0].weight.detach()
    assert kept.is_pinned()
    del streamed
    gc.collect()
    assert not kept.is_pinned()


@pytest.mark.parametrize("pool", ["pinned", "files"])
@pytest.mark.parametrize("mode", ["df", "i2v"])
def test_offloaded_is_bitwise_the_same_as_resident(
    mode: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(host_memory.PINNED_VARIABLE, POOLS[pool])
    directory = deep_model(tmp_path / mode, mode)
    (directory / "Wan2.1_VAE.pth").symlink_to(GOLDEN / "Wan2.1_VAE.pth")
    text = load_golden("text")
    values = {"context": text["cond"], "negative_context": text["uncond"], "height": 64, "width": 96, "seed": 1}
    values |= {"num_frames": 17, "inference_steps": 3}
    if mode == "i2v":
        features = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(0))
        values |= {"image": GOLDEN / "first.png", "clip_features": features}
    latents = []
    for options in ({}, {"offload": True}, {"vram": 1.5}):
        pipe = sf.Pipeline.from_pretrained(directory, device="cuda", mode=mode, **options)
        latents.append(pipe(sf.Request(**values)).latents[0])
        streamed = pipe.placement.blocks(pipe._dit) is not pipe._dit.blocks
        assert streamed == bool(options) and len(pipe._dit.blocks) == LAYERS
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], latents[2])
    with pipe.placement.use(pipe._vae) as vae:
        beside = int(1.5 * GIB) - OVERHEAD_BYTES - sum(parameter.nbytes for parameter in vae.parameters())
        rest = sum(p.nbytes for name, p in pipe._dit.named_parameters() if p.is_cuda and "blocks." not in name)
        assert pipe.machine.decode_bytes(pipe._dit, vae) == beside - rest


def test_the_text_encoder_never_lies_on_the_gpu_whole() -> None:
    golden = load_golden("components")
    sources = torch.load(GOLDEN / "t5_tiny.pth", weights_only=True, mmap=True)
    plain, streamed = TextEncoder(sources), TextEncoder(sources)
    fill(plain, plain.renamed(sources), device="cuda", dtype=torch.float32, what="text encoder")
    placement = Placement("cuda")
    home = placement.encoder_home
    fill(streamed, streamed.renamed(sources), device=home, dtype=torch.float32, what="text encoder")
    with placement.use(streamed, stay=False):
        out = streamed.encode_ids(golden["t5.ids"], golden["t5.mask"])
        assert streamed.model.embed_tokens.weight.device.type == "cpu"
    assert torch.equal(out, plain.encode_ids(golden["t5.ids"], golden["t5.mask"]))
    assert not any(parameter.is_cuda for parameter in streamed.parameters())


def test_the_estimate_of_activations_holds() -> None:
    cfg, tokens = config("1.3B", "t2v"), (9, 34, 60)
    with torch.device("meta"):
        dit = DiT(cfg)
    dit.blocks = dit.blocks[:4]
    dit = dit.to_empty(device="cuda").to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            nn.init.normal_(parameter, std=0.02)
        latents = torch.randn(1, 16, tokens[0], tokens[1] * 2, tokens[2] * 2, device="cuda")
        timestep = torch.full((1, tokens[0]), 500, device="cuda")
        context = dit.encode_context(torch.randn(1, 512, 4096, device="cuda"))
        dit(latents, timestep, context)
        with peak_above() as peak:
            dit(latents, timestep, context)
    count = tokens[0] * tokens[1] * tokens[2]
    estimate = activation_bytes(cfg, torch.bfloat16, count, 1)
    assert 0.5 * estimate < peak[0] < estimate, (peak[0] / GIB, estimate / GIB)
