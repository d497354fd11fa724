"""Softmax weights over counted keys: against attention to all the keys in float64, and the kernel on every device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import rel_l2
from kernels import assert_within_twice, machine_kernels, poisoned_memory, run_in_interpreter
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops.attention_weights import attention_weights_cost, attention_weights_ref

__all__ = ["poisoned_memory"]
on_each_kernel = pytest.mark.parametrize(("device", "backend"), machine_kernels(("triton",)))
# Triton's interpreter has no products of bfloat16.
on_each_kernel_and_dtype = pytest.mark.parametrize(
    ("device", "backend", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}", marks=case.marks)
        for case in machine_kernels(("triton",))
        for dtype in ((torch.float16, torch.bfloat16) if case.values[0] == "cuda" else (torch.float16,))
    ],
)
# batch, queries, keys, heads, head size: rows that fill no program, one key, sizes that are no powers of two
SIZES = [(1, 700, 104, 3, 128), (2, 65, 128, 2, 64), (1, 7, 1, 5, 96), (1, 129, 33, 1, 20), (1, 1100, 65, 2, 96)]
Size = tuple[int, int, int, int, int]


def inputs(size: Size, dtype: torch.dtype, device: str = "cpu", norm: bool = True) -> dict[str, Any]:
    """As a model's: the last key is the padding's."""
    batch, queries, keys, heads, head_dim = size
    generator = torch.Generator().manual_seed(sum(size))
    q, k = (torch.randn(batch, n, heads, head_dim, generator=generator).mul(1.5).to(dtype) for n in (queries, keys))
    log_counts = torch.zeros(keys)
    log_counts[-1] = math.log(512 - keys)
    weight = torch.randn(heads * head_dim, generator=generator).mul(0.1).add(1).to(dtype)
    args = {"q": q, "k": k, "log_counts": log_counts} | ({"norm_weight": weight, "eps": 1e-5} if norm else {})
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in args.items()}


def exact(
    q: Tensor, k: Tensor, log_counts: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The weights in float64, from as many keys as are counted; and what these sum up of values that are the keys."""
    q, k = q.double(), k.double()
    if norm_weight is not None:
        flat = q.flatten(2)
        q = (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()).view_as(q)
    counts = log_counts.double().exp().round().long()
    many = k.repeat_interleave(counts, dim=1).transpose(1, 2)
    weights = (q.transpose(1, 2) @ many.mT / q.shape[-1] ** 0.5).softmax(-1)
    parts = [part.sum(-1) for part in weights.split(counts.tolist(), dim=-1)]
    return torch.stack(parts, dim=-1).transpose(1, 2), (weights @ many).transpose(1, 2)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_count_is_so_many_keys(size: Size, backend: str | None, norm: bool) -> None:
    args = inputs(size, torch.float32, norm=norm)
    weights = ops.attention_weights(**args, backend=backend)
    expected, summed = exact(**args)
    assert rel_l2(weights, expected) < 2e-6
    assert rel_l2(torch.einsum("blhn,bnhd->blhd", weights, args["k"]), summed) < 2e-6


def test_gradients_flow() -> None:
    args = inputs((1, 3, 4, 2, 8), torch.float64)
    tensors = [args[name].requires_grad_() for name in ("q", "k", "norm_weight")]

    def run(q: Tensor, k: Tensor, norm_weight: Tensor) -> Tensor:
        return ops.attention_weights(q, k, args["log_counts"], norm_weight=norm_weight)

    assert torch.autograd.gradcheck(run, tensors)


def test_cost_counts_what_is_read_and_written() -> None:
    channels, keys = 2 * 8, 5
    assert attention_weights_cost((1, 10, 2, 8), keys) == (
        (10 * channels + keys * channels + 10 * 2 * keys) * 2, 10 * 2 * 2 * keys * 8
    )  # fmt: skip
    with_norm, _ = attention_weights_cost((1, 10, 2, 8), keys, norm=True)
    assert with_norm - attention_weights_cost((1, 10, 2, 8), keys)[0] == 10 * channels * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 2, 8)}, r"q and k must be \[B, L, N, Dh\], not \[3, 2, 8\]"),
        ({"k": torch.ones(1, 4, 3, 8)}, r"k \[1, 4, 3, 8\] must agree"),
        ({"k": torch.ones(1, 0, 2, 8)}, r"k \[1, 0, 2, 8\] has no keys"),
        ({"k": torch.ones(1, 4, 2, 8, device="meta")}, r"q \(cpu\) and k \(meta\) must be on one device"),
        ({"q": torch.ones(1, 3, 2, 8).half()}, "one dtype, not torch.float16 and torch.float32"),
        ({"log_counts": torch.ones(3)}, r"log_counts must be \[4\], not \[3\]"),
        ({"norm_weight": torch.ones(8)}, r"norm_weight must be \[16\], not \[8\]"),
        ({"norm_weight": torch.ones(16, device="meta")}, r"q \(cpu\) and norm_weight \(meta\) must be on one device"),
        ({"backend": "fa3"}, "there is no backend 'fa3'; give one of triton, ref"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    args = {"q": torch.ones(1, 3, 2, 8), "k": torch.ones(1, 4, 2, 8), "log_counts": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        ops.attention_weights(**(args | change))


@on_each_kernel
def test_kernel_refuses_what_it_does_not_take(device: str, backend: str) -> None:
    q = torch.ones(1, 3, 2, 8, device=device)
    with pytest.raises(ValueError, match="takes float16 and bfloat16, not torch.float32; use 'ref'"):
        ops.attention_weights(q, q, backend=backend)
    with pytest.raises(ValueError, match="takes heads of up to 128 channels and 128 keys, not 8 and 300; use 'ref'"):
        ops.attention_weights(q.half(), torch.ones(1, 300, 2, 8, device=device).half(), backend=backend)


@pytest.mark.parametrize("norm", [False, True])
@on_each_kernel_and_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_is_within_twice_the_low_precision_formula(
    size: Size, device: str, backend: str, dtype: torch.dtype, norm: bool
) -> None:
    args = inputs(size, dtype, device, norm)
    out = ops.attention_weights(**args, backend=backend)
    low = attention_weights_ref(**args, math_dtype=dtype)
    assert_within_twice(out.flatten(2), low.flatten(2), exact(**args)[0].flatten(2))
    assert torch.equal(out, ops.attention_weights(**args, backend=backend))


@on_each_kernel
def test_strides_are_free(device: str, backend: str) -> None:
    args = inputs((2, 33, 20, 2, 32), torch.float16, device)
    expected = ops.attention_weights(**args, backend=backend)
    q, k = args["q"], args["k"]
    views = [
        (torch.stack([q, q], dim=2)[:, :, 1], torch.stack([k, k], dim=2)[:, :, 0]),
        tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k)),
        tuple(tensor.repeat_interleave(2, dim=3)[..., ::2] for tensor in (q, k)),
    ]
    for q, k in views:
        assert torch.equal(ops.attention_weights(**(args | {"q": q, "k": k}), backend=backend), expected)


@on_each_kernel
def test_no_queries(device: str, backend: str) -> None:
    args = inputs((1, 0, 4, 2, 8), torch.float16, device)
    assert ops.attention_weights(**args, backend=backend).shape == (1, 0, 2, 4)


@on_each_kernel
def test_registered_operator(device: str, backend: str) -> None:
    args = inputs((1, 5, 6, 2, 16), torch.float16, device)
    torch.library.opcheck(torch.ops.skyreels_fast.attention_weights.default, (*args.values(),))


def test_kernel_in_the_interpreter() -> None:
    run_in_interpreter(__file__)
