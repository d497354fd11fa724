"""Softmax attention, dense or causal by blocks of tokens.

    out = softmax(q k^T / sqrt(Dh)) v

q: [B, Lq, N, Dh]; k, v: [B, Lk, N, Dh], of one dtype, which the result takes; the softmax is float32. Strides are free.
With `block_tokens` the tokens stand in blocks of that many (the last may be short) and each sees its own block and the
earlier ones: one dense call a block over the prefix of keys it sees, so no mask, and no work for what one would hide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


def _by_prefix(dense: Dense, q: Tensor, k: Tensor, v: Tensor, block_tokens: int | None) -> Tensor:
    tokens = q.shape[1]
    if block_tokens is None or block_tokens >= tokens:
        return dense(q, k, v)
    stops = [min(start + block_tokens, tokens) for start in range(0, tokens, block_tokens)]
    blocks = q.split(block_tokens, dim=1)
    return torch.cat([dense(block, k[:, :stop], v[:, :stop]) for block, stop in zip(blocks, stops, strict=True)], dim=1)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_tokens: int | None = None,
    math_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`attention` as its formula says, in plain torch, computed in `math_dtype`. Holds all N * Lq * Lk scores."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqnd,bknd->bnqk", q.to(math_dtype), k.to(math_dtype)) * q.shape[-1] ** -0.5
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v.to(math_dtype)).to(q.dtype)

    return _by_prefix(dense, q, k, v, block_tokens)


def attention_cost(
    q_shape: tuple[int, int, int, int], keys: int, *, block_tokens: int | None = None, itemsize: int = 2
) -> tuple[int, int]:
    """(bytes moved, flops) of one call with q of `q_shape` [B, Lq, N, Dh] and `keys` = Lk.

    Bytes: q, k, v and the result once each. Flops: those of the two matrix products over the keys that are seen.
    """
    batch, queries, heads, head_dim = q_shape
    if block_tokens is None:
        pairs = queries * keys
    else:
        starts = range(0, queries, block_tokens)
        stops = [min(start + block_tokens, queries) for start in starts]
        pairs = sum((stop - start) * stop for start, stop in zip(starts, stops, strict=True))
    channels = batch * heads * head_dim
    return 2 * (queries + keys) * channels * itemsize, 4 * pairs * channels


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None) -> Tensor:
    """`attention` through torch's scaled_dot_product_attention."""
    return _by_prefix(_sdpa, q, k, v, block_tokens)


BACKENDS = {"sdpa": attention_sdpa, "ref": attention_ref}


def _check(q: Tensor, k: Tensor, v: Tensor, block_tokens: int | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"attention: q and k must be [B, L, N, Dh], not {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must agree in all but q's tokens"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if block_tokens is None:
        return
    if block_tokens < 1:
        raise ValueError(f"attention: block_tokens must be at least 1, not {block_tokens}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"attention: causal blocks need as many keys as queries, not {k.shape[1]} and {q.shape[1]}")


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None, backend: str | None = None
) -> Tensor:
    """Attention of q [B, Lq, N, Dh] to k, v [B, Lk, N, Dh]: [B, Lq, N, Dh] in their dtype.

    block_tokens: None for dense, else the size of the causal blocks (then Lq = Lk). backend: "sdpa" (the default) or
    "ref". Raises ValueError for shapes or dtypes that do not fit, or a backend that is not there.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"attention: backend {backend!r} is not available here, only {', '.join(BACKENDS)}")
    _check(q, k, v, block_tokens)
    return BACKENDS[backend or "sdpa"](q, k, v, block_tokens=block_tokens)
