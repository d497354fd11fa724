"""Attention over two disjoint sets of keys, put together from that over each (Liu et al., arXiv 2310.01889).

    both = log(exp(lse_1) + exp(lse_2))
    out  = exp(lse_1 - both) out_1 + exp(lse_2 - both) out_2

out_1, out_2: [B, L, N, Dh], lse_1, lse_2: [B, N, L], as `ops.attention_with_lse` gives them; a query that sees no key
of a set has -inf there, and any finite result. Any number of sets is merged one after the other, in float32 until the
last.

The kernel takes float32, float16 and bfloat16, each tensor its own, and Dh up to 512; it reads and writes each element
once. The math is float32 (float64 for float64), rounded once. Not differentiable, except on the backend "ref".
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyreels_fast.ops._dispatch import adjoining, check_tensors, choose_kernel, jit, math_dtype_of, tl, triton

BACKENDS = ("triton", "ref")
_NAME = "merge_attention"
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_CHANNELS = 512
_ELEMENTS = 4096  # of a head's channels and some tokens, in a program


def merge_attention_ref(
    out: Tensor,
    lse: Tensor,
    more: Tensor,
    more_lse: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    math_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`merge_attention` in plain torch, computed in `math_dtype`, which the merged lse has."""
    lses = torch.stack((lse.to(math_dtype), more_lse.to(math_dtype)))
    unseen = (lses == -torch.inf).all(0)
    both = lses.masked_fill(unseen, 0).logsumexp(0)  # of -inf alone it has no gradient
    weights = (lses - both).exp().transpose(2, 3).unsqueeze(-1)
    merged = weights[0] * out.to(math_dtype) + weights[1] * more.to(math_dtype)
    return merged.to(out_dtype or math_dtype), both.masked_fill(unseen, -torch.inf)


def merge_attention_cost(
    shape: tuple[int, int, int, int], *, itemsizes: tuple[int, int, int] = (2, 2, 4)
) -> tuple[int, int]:
    """(bytes moved, flops) of one call on results of `shape` [B, L, N, Dh]; the first's, the second's and the merged
    one's bytes an element."""
    rows = shape[0] * shape[1] * shape[2]
    return rows * (shape[3] * sum(itemsizes) + 12), rows * 3 * shape[3]


@jit
def _merge_attention_kernel(
    merged, both, out, lse, more, more_lse, tokens, heads, channels,
    out_batch, out_row, out_head, more_batch, more_row, more_head,
    lse_batch, lse_head, lse_row, more_lse_batch, more_lse_head, more_lse_row,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS tokens of a head; `merged` and `both` are contiguous."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)[None, :]
    is_row = row < tokens
    inside = is_row[:, None] & (channel < channels)
    a = tl.load(lse + batch * lse_batch + head * lse_head + row * lse_row, is_row, other=0.0).to(tl.float32)
    b = tl.load(more_lse + batch * more_lse_batch + head * more_lse_head + row * more_lse_row, is_row, other=0.0)
    b = b.to(tl.float32)
    top = tl.maximum(a, b)
    seen = top > float("-inf")
    top = tl.where(seen, top, 0.0)
    first, second = tl.exp2((a - top) * LOG2_E), tl.exp2((b - top) * LOG2_E)
    total = first + second
    tl.store(both + (batch * heads + head) * tokens + row, top + tl.log2(total) / LOG2_E, is_row)
    by = 1.0 / tl.where(seen, total, 1.0)
    at = row[:, None]
    x = tl.load(out + batch * out_batch + at * out_row + head * out_head + channel, inside, other=0.0)
    y = tl.load(more + batch * more_batch + at * more_row + head * more_head + channel, inside, other=0.0)
    sums = x.to(tl.float32) * (first * by)[:, None] + y.to(tl.float32) * (second * by)[:, None]
    into = merged + ((batch * tokens + at) * heads + head) * channels + channel
    tl.store(into, sums.to(merged.dtype.element_ty), inside)


@torch.library.custom_op("skyreels_fast::merge_attention", mutates_args=())
def _merge_attention(
    out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, channels = out.shape
    merged = torch.empty(out.shape, dtype=out_dtype, device=out.device)
    both = torch.empty(lse.shape, dtype=torch.float32, device=out.device)
    if merged.numel() == 0:
        return merged, both
    out, more = adjoining(out), adjoining(more)
    width = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // width)
    with torch.cuda.device_of(out):
        _merge_attention_kernel[(triton.cdiv(tokens, rows), heads, batch)](
            merged, both, out, lse, more, more_lse, tokens, heads, channels,
            *out.stride()[:3], *more.stride()[:3], *lse.stride(), *more_lse.stride(), ROWS=rows, CHANNELS=width,
        )  # fmt: skip
    return merged, both


@_merge_attention.register_fake
def _(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    merged = torch.empty(out.shape, dtype=out_dtype, device=out.device)
    return merged, torch.empty(lse.shape, dtype=torch.float32, device=out.device)


def _check(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, out_dtype: torch.dtype | None) -> None:
    if out.dim() != 4 or out.shape != more.shape:
        raise ValueError(
            f"{_NAME}: out and more must be [B, L, N, Dh] of one shape, not {list(out.shape)} and {list(more.shape)}"
        )
    batch, tokens, heads, _ = out.shape
    for label, given in (("lse", lse), ("more_lse", more_lse)):
        if given.shape != (batch, heads, tokens):
            raise ValueError(f"{_NAME}: {label} must be [B, N, L] = {[batch, heads, tokens]}, not {list(given.shape)}")
    check_tensors(_NAME, out=out, lse=lse, more=more, more_lse=more_lse, out_dtype=out_dtype)


def merge_attention(
    out: Tensor,
    lse: Tensor,
    more: Tensor,
    more_lse: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [B, L, N, Dh] in `out_dtype` and log-sum-exp [B, N, L] of attention over two disjoint sets of keys:
    `out` and `lse` of one, `more` and `more_lse` of the other.

    The log-sum-exp, and without an `out_dtype` the result, is float32, float64 where one of the tensors is. Raises
    ValueError for shapes, dtypes or devices that do not fit, a dtype that is not one of float16, bfloat16, float32
    and float64, or a backend that is not there or does not take them.
    """
    _check(out, lse, more, more_lse, out_dtype)
    tensors, refusal = (out, lse, more, more_lse), None
    dtypes = [tensor.dtype for tensor in tensors] + [out_dtype or torch.float32]
    if any(dtype not in _KERNEL_DTYPES for dtype in dtypes) or out.shape[3] > _MAX_CHANNELS:
        refusal = f"float32, float16 and bfloat16 and heads of up to {_MAX_CHANNELS} channels, not {out.shape[3]} of "
        refusal += ", ".join(map(str, dict.fromkeys(dtypes)))
    if choose_kernel(_NAME, backend, BACKENDS, refusal, *tensors) != "ref":
        return _merge_attention(*tensors, out_dtype or torch.float32)
    return merge_attention_ref(*tensors, out_dtype=out_dtype, math_dtype=math_dtype_of(*dtypes))
