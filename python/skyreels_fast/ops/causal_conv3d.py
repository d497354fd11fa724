"""One frame of a causal 3D convolution, from the frames up to it, with bias and residual, or `norm_silu` of that.

    out[b, h, w, o] = bias[o] + residual[b, h, w, o]
                    + sum over t, i, j, c of frames[t][b, h + i - KH // 2, w + j - KW // 2, c] * weight[o, c, t, i, j]

frames: the last 1 to KT of them, the oldest first, each [B, H, W, C]; those that are not given are zeros, as are pixels
outside. weight: [O, C, KT, KH, KW] with odd KH and KW; bias: [O]; residual: [B, H, W, O]. With gamma [O] the result is
norm_silu(out, gamma). All of one dtype, which the result has, under autocast too. Sums are float32 (float64 where the
frames are); on "triton" and "ref" they are rounded once.

    triton   an implicit matrix product [B*H*W, KT*KH*KW*C] x [.., O] that reads each frame where it lies; bias and
             residual are added before the one rounding, and up to O = 192 the norm is taken before it too. C a multiple
             of 16, KT up to 3, KH * KW up to 32. Weights in the memory order of torch.channels_last_3d are read
             where they lie, others are copied first
    conv2d   torch's 2D convolution of the frames side by side in the channels: cuDNN's on a GPU
    conv3d   torch's 3D convolution of the stacked frames
    ref      as conv3d, in any math dtype

Only "ref", "conv2d" and "conv3d" are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from skyreels_fast.ops import _causal_conv3d_kernels as kernels
from skyreels_fast.ops._dispatch import (
    check_no_grad,
    check_tensors,
    choose,
    math_dtype_of,
    needs_grad,
    without_autocast,
)
from skyreels_fast.ops.norm_silu import norm_silu, norm_silu_ref

BACKENDS = ("triton", "conv2d", "conv3d", "ref")
# By device. On an H200 a 540P decode in bfloat16 takes 1.06 s and 2.8 GiB with "triton", 1.13 s and 3.1 with "conv2d".
DEFAULT = {"cuda": "triton", "cpu": "conv2d"}


def causal_conv3d_ref(
    frames: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    math_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`causal_conv3d` in plain torch, computed in `math_dtype`."""
    x = torch.stack([frame.to(math_dtype) for frame in frames], dim=1).permute(0, 4, 1, 2, 3)
    bias = None if bias is None else bias.to(math_dtype)
    out = _convolve(functional.conv3d, x, weight[:, :, -len(frames) :].to(math_dtype), bias)
    out = out if residual is None else out + residual.to(math_dtype)
    if gamma is not None:
        out = norm_silu_ref(out, gamma, math_dtype=math_dtype)
    return out.to(frames[-1].dtype)


def causal_conv3d_cost(
    shape: tuple[int, int, int, int], weight_shape: tuple[int, ...], *, residual: bool = False, itemsize: int = 2
) -> tuple[int, int]:
    """(bytes moved, flops) of one call on frames of `shape` [B, H, W, C], all KT of them there."""
    pixels, channels = shape[0] * shape[1] * shape[2], shape[3]
    out_channels, _, taps_t, taps_h, taps_w = weight_shape
    taps = taps_t * taps_h * taps_w
    rows = channels * taps_t + out_channels * (1 + residual)
    return (pixels * rows + out_channels * channels * taps) * itemsize, 2 * pixels * out_channels * channels * taps


def _conv2d(frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    # [O, C, t, KH, KW] → [O, t·C, KH, KW], in memory [O, KH, KW, t·C]: what cuDNN reads best
    taps = weight[:, :, -len(frames) :].permute(0, 3, 4, 2, 1).flatten(3)
    # Tensor cores take whole eights of channels.
    missing = -taps.shape[-1] % 8 if weight.is_cuda else 0
    if missing:
        frames = [*frames, frames[0].new_zeros(*frames[0].shape[:3], missing)]
        taps = functional.pad(taps, (0, missing))
    x = torch.cat(list(frames), dim=-1) if len(frames) > 1 else frames[0]
    return _torch_convolution(functional.conv2d, x.permute(0, 3, 1, 2), taps.permute(0, 3, 1, 2), bias, residual)


def _conv3d(frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    x = torch.stack(list(frames), dim=1).permute(0, 4, 1, 2, 3)
    return _torch_convolution(functional.conv3d, x, weight[:, :, -len(frames) :], bias, residual)


def _convolve(convolution: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's convolution with one output frame [B, H, W, O], in the tensors' dtype: autocast would take its own."""
    padding = (0,) * (x.dim() - 4) + (weight.shape[-2] // 2, weight.shape[-1] // 2)
    with without_autocast(x):
        out = convolution(x, weight, bias, padding=padding)
    return (out[:, :, 0] if x.dim() == 5 else out).permute(0, 2, 3, 1)


def _torch_convolution(
    convolution: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`_convolve`, and one pass for what is added to it where a kernel can do that."""
    fused = x.dtype in kernels.DTYPES and kernels.present(x) and not needs_grad(x, weight, bias, residual)
    out = _convolve(convolution, x, weight, None if fused else bias)
    if fused:
        return kernels.add_in_place(out.contiguous(), bias, residual)
    return out if residual is None else out + residual


def _check(
    frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None
) -> None:
    name = "causal_conv3d"
    if weight.dim() != 5 or not weight.shape[3] % 2 or not weight.shape[4] % 2:
        raise ValueError(f"{name}: weight must be [O, C, KT, KH, KW] with odd KH and KW, not {list(weight.shape)}")
    if not 1 <= len(frames) <= weight.shape[2]:
        raise ValueError(f"{name}: frames must be 1 to KT = {weight.shape[2]} tensors, not {len(frames)}")
    shape = frames[0].shape
    if len(shape) != 4 or shape[3] != weight.shape[1] or any(frame.shape != shape for frame in frames):
        shapes = ", ".join(str(list(frame.shape)) for frame in frames)
        raise ValueError(f"{name}: frames must be [B, H, W, C] with C = {weight.shape[1]}, all alike, not {shapes}")
    for label, vector in (("bias", bias), ("gamma", gamma)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name}: {label} must be [O] = [{weight.shape[0]}], not {list(vector.shape)}")
    if residual is not None and residual.shape != (*shape[:3], weight.shape[0]):
        raise ValueError(f"{name}: residual must be {[*shape[:3], weight.shape[0]]}, not {list(residual.shape)}")
    named = {f"frames[{i}]": frame for i, frame in enumerate(frames)}
    named = {**named, "weight": weight, "bias": bias, "residual": residual, "gamma": gamma}
    dtypes = {str(tensor.dtype) for tensor in named.values() if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(f"{name}: all tensors must have one dtype, not {' and '.join(sorted(dtypes))}")
    check_tensors(name, **named)


def _choose(backend: str | None, x: Tensor, weight: Tensor, *others: Tensor | None) -> str:
    """`backend`, or the default, "conv2d" for what the kernel cannot do. Raises ValueError for one that cannot run."""
    name = "causal_conv3d"
    channels, count, taps = x.shape[-1], weight.shape[2], weight.shape[3] * weight.shape[4]
    fits = channels % kernels.CHANNEL_MULTIPLE == 0 and count <= kernels.MAX_FRAMES and taps <= kernels.MAX_TAPS
    usable = x.dtype in kernels.DTYPES and fits
    if backend is None:
        chosen = DEFAULT.get(x.device.type, "conv2d")
        half = x.dtype in (torch.float16, torch.bfloat16)  # float32 products would be slow there, or inexact
        possible = usable and half and kernels.has_room(x.device) and not needs_grad(x, weight, *others)
        return "conv2d" if chosen == "triton" and not possible else chosen
    choose(name, backend, x.device.type, BACKENDS)
    if backend == "triton" and not usable:
        raise ValueError(
            f"{name}: backend 'triton' takes float32, float16 and bfloat16, C in multiples of "
            f"{kernels.CHANNEL_MULTIPLE}, KT up to {kernels.MAX_FRAMES} and KH * KW up to {kernels.MAX_TAPS}, "
            f"not {x.dtype}, C = {channels}, KT = {count} and KH * KW = {taps}; use 'conv2d'"
        )
    if backend == "triton":
        check_no_grad(name, backend, x, weight, *others, instead="'conv2d'")
    return backend


def causal_conv3d(
    frames: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The convolution's output [B, H, W, O] at the newest of `frames`: 1 to KT of them [B, H, W, C], the oldest first.

    weight: [O, C, KT, KH, KW]; bias: [O]; residual: [B, H, W, O], added; gamma: [O], of `norm_silu` after that. Raises
    ValueError for shapes, dtypes or devices that do not fit, a dtype that is not one of float16, bfloat16, float32 and
    float64, or a backend that is not there or does not take them.
    """
    _check(frames, weight, bias, residual, gamma)
    backend = _choose(backend, frames[-1], weight, bias, residual, gamma, *frames)
    if backend == "triton":
        return kernels.causal_conv3d(list(frames), weight, bias, residual, gamma)
    if backend == "ref":
        math_dtype = math_dtype_of(weight)
        return causal_conv3d_ref(frames, weight, bias, residual, gamma, math_dtype=math_dtype)
    out = {"conv2d": _conv2d, "conv3d": _conv3d}[backend](frames, weight, bias, residual)
    return out if gamma is None else norm_silu(out, gamma)
