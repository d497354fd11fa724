"""The whole forward on a GPU: as exact as plain torch at the same rounding points, and never waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import rel_l2
from torch import Tensor, nn

from benchmarks.models import random_tensor
from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import DiT
from skyreels_fast.dit import block as dit_block
from skyreels_fast.ops import _dispatch
from skyreels_fast.ops.linear_gelu import linear_gelu_ref

pytestmark = pytest.mark.gpu
FRAMES = 25
TIMESTEPS = [level for level in (900, 700, 500, 300, 100) for _ in range(5)]


@pytest.fixture(scope="module")
def dit() -> DiT:
    """Of 1.3B's width, with four layers."""
    config = TransformerConfig("t2v", 16, 1536, 8960, 12, 4)
    with torch.device("meta"):
        dit = DiT(config)
    for name, parameter in list(dit.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = random_tensor(name, tuple(parameter.shape), torch.device("cuda"), torch.bfloat16)
        setattr(dit.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return dit.eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """540P, 97 frames, staggered: 51,000 tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    latents = torch.randn(1, 16, FRAMES, 68, 120, generator=generator, device="cuda")
    text = torch.randn(1, 512, 4096, generator=generator, device="cuda")
    return latents, torch.tensor([TIMESTEPS], device="cuda"), text


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernels of ours: every op is its reference."""
    monkeypatch.setitem(_dispatch._PRESENT, "cuda", ["ref"])
    monkeypatch.setattr(dit_block, "linear_gelu", linear_gelu_ref)
    yield


@torch.no_grad()
def velocity(dit: DiT, inputs: tuple[Tensor, Tensor, Tensor], block: int | None = None) -> Tensor:
    latents, timestep, text = inputs
    return dit(latents, timestep, dit.encode_context(text), causal_block_size=block)


@pytest.mark.parametrize("block", [None, 5])
def test_error_is_no_greater_than_that_of_plain_torch(
    dit: DiT, inputs: tuple, plain_torch: None, monkeypatch: pytest.MonkeyPatch, block: int | None
) -> None:
    low = velocity(dit, inputs, block)
    try:
        exact = velocity(dit.float(), inputs, block)
    finally:
        dit.bfloat16()
    monkeypatch.undo()
    ours = velocity(dit, inputs, block)
    errors = rel_l2(ours, exact), rel_l2(low, exact)
    print(f"\nerror of the kernels {errors[0]:.3e}, of plain torch {errors[1]:.3e}")
    assert errors[0] <= errors[1]
    assert torch.equal(ours, velocity(dit, inputs, block))


def test_no_step_waits_for_the_device(dit: DiT, inputs: tuple) -> None:
    latents, timestep, text = inputs
    with torch.no_grad():
        context = dit.encode_context(text)
        dit(latents, timestep, context)  # what is made once for a size is made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            dit(latents, timestep, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
