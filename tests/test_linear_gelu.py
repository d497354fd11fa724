"""A linear layer and GELU in one product, against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import rel_l2
from kernels import assert_within_twice
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops.linear_gelu import linear_gelu_cost, linear_gelu_ref


def draw(dtype: torch.dtype, device: str = "cpu", tokens: tuple[int, ...] = (2, 37)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((*tokens, 96), (160, 96), (160,)))
    return x.to(device, dtype), (weight / 8).to(device, dtype), bias.to(device, dtype)


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = x.double() @ weight.double().T + bias.double()
    return u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@pytest.mark.parametrize("backend", [None, "ref"])
def test_formula(backend: str | None) -> None:
    arguments = draw(torch.float32)
    out = ops.linear_gelu(*arguments, backend=backend)
    assert out.shape == (2, 37, 160)
    assert rel_l2(out, formula(*arguments)) < 1e-6


def test_gradients_and_compilation() -> None:
    x, weight, bias = (tensor.double().requires_grad_() for tensor in draw(torch.float32, tokens=(3,)))
    assert torch.autograd.gradcheck(ops.linear_gelu, (x, weight, bias), fast_mode=True)
    compiled = torch.compile(ops.linear_gelu, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, bias), ops.linear_gelu(x, weight, bias))


def test_without_a_bias() -> None:
    x, weight, bias = draw(torch.float32)
    for backend in (None, "ref"):
        assert torch.equal(ops.linear_gelu(x, weight, None, backend=backend), ops.linear_gelu(x, weight, 0 * bias))
    assert torch.equal(linear_gelu_ref(x, weight, None), ops.linear_gelu(x, weight, None))


def test_errors_name_the_values() -> None:
    x, weight, bias = draw(torch.float32)
    with pytest.raises(ValueError, match=r"x \[2, 37, 5\] does not fit the weight \[160, 96\]"):
        ops.linear_gelu(x[..., :5], weight, bias)
    with pytest.raises(ValueError, match=r"must be \[160\], not \[3\]"):
        ops.linear_gelu(x, weight, bias[:3])
    with pytest.raises(ValueError, match="one dtype, not torch.float16"):
        ops.linear_gelu(x.half(), weight, bias)
    with pytest.raises(ValueError, match="'cublaslt' takes float16 and bfloat16 on CUDA, not torch.float32 on cpu"):
        ops.linear_gelu(x, weight, bias, backend="cublaslt")
    with pytest.raises(ValueError, match="no backend 'triton'; give one of cublaslt, ref"):
        ops.linear_gelu(x, weight, bias, backend="triton")


def test_cost() -> None:
    assert linear_gelu_cost(10, 4, 6) == ((10 * 10 + 24) * 2, 2 * 240)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 37), (1, 1000)])
def test_epilogue(dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    """On the GPU the default is the product's epilogue, whose GELU is the one with tanh."""
    arguments = draw(dtype, "cuda", tokens)
    out = ops.linear_gelu(*arguments)
    assert torch.equal(out, ops.linear_gelu(*arguments, backend="cublaslt"))
    assert_within_twice(out, linear_gelu_ref(*arguments), formula(*arguments))
    x, weight, bias = arguments
    assert torch.equal(ops.linear_gelu(x, weight, None), ops.linear_gelu(x, weight, 0 * bias))
