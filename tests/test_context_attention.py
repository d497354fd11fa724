"""Attention to a context whose keys are counted: against all of them in float64, and the kernel on every device."""

from __future__ import annotations

import pytest
import torch
from conftest import rel_l2
from kernels import assert_within_twice, machine_kernels, run_in_interpreter
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops.context_attention import context_attention_cost, context_attention_ref

on_each_kernel = pytest.mark.parametrize(("device", "backend"), machine_kernels(("triton",)))
# batch, queries, keys, heads, head size: some tiles of queries and of keys, one key, odd sizes, a wide head
SIZES = [(1, 300, 101, 3, 128), (2, 65, 130, 2, 64), (1, 7, 1, 5, 96), (1, 129, 33, 1, 20), (1, 40, 70, 1, 256)]
Size = tuple[int, int, int, int, int]


def inputs(size: Size, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As a model's: the last key is the padding's."""
    batch, queries, keys, heads, head_dim = size
    generator = torch.Generator().manual_seed(sum(size))
    q, k, v = (
        torch.randn(batch, tokens, heads, head_dim, generator=generator).mul(1.5).to(dtype)
        for tokens in (queries, keys, keys)
    )
    counts = torch.ones(keys)
    counts[-1] = 512 - keys
    return tuple(tensor.to(device) for tensor in (q, k, v, counts))


def repeated(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    """Attention to so many keys as there are, in float64."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(counts.long(), dim=2) for tensor in (k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("backend", [None, "sdpa", "ref"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_count_is_so_many_keys(size: Size, backend: str | None) -> None:
    args = inputs(size, torch.float32)
    out = ops.context_attention(*args, backend=backend)
    assert out.shape == args[0].shape
    assert rel_l2(out, repeated(*args)) < 2e-6


def test_gradients_flow() -> None:
    *qkv, counts = inputs((1, 3, 4, 2, 8), torch.float64)
    qkv = [tensor.requires_grad_() for tensor in qkv]
    assert torch.autograd.gradcheck(lambda *qkv: ops.context_attention(*qkv, counts), qkv)


def test_cost_counts_the_keys_there_are() -> None:
    assert context_attention_cost((1, 10, 2, 8), 5) == (2 * 15 * 16 * 2, 4 * 10 * 5 * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 2, 8)}, r"q and k must be \[B, L, N, Dh\], not \[3, 2, 8\]"),
        ({"v": torch.ones(1, 3, 2, 8)}, r"v \[1, 3, 2, 8\] must agree"),
        ({"k": torch.ones(1, 4, 2, 8).half()}, "one dtype, not torch.float32, torch.float16"),
        ({"counts": torch.ones(3)}, r"counts must be \[4\] in float32, not \[3\]"),
        ({"backend": "fa3"}, "no backend 'fa3'; give one of triton, sdpa, ref"),
        ({"backend": "triton"}, "backend 'triton' .*; use 'sdpa'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    args = {"q": torch.ones(1, 3, 2, 8), "k": torch.ones(1, 4, 2, 8), "v": torch.ones(1, 4, 2, 8)}
    with pytest.raises(ValueError, match=message):
        ops.context_attention(**({**args, "counts": torch.ones(4)} | change))


# Triton's interpreter has no products of bfloat16.
@pytest.mark.parametrize(
    ("device", "backend", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}", marks=case.marks)
        for case in machine_kernels(("triton",))
        for dtype in ((torch.float16, torch.bfloat16) if case.values[0] == "cuda" else (torch.float16,))
    ],
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_is_within_twice_the_low_precision_formula(
    size: Size, device: str, backend: str, dtype: torch.dtype
) -> None:
    args = inputs(size, dtype, device)
    out = ops.context_attention(*args, backend=backend)
    low = context_attention_ref(*args, math_dtype=dtype)
    assert_within_twice(out.flatten(2), low.flatten(2), repeated(*args).flatten(2))
    assert torch.equal(out, ops.context_attention(*args, backend=backend))


@on_each_kernel
def test_strides_are_free(device: str, backend: str) -> None:
    q, k, v, counts = inputs((2, 33, 20, 2, 32), torch.float16, device)
    expected = ops.context_attention(q, k, v, counts, backend=backend)
    wide = torch.stack([q, q], dim=2)[:, :, 1]
    pairs = torch.stack([k, v], dim=2)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (wide, *pairs.unbind(2))]
    for tensors in ((wide, *pairs.unbind(2)), turned):
        assert torch.equal(ops.context_attention(*tensors, counts, backend=backend), expected)


@on_each_kernel
def test_registered_operator(device: str, backend: str) -> None:
    torch.library.opcheck(
        torch.ops.skyreels_fast.context_attention.default, inputs((1, 5, 6, 2, 16), torch.float16, device)
    )


def test_kernel_in_the_interpreter() -> None:
    run_in_interpreter(__file__)
