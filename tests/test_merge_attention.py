"""Attention over parts of the keys, merged: against attention to all of them in float64, on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import rel_l2
from kernels import assert_within_twice, machine_kernels, poisoned_memory, run_in_interpreter
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops.merge_attention import merge_attention_cost, merge_attention_ref

__all__ = ["poisoned_memory"]
on_each_kernel = pytest.mark.parametrize(("device", "backend"), machine_kernels(("triton",)))
# batch, tokens, heads, head size: rows that fill no program, sizes that are no powers of two
SIZES = [(1, 70, 3, 128), (2, 33, 2, 20), (1, 1, 1, 1), (2, 5, 3, 96)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Size = tuple[int, int, int, int]


def parts(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    """Two results with log-sum-exps that are far apart for some rows and near for others."""
    batch, tokens, heads, _ = size
    generator = torch.Generator().manual_seed(sum(size))
    out, more = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    lse, more_lse = (torch.randn(batch, heads, tokens, generator=generator).mul(20).to(device) for _ in range(2))
    return out, lse, more, more_lse


def test_merged_parts_are_the_whole() -> None:
    """Against the definition, with scores that a plain exponential would overflow on, and three parts."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, 8, generator=generator) * 30 for _ in range(3))
    first, *others = [ops.attention_with_lse(q, *(x[:, a:b] for x in (k, v))) for a, b in ((0, 4), (4, 5), (5, 9))]
    for other in others:
        first = ops.merge_attention(*first, *other)
    scores = torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()) * 8**-0.5
    assert rel_l2(first[1], scores.logsumexp(-1)) < 1e-6
    assert rel_l2(first[0], torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v.double())) < 1e-5


def test_gradients_flow_through_parts() -> None:
    """Queries, keys and values have those of attention to all keys; a part of which nothing is seen has none."""
    q, k, v = (torch.randn(1, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(*given: Tensor) -> Tensor:
        q, k, v = given
        pairs = [ops.attention_with_lse(q, k[:, part], v[:, part]) for part in (slice(0, 2), slice(2, 6))]
        return ops.merge_attention(*pairs[0], *pairs[1])[0]

    torch.testing.assert_close(run(q, k, v), ops.attention(q, k, v), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(run, (q, k, v))
    out, lse, more, more_lse = (tensor.double().requires_grad_() for tensor in parts((1, 3, 2, 4)))
    unseen = torch.full_like(lse, -torch.inf).requires_grad_()
    ops.merge_attention(out, unseen, more, torch.full_like(more_lse, -torch.inf))[0].sum().backward()
    assert unseen.grad.count_nonzero() == out.grad.count_nonzero() == 0


@pytest.mark.parametrize("out_dtype", [None, *DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    out, lse = ops.merge_attention(*parts((1, 3, 2, 4), dtype), out_dtype=out_dtype)
    assert lse.dtype == (torch.float64 if torch.float64 in (dtype, out_dtype) else torch.float32)
    assert out.dtype == (out_dtype or lse.dtype)


def test_cost_counts_what_is_read_and_written() -> None:
    rows = 1 * 10 * 2
    assert merge_attention_cost((1, 10, 2, 8)) == (rows * (8 * (2 + 2 + 4) + 3 * 4), rows * 3 * 8)
    assert merge_attention_cost((1, 10, 2, 8), itemsizes=(4, 2, 2)) == merge_attention_cost((1, 10, 2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.ones(3, 2, 8)}, r"must be \[B, L, N, Dh\] of one shape, not \[3, 2, 8\] and \[1, 3, 2, 8\]"),
        ({"more": torch.ones(1, 4, 2, 8)}, r"of one shape, not \[1, 3, 2, 8\] and \[1, 4, 2, 8\]"),
        ({"lse": torch.ones(1, 3, 2)}, r"lse must be \[B, N, L\] = \[1, 2, 3\], not \[1, 3, 2\]"),
        ({"more_lse": torch.ones(2, 3)}, r"more_lse must be \[B, N, L\] = \[1, 2, 3\], not \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    args = dict(zip(("out", "lse", "more", "more_lse"), parts((1, 3, 2, 8)), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.merge_attention(**(args | change))


@on_each_kernel
def test_kernel_refuses_what_it_does_not_take(device: str, backend: str) -> None:
    with pytest.raises(ValueError, match="takes float32, .* not 8 of torch.float64, torch.float32; use 'ref'"):
        ops.merge_attention(*(x.double() for x in parts((1, 3, 2, 8), device=device)), backend=backend)
    with pytest.raises(ValueError, match="heads of up to 512 channels, not 513 of torch.float32; use 'ref'"):
        ops.merge_attention(*parts((1, 3, 2, 513), device=device), backend=backend)


@on_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_is_within_twice_the_low_precision_formula(
    size: Size, dtype: torch.dtype, device: str, backend: str
) -> None:
    given = parts(size, dtype, device)
    out, lse = ops.merge_attention(*given, out_dtype=dtype, backend=backend)
    low, low_lse = merge_attention_ref(*given, out_dtype=dtype, math_dtype=dtype)
    exact, exact_lse = merge_attention_ref(
        *(x.double() for x in given), out_dtype=torch.float64, math_dtype=torch.float64
    )
    assert_within_twice(out, low, exact)
    assert_within_twice(lse, low_lse.float(), exact_lse)
    assert rel_l2(lse, exact_lse) < 1e-6
    assert all(map(torch.equal, ops.merge_attention(*given, out_dtype=dtype, backend=backend), (out, lse)))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "ref"), *machine_kernels(("triton",))])
def test_a_query_may_see_no_key_of_a_part(device: str, backend: str) -> None:
    """Nor of either: then its result is 0."""
    out, lse, more, more_lse = parts((1, 3, 1, 4), device=device)
    lse[..., 0], more_lse[..., 1], lse[..., 2], more_lse[..., 2] = (-torch.inf,) * 4
    merged, both = ops.merge_attention(out, lse, more, more_lse, backend=backend)
    torch.testing.assert_close(merged, torch.stack((more[:, 0], out[:, 1], 0 * out[:, 2]), dim=1))
    torch.testing.assert_close(both, torch.stack((more_lse[..., 0], lse[..., 1], lse[..., 2]), dim=-1))


@on_each_kernel
def test_strides_and_dtypes_are_free(device: str, backend: str) -> None:
    given = parts((2, 33, 2, 32), torch.bfloat16, device)
    expected = ops.merge_attention(*given, backend=backend)
    out, lse, more, more_lse = given
    views = (
        out.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([lse, lse], dim=-1)[..., 1],
        torch.stack([more, more], dim=-1)[..., 0], more_lse.mT.contiguous().mT,
    )  # fmt: skip
    assert not any(view.is_contiguous() for view in views)
    assert all(map(torch.equal, ops.merge_attention(*views, backend=backend), expected))
    mixed = ops.merge_attention(out.float(), lse, more, more_lse, backend=backend)
    assert all(map(torch.equal, mixed, expected))


@on_each_kernel
def test_no_tokens(device: str, backend: str) -> None:
    assert ops.merge_attention(*parts((1, 0, 2, 4), device=device), backend=backend)[0].shape == (1, 0, 2, 4)


@on_each_kernel
def test_no_graph_break(device: str, backend: str) -> None:
    given = parts((1, 5, 2, 8), device=device)
    compiled = torch.compile(ops.merge_attention, fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(*given, backend=backend), ops.merge_attention(*given, backend=backend)))


@on_each_kernel
def test_registered_operator(device: str, backend: str) -> None:
    given = parts((1, 5, 2, 16), torch.float16, device)
    torch.library.opcheck(torch.ops.skyreels_fast.merge_attention.default, (*given, torch.bfloat16))


def test_kernel_in_the_interpreter() -> None:
    run_in_interpreter(__file__)
