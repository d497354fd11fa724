"""RMSNorm over the channels, then SiLU: what stands before each convolution of a video VAE.

    norm(x)  = x / max(|x|, 1e-12) * sqrt(C) * gamma, |x| the Euclidean norm over C
    y        = norm(x) * sigmoid(norm(x)), or norm(x) alone with silu=False

x: [..., C], the channels last, as in a frame [B, H, W, C]; gamma: [C]. The math is float32 (float64 where x is),
rounded once. Rows of C values must be evenly spaced and contiguous, or x is copied; the result is contiguous. Kernels
take float32, float16 and bfloat16 and C up to 8192, and give the same bits each time. Not differentiable, except on the
backend "ref".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from skyreels_fast.ops._dispatch import check_tensors, choose_kernel, jit, math_dtype_of, tl, triton

BACKENDS = ("triton", "ref")
_EPS = 1e-12
_MAX_CHANNELS = 8192
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_ELEMENTS = 4096  # of the rows that a program takes


def norm_silu_ref(x: Tensor, gamma: Tensor, *, silu: bool = True, math_dtype: torch.dtype = torch.float32) -> Tensor:
    """`norm_silu` in plain torch, computed in `math_dtype`."""
    y = functional.normalize(x.to(math_dtype), dim=-1, eps=_EPS) * x.shape[-1] ** 0.5 * gamma.to(math_dtype)
    return (functional.silu(y) if silu else y).to(x.dtype)


def norm_silu_cost(shape: tuple[int, ...], *, itemsize: int = 2) -> tuple[int, int]:
    """(bytes moved, flops) of one call on x of `shape`."""
    elements = math.prod(shape)
    return 2 * elements * itemsize, 8 * elements


@jit
def _norm_silu_kernel(
    out, x, gamma, rows, x_stride, channels, root, eps,
    SILU: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows, each in two powers of two, HEAD + TAIL >= channels: 96 = 64 + 32, 384 = 256 + 128."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    x += row * x_stride
    out += row * channels
    head = tl.arange(0, HEAD)[None, :]
    in_head = inside & (head < channels)
    head_values = tl.load(x + head, in_head, other=0.0).to(tl.float32)
    squares = tl.sum(head_values * head_values, 1)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)[None, :]
        in_tail = inside & (tail < channels)
        tail_values = tl.load(x + tail, in_tail, other=0.0).to(tl.float32)
        squares += tl.sum(tail_values * tail_values, 1)
    # Rounded to the nearest: an error here is one of the whole row.
    factor = tl.div_rn(root, tl.maximum(tl.sqrt_rn(squares), eps))[:, None]
    y = head_values * factor * tl.load(gamma + head, head < channels, other=0.0).to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + head, y.to(out.dtype.element_ty), in_head)
    if TAIL > 0:
        y = tail_values * factor * tl.load(gamma + tail, tail < channels, other=0.0).to(tl.float32)
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out + tail, y.to(out.dtype.element_ty), in_tail)


def _choose(backend: str | None, x: Tensor, gamma: Tensor) -> str:
    """`choose_kernel` of tensors that it checks."""
    name = "norm_silu"
    if x.dim() < 1 or gamma.shape != x.shape[-1:]:
        raise ValueError(f"{name}: gamma must be [C] for x [..., C], not {list(gamma.shape)} for {list(x.shape)}")
    check_tensors(name, x=x, gamma=gamma)
    refusal = None
    if wrong := [tensor.dtype for tensor in (x, gamma) if tensor.dtype not in _KERNEL_DTYPES]:
        refusal = f"float32, float16 and bfloat16, not {wrong[0]}"
    elif x.shape[-1] > _MAX_CHANNELS:
        refusal = f"C up to {_MAX_CHANNELS}, not {x.shape[-1]}"
    return choose_kernel(name, backend, BACKENDS, refusal, x, gamma)


@torch.library.custom_op("skyreels_fast::norm_silu", mutates_args=())
def _norm_silu(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    channels = x.shape[-1]
    matrix = x.reshape(-1, channels)
    matrix = matrix if matrix.stride(1) == 1 or channels == 1 else matrix.contiguous()
    head = 1 << channels.bit_length() - 1
    tail = triton.next_power_of_2(channels - head) if channels > head else 0
    rows = 1 << max(1, _BLOCK_ELEMENTS // (head + tail)).bit_length() - 1
    with torch.cuda.device_of(x):
        _norm_silu_kernel[(triton.cdiv(len(matrix), rows),)](
            out, matrix, gamma.contiguous(), len(matrix), matrix.stride(0), channels, channels**0.5, _EPS,
            SILU=silu, ROWS=rows, HEAD=head, TAIL=tail, num_warps=4,
        )  # fmt: skip
    return out


@_norm_silu.register_fake
def _(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def norm_silu(x: Tensor, gamma: Tensor, *, silu: bool = True, backend: str | None = None) -> Tensor:
    """RMSNorm of x [..., C] over C times gamma [C], then SiLU unless `silu` is False: [..., C] in x's dtype.

    Raises ValueError for shapes or devices that do not fit, a dtype that is not one of float16, bfloat16, float32 and
    float64, or a backend that is not there or does not take them.
    """
    if _choose(backend, x, gamma) == "ref":
        math_dtype = math_dtype_of(x)
        return norm_silu_ref(x, gamma, silu=silu, math_dtype=math_dtype)
    return _norm_silu(x, gamma, silu)
