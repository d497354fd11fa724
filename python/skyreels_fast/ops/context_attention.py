"""Softmax attention to a short context, each of whose keys stands for several equal ones.

    out = sum_j c_j exp(s_j) v_j / sum_j c_j exp(s_j),  s_j = q k_j^T / sqrt(Dh)

q: [B, Lq, N, Dh]; k, v: [B, Lk, N, Dh], of one dtype, which the result takes; counts c: [Lk] float32, positive; the
softmax is float32. Strides are free but for the last dimension.

A prompt of n tokens is padded to 512 that are all attended to. The padding's keys are one and the same, so n + 1 keys
with the counts 1, …, 1, 512 - n give what all 512 do. The backend "triton" takes float16 and bfloat16, heads of up to
256 channels and up to 1,024 keys, and is not differentiable; "sdpa" is torch's own with log c as its mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from skyreels_fast.ops._dispatch import available, jit, needs_grad, tl, triton

BACKENDS = ("triton", "sdpa", "ref")
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_CHANNELS, _MAX_KEYS = 256, 1024


def context_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, *, math_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`context_attention` as its formula says, in plain torch, computed in `math_dtype`. Holds all scores."""
    scores = torch.einsum("bqnd,bknd->bnqk", q.to(math_dtype), k.to(math_dtype)) * q.shape[-1] ** -0.5
    weights = (scores + counts.to(math_dtype).log()).softmax(dim=-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, v.to(math_dtype)).to(q.dtype)


def context_attention_cost(q_shape: tuple[int, int, int, int], keys: int, *, itemsize: int = 2) -> tuple[int, int]:
    """(bytes moved, flops) of one call with q of `q_shape` [B, Lq, N, Dh] and `keys` = Lk."""
    batch, queries, heads, head_dim = q_shape
    channels = batch * heads * head_dim
    return 2 * (queries + keys) * channels * itemsize, 4 * queries * keys * channels


@jit
def _context_attention_kernel(
    out, q, k, v, counts, scale, queries, keys, heads, channels,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS queries of a head; `out` is contiguous, `scale` includes log2(e)."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    taken = (row < queries)[:, None] & (channel < channels)[None, :]
    rows = tl.load(q + batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_row + channel[None, :],
                   taken, other=0.0)  # fmt: skip
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < keys)[:, None] & (channel < channels)[None, :]
        some_keys = tl.load(k + key[:, None] * k_row + channel[None, :], there, other=0.0)
        log_counts = tl.where(key < keys, tl.log2(tl.load(counts + key, key < keys, other=1.0)), float("-inf"))
        scores = tl.dot(rows, tl.trans(some_keys)) * scale + log_counts[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + key[:, None] * v_row + channel[None, :], there, other=0.0)
        summed = summed * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        top = new_top
    at = ((batch.to(tl.int64) * queries + row)[:, None] * heads + head) * channels + channel[None, :]
    tl.store(out + at, (summed / total[:, None]).to(out.dtype.element_ty), taken)


@torch.library.custom_op("skyreels_fast::context_attention", mutates_args=())
def _context_attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    batch, queries, heads, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    rows = 128 if channels <= 128 else 64
    with torch.cuda.device_of(q):
        _context_attention_kernel[(triton.cdiv(queries, rows), batch * heads)](
            out, q, k, v, counts.contiguous(), channels**-0.5 * math.log2(math.e), queries, k.shape[1], heads, channels,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            ROWS=rows, KEYS=64, CHANNELS=max(16, triton.next_power_of_2(channels)), num_warps=8, num_stages=2,
        )  # fmt: skip
    return out


@_context_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _check(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> None:
    name = "context_attention"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"{name}: q and k must be [B, L, N, Dh], not {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"{name}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must agree in all but q's tokens"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name}: q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if counts.shape != k.shape[1:2] or counts.dtype != torch.float32:
        raise ValueError(f"{name}: counts must be [{k.shape[1]}] in float32, not {list(counts.shape)} {counts.dtype}")


def _refusal(q: Tensor, k: Tensor) -> str | None:
    """Why the kernel does not take such tensors; None where it does."""
    if "triton" not in available(q.device.type):
        return f"is not available for {q.device.type}"
    if q.dtype not in _DTYPES:
        return f"takes float16 and bfloat16, not {q.dtype}"
    if q.shape[3] > _MAX_CHANNELS or k.shape[1] > _MAX_KEYS:
        return f"takes heads of up to {_MAX_CHANNELS} channels and {_MAX_KEYS} keys, not {q.shape[3]} and {k.shape[1]}"
    return None


def context_attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, *, backend: str | None = None) -> Tensor:
    """Attention of q [B, Lq, N, Dh] to k, v [B, Lk, N, Dh], key j counted counts[j] times: q's shape and dtype.

    counts: [Lk] float32, positive. backend: "triton", "sdpa" or "ref"; None: "triton" where it can. Raises ValueError
    for shapes or dtypes that do not fit, or a backend that does not take them.
    """
    _check(q, k, v, counts)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"context_attention: there is no backend {backend!r}; give one of {', '.join(BACKENDS)}")
    refusal = _refusal(q, k)
    if backend is None:
        preferred = refusal is None and q.is_cuda and not needs_grad(q, k, v)
        backend = "triton" if preferred else "sdpa"
    if backend == "ref":
        return context_attention_ref(q, k, v, counts)
    if backend == "triton":
        if refusal is not None:
            raise ValueError(f"context_attention: backend 'triton' {refusal}; use 'sdpa'")
        return _context_attention(q, k, v, counts)
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    mask = counts.log().to(q.dtype).expand(q.shape[0], 1, q.shape[1], -1)
    return functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
