"""Softmax attention, dense or causal by blocks of tokens.

    out = softmax(q k^T / sqrt(Dh)) v

q: [B, Lq, N, Dh]; k, v: [B, Lk, N, Dh], of one dtype, which the result takes; the softmax is float32. Strides are free.
With `block_tokens` the tokens stand in blocks of that many (the last may be short) and each sees its own block and the
earlier ones; the queries are the last Lq of the Lk tokens. One dense call a block over the prefix of keys it sees: no
mask, and no work for what one would hide, so n equal blocks cost (n + 1) / 2n of dense attention.
Backends: those of `_attention_backends`, the fastest that the device has by default.
"""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

from skyreels_fast.ops import _attention_backends as backends
from skyreels_fast.ops._attention_backends import Dense
from skyreels_fast.ops._dispatch import (
    check_backend,
    check_no_grad,
    check_tensors,
    math_dtype_of,
    needs_grad,
    without_autocast,
)

BACKENDS = backends.NAMES


def causal_blocks(queries: int, keys: int, block_tokens: int | None) -> list[tuple[int, int]]:
    """(first, last + 1) of the queries that go together, among the keys: they see every key before last + 1."""
    first = keys - queries
    if block_tokens is None:
        return [(first, keys)]
    stops = [*range((first // block_tokens + 1) * block_tokens, keys, block_tokens), keys]
    return list(zip([first, *stops[:-1]], stops, strict=True))


def _by_prefix(dense: Dense, q: Tensor, k: Tensor, v: Tensor, block_tokens: int | None) -> Tensor:
    first = k.shape[1] - q.shape[1]
    blocks = causal_blocks(q.shape[1], k.shape[1], block_tokens)
    if len(blocks) == 1:
        return dense(q, k, v)
    outs = [dense(q[:, start - first : stop - first], k[:, :stop], v[:, :stop]) for start, stop in blocks]
    return torch.cat(outs, dim=1)


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
        return _weighted(_scores(q, k, math_dtype), v)

    return _by_prefix(dense, q, k, v, block_tokens)


def _scores(q: Tensor, k: Tensor, math_dtype: torch.dtype) -> Tensor:
    return torch.einsum("bqnd,bknd->bnqk", q.to(math_dtype), k.to(math_dtype)) * q.shape[-1] ** -0.5


def _weighted(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v.to(scores.dtype)).to(v.dtype)


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
        pairs = sum((stop - start) * stop for start, stop in causal_blocks(queries, keys, block_tokens))
    channels = batch * heads * head_dim
    return 2 * (queries + keys) * channels * itemsize, 4 * pairs * channels


def _check(q: Tensor, k: Tensor, v: Tensor, block_tokens: int | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"attention: q and k must be [B, L, N, Dh], not {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must agree in all but q's tokens"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    check_tensors("attention", q=q, k=k, v=v)
    if block_tokens is None:
        return
    if not isinstance(block_tokens, SupportsIndex) or block_tokens < 1:
        raise ValueError(f"attention: block_tokens must be an integer of at least 1, not {block_tokens!r}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"attention: causal blocks need a key for each query, not {k.shape[1]} for {q.shape[1]}")


def choose_attention(name: str | None, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend for tensors of `dtype` on `device`: `name`, checked, or where it is None the fastest there is.

    Raises ValueError for a backend that is unknown or not there, saying what it needs, or does not take the dtype.
    """
    device, taken = torch.device(device), dtype in backends.DTYPES
    if name is None:
        return backends.preferred(device) if taken else "sdpa"
    check_backend("attention", name, BACKENDS)
    reason = backends.missing(name, device)
    if reason is not None:
        present = [other for other in BACKENDS if backends.missing(other, device) is None]
        raise ValueError(f"attention: backend {name!r} is not available here: {reason}; there is {', '.join(present)}")
    if name in backends.LIBRARIES and not taken:
        raise ValueError(f"attention: backend {name!r} takes float16 and bfloat16, not {dtype}; use 'sdpa'")
    return name


def _choose(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> str:
    chosen = choose_attention(backend, q.device, q.dtype)
    if chosen not in backends.LIBRARIES:
        return chosen
    if backend is None:
        # Not every library has a backward; torch's own choice has.
        return "sdpa" if backends.refusal(q) or needs_grad(q, k, v) else chosen
    if backends.refusal(q):
        raise ValueError(f"attention: backend {backend!r} {backends.refusal(q)}; use 'sdpa'")
    return chosen


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None, backend: str | None = None
) -> Tensor:
    """Attention of q [B, Lq, N, Dh] to k, v [B, Lk, N, Dh]: [B, Lq, N, Dh] in their dtype.

    block_tokens: None for dense, else the size of the causal blocks; then the queries are the last Lq of the Lk tokens.
    backend: "fa3", "fa4", "fa2", "cudnn", "flash", "sdpa" or "ref"; None: the fastest there is, "sdpa" for what the
    libraries do not take. Raises ValueError for shapes or dtypes that do not fit or are not float16, bfloat16, float32
    or float64, for block_tokens that is no integer of at least 1, or a backend that is not there or does not take them.
    """
    _check(q, k, v, block_tokens)
    chosen = _choose(backend, q, k, v)
    with without_autocast(q):
        if chosen == "ref":
            return attention_ref(q, k, v, block_tokens=block_tokens, math_dtype=math_dtype_of(q))
        return _by_prefix(backends.dense(chosen), q, k, v, block_tokens)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Dense `attention`, and the log-sum-exp of its scaled scores [B, N, Lq], float32 or that of float64.

    With it softmaxes over parts of the keys can be put together (`merge_attention`); where there are no keys it is
    -inf, and the result 0. Not differentiable, except on "ref", which is chosen where a gradient is asked for. Raises
    ValueError as `attention` does, and where a gradient is asked for of another backend.
    """
    _check(q, k, v, None)
    chosen = _choose(backend, q, k, v)
    math_dtype = math_dtype_of(q)
    is_empty = 0 in (q.numel(), k.numel())  # which the kernels do not take
    with without_autocast(q):
        if chosen == "ref" or is_empty or (backend is None and needs_grad(q, k, v)):
            scores = _scores(q, k, math_dtype)
            return _weighted(scores, v), scores.logsumexp(dim=-1)
        check_no_grad("attention_with_lse", chosen, q, k, v)
        with torch.no_grad():
            out, lse = backends.dense_with_lse(chosen)(q, k, v)
    return out, lse.to(math_dtype).reshape(q.shape[0], q.shape[2], -1)[..., : q.shape[1]]
