"""The weights of softmax attention to few keys, of which some stand for many: for a prompt that is mostly padding.

    w_ij = softmax over j of (q_i k_j^T / sqrt(Dh) + log_counts_j)

q: [B, L, N, Dh], k: [B, n, N, Dh], log_counts: [n], the logarithm of how often key j counts; w: [B, L, N, n]. With
norm_weight [N * Dh], q is first x / sqrt(mean(x^2) + eps) * norm_weight over the N * Dh channels of a token.

Where n <= Dh the weights are no larger than what they would sum up, and attention followed by an output projection W is
one product of w with v W^T, n / Dh of the projection's work. The softmax is float32 (float64 for float64), rounded
once. The kernel takes float16 and bfloat16, Dh and n up to 128, in one pass over q and one more for the norm; it
multiplies norm_weight into k, rounded to its dtype. Not differentiable, except on the backend "ref".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyreels_fast.ops._dispatch import (
    adjoining,
    check_tensors,
    choose_kernel,
    jit,
    math_dtype_of,
    tl,
    triton,
    without_autocast,
)
from skyreels_fast.ops.qk_norm_rope3d import qk_norm_ref

BACKENDS = ("triton", "ref")
_NAME = "attention_weights"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
MAX_CHANNELS, MAX_KEYS = 128, 128
# Queries in a tile of a program, its tiles, its warps, and tiles on their way: the fastest on an H200, whose registers
# hold the scores of 64 queries and 128 keys. It takes 49 KiB of shared memory, which every GPU with bfloat16 has.
_ROWS, _TILES, _WARPS, _STAGES = 64, 16, 4, 3


def attention_weights_ref(
    q: Tensor,
    k: Tensor,
    log_counts: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    math_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`attention_weights` in plain torch, computed in `math_dtype`."""
    rows = q.to(math_dtype) if norm_weight is None else qk_norm_ref(q, norm_weight, eps=eps, math_dtype=math_dtype)
    scores = torch.einsum("bqnd,bknd->bqnk", rows, k.to(math_dtype)) * q.shape[-1] ** -0.5
    if log_counts is not None:
        scores = scores + log_counts.to(math_dtype)
    return scores.softmax(dim=-1).to(q.dtype)


def attention_weights_cost(
    q_shape: tuple[int, int, int, int], keys: int, *, norm: bool = False, itemsize: int = 2
) -> tuple[int, int]:
    """(bytes moved, flops) of one call with q of `q_shape` [B, L, N, Dh] and `keys` = n; the `norm` reads q again."""
    batch, tokens, heads, head_dim = q_shape
    rows = batch * tokens * heads
    reads = rows * head_dim * (2 if norm else 1) + batch * keys * heads * head_dim
    return (reads + rows * keys) * itemsize, rows * (2 * keys * head_dim + 2 * head_dim * norm)


@jit
def _attention_weights_rms_kernel(out, q, batch_stride, row_stride, tokens, channels, eps, BLOCK: tl.constexpr):
    """One program for a token: 1 / sqrt(mean(q^2) + eps)."""
    batch, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    x = tl.load(q + batch * batch_stride + token * row_stride + channel, channel < channels, other=0.0).to(tl.float32)
    tl.store(out + batch * tokens + token, tl.rsqrt(tl.sum(x * x, 0) / channels + eps))


@jit
def _attention_weights_kernel(
    out, q, k, log_counts, rms, scale, tokens, key_units, heads, channels,
    q_batch, q_row, q_head, k_batch, k_row, k_head,
    TILES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program for TILES times ROWS queries of a head, whose keys it holds; `out` is contiguous.

    There are key_units * UNIT keys: so Triton sees how many weights of a row it can store at once.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    keys = key_units * UNIT
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel, key = tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    is_key, is_channel = key < keys, (channel < channels)[None, :]
    k += batch * k_batch + head * k_head
    head_keys = tl.load(k + key[:, None] * k_row + channel[None, :], is_key[:, None] & is_channel, other=0.0)
    head_keys = tl.trans(head_keys)
    bias = tl.where(is_key, 0.0, float("-inf"))
    if log_counts is not None:
        bias = tl.load(log_counts + key, is_key, other=float("-inf")).to(tl.float32) * LOG2_E
    q += batch * q_batch + head * q_head
    out += (batch * tokens * heads + head) * keys
    for tile in tl.range(0, TILES, num_stages=STAGES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        is_row, at = row < tokens, row.to(tl.int64)[:, None]
        rows = tl.load(q + at * q_row + channel[None, :], is_row[:, None] & is_channel, other=0.0)
        by = tl.zeros((ROWS,), tl.float32) + scale * LOG2_E
        if rms is not None:
            by *= tl.load(rms + batch * tokens + row, is_row, other=0.0)
        scores = tl.dot(rows, head_keys) * by[:, None] + bias[None, :]
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights *= (1.0 / tl.sum(weights, 1))[:, None]
        tl.store(out + at * heads * keys + key[None, :], weights.to(out.dtype.element_ty), is_row[:, None] & is_key)


@torch.library.custom_op("skyreels_fast::attention_weights", mutates_args=())
def _attention_weights(
    q: Tensor, k: Tensor, log_counts: Tensor | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    batch, tokens, heads, channels = q.shape
    keys, width = k.shape[1], heads * channels
    out = torch.empty(batch, tokens, heads, keys, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    unit = math.gcd(keys, 16)
    with torch.cuda.device_of(q):
        rms = None
        if norm_weight is None:
            q = adjoining(q)
        else:
            q = q if q.stride(3) == 1 and q.stride(2) == channels else q.contiguous()
            k = (k * norm_weight.view(heads, channels)).to(q.dtype)
            rms = torch.empty(batch, tokens, dtype=torch.float32, device=q.device)
            _attention_weights_rms_kernel[(tokens, batch)](
                rms, q, q.stride(0), q.stride(1), tokens, width, eps, BLOCK=triton.next_power_of_2(width), num_warps=4
            )
        k = adjoining(k)
        _attention_weights_kernel[(triton.cdiv(tokens, _ROWS * _TILES), heads, batch)](
            out, q, k, None if log_counts is None else log_counts.contiguous(), rms, channels**-0.5,
            tokens, keys // unit, heads, channels, *q.stride()[:3], *k.stride()[:3],
            TILES=_TILES, ROWS=_ROWS, KEYS=max(16, triton.next_power_of_2(keys)), UNIT=unit,
            CHANNELS=max(16, triton.next_power_of_2(channels)), STAGES=_STAGES, num_warps=_WARPS,
            num_stages=_STAGES,
        )  # fmt: skip
    return out


@_attention_weights.register_fake
def _(q: Tensor, k: Tensor, log_counts: Tensor | None, norm_weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty(*q.shape[:3], k.shape[1], dtype=q.dtype, device=q.device)


def _check(q: Tensor, k: Tensor, log_counts: Tensor | None, norm_weight: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"{_NAME}: q and k must be [B, L, N, Dh], not {list(q.shape)} and {list(k.shape)}")
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"{_NAME}: q {list(q.shape)} and k {list(k.shape)} must agree in all but their tokens")
    if k.shape[1] == 0:
        raise ValueError(f"{_NAME}: k {list(k.shape)} has no keys")
    if q.dtype != k.dtype:
        raise ValueError(f"{_NAME}: q and k must have one dtype, not {q.dtype} and {k.dtype}")
    check_tensors(_NAME, q=q, k=k, log_counts=log_counts, norm_weight=norm_weight)
    width = q.shape[2] * q.shape[3]
    for label, vector, size in (("log_counts", log_counts, k.shape[1]), ("norm_weight", norm_weight, width)):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{_NAME}: {label} must be [{size}], not {list(vector.shape)}")


def _refusal(q: Tensor, k: Tensor) -> str | None:
    """What the kernel takes and these are not, or None."""
    if q.dtype not in _KERNEL_DTYPES:
        return f"float16 and bfloat16, not {q.dtype}"
    if q.shape[3] > MAX_CHANNELS or k.shape[1] > MAX_KEYS:
        return f"heads of up to {MAX_CHANNELS} channels and {MAX_KEYS} keys, not {q.shape[3]} and {k.shape[1]}"
    return None


def attention_weights(
    q: Tensor,
    k: Tensor,
    log_counts: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Softmax weights [B, L, N, n] of q [B, L, N, Dh] over k [B, n, N, Dh], in their dtype.

    log_counts [n]: the logarithm of how often each key counts; None: once. norm_weight [N * Dh]: of the RMSNorm over
    all heads together that q takes first, with `eps`; None: none. Raises ValueError for shapes, dtypes or devices
    that do not fit, a dtype that is not one of float16, bfloat16, float32 and float64, or a backend that is not there
    or does not take them.
    """
    _check(q, k, log_counts, norm_weight)
    tensors = (q, k, log_counts, norm_weight)
    if choose_kernel(_NAME, backend, BACKENDS, _refusal(q, k), *tensors) == "ref":
        options = {"norm_weight": norm_weight, "eps": eps, "math_dtype": math_dtype_of(q)}
        with without_autocast(q):
            return attention_weights_ref(q, k, log_counts, **options)
    return _attention_weights(*tensors, eps)
