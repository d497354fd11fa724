"""RMSNorm over channels and SiLU: the formula in float64, and the kernel on every device that has it."""

from __future__ import annotations

import pytest
import torch
from conftest import rel_l2
from kernels import assert_within_twice, machine_kernels, run_in_interpreter
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops import _dispatch
from skyreels_fast.ops.norm_silu import norm_silu_cost, norm_silu_ref

on_each_kernel = pytest.mark.parametrize(
    ("device", "backend"), [case for case in machine_kernels() if case.values[1] == "triton"]
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Frames of the published VAE's widths, odd sizes, one pixel, one channel.
SHAPES = [(1, 4, 6, 96), (2, 3, 5, 192), (1, 2, 2, 384), (3, 7, 33), (1, 129), (5, 1), (1, 1, 1, 4100)]


def formula(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    x, gamma = x.double(), gamma.double()
    y = x / x.square().mean(-1, keepdim=True).sqrt() * gamma
    return y / (1 + (-y).exp()) if silu else y


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 3 + 1
    gamma = torch.randn(shape[-1:], generator=generator) + 1
    return x.to(dtype).to(device), gamma.to(dtype).to(device)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_formula(shape: tuple[int, ...], silu: bool) -> None:
    x, gamma = inputs(shape, torch.float32)
    assert rel_l2(ops.norm_silu(x, gamma, silu=silu), formula(x, gamma, silu)) < 1e-6
    exact = ops.norm_silu(x.double(), gamma.double(), silu=silu)
    assert exact.dtype == torch.float64 and rel_l2(exact, formula(x, gamma, silu)) < 1e-14


def test_a_row_of_zeros_stays_one() -> None:
    assert torch.equal(ops.norm_silu(torch.zeros(2, 8), torch.ones(8)), torch.zeros(2, 8))


def test_gradients_flow() -> None:
    x, gamma = inputs((3, 8), torch.float64)
    assert torch.autograd.gradcheck(ops.norm_silu, (x.requires_grad_(), gamma.requires_grad_()))


def test_cost() -> None:
    assert norm_silu_cost((2, 3, 4)) == (2 * 24 * 2, 8 * 24)


@pytest.mark.parametrize(
    ("x", "gamma", "message"),
    [
        (torch.ones(4, 8), torch.ones(7), r"gamma must be \[C\] .* not \[7\] for \[4, 8\]"),
        (torch.ones(()), torch.ones(()), r"for x \[\.\.\., C\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x: Tensor, gamma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.norm_silu(x, gamma)


def test_a_single_vector_is_taken() -> None:
    x, gamma = torch.randn(8), torch.randn(8)
    assert torch.equal(ops.norm_silu(x, gamma), ops.norm_silu(x[None], gamma)[0])


def test_a_missing_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no backend 'cuda'; give one of triton, ref"):
        ops.norm_silu(torch.ones(2, 8), torch.ones(8), backend="cuda")


@on_each_kernel
@pytest.mark.parametrize(
    ("shape", "silu", "dtype"),
    [*((shape, True, torch.bfloat16) for shape in SHAPES), *((SHAPES[0], False, dtype) for dtype in DTYPES)],
    ids=str,
)
def test_twice_rule(shape, silu, dtype, device, backend, poisoned_memory):
    x, gamma = inputs(shape, dtype, device)
    actual = ops.norm_silu(x, gamma, silu=silu, backend=backend)
    low = norm_silu_ref(x, gamma, silu=silu, math_dtype=dtype)
    assert_within_twice(actual, low, formula(x, gamma, silu))
    assert torch.equal(actual, ops.norm_silu(x, gamma, silu=silu, backend=backend))


@on_each_kernel
def test_strides_are_free(device, backend):
    x, gamma = inputs((2, 3, 5, 64), torch.float32, device)
    expected = ops.norm_silu(x, gamma, backend=backend)
    wider = torch.cat([torch.full_like(x, torch.nan), x], -1)[..., 64:]
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # channels first in memory
    for view in (wider, first):
        assert torch.equal(ops.norm_silu(view, gamma, backend=backend), expected)
    assert ops.norm_silu(x[:0], gamma, backend=backend).shape == (0, 3, 5, 64)


@on_each_kernel
def test_registered_and_compiled(device, backend):
    x, gamma = inputs((2, 3, 96), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.skyreels_fast.norm_silu.default, (x, gamma, True))
    compiled = torch.compile(lambda x: ops.norm_silu(x, gamma, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.norm_silu(x, gamma, backend=backend))


@on_each_kernel
def test_what_the_kernel_does_not_take_is_named(device, backend):
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"float64; use 'ref'"):
        ops.norm_silu(x.double(), x[0].double(), backend=backend)
    with pytest.raises(ValueError, match=r"C up to 8192, not 8193"):
        ops.norm_silu(torch.ones(1, 8193, device=device), torch.ones(8193, device=device), backend=backend)


@pytest.mark.skipif(_dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the tests above run Triton's interpreter")
def test_triton_kernel_in_the_interpreter():
    run_in_interpreter(__file__)
