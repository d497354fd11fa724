"""LayerNorm with modulation, gate and residual: what stands between a block's matrix products.

    norm(x)     = (x - mean) / sqrt(variance + eps), over D, times weight plus bias when they are given
    y           = norm(x) * (1 + scale) + shift
    residual'   = (residual + gate * x) + addend

x, residual, addend: [B, L, D]; scale, shift, gate: [B, F, D], one row a latent frame: token l takes row l // (L // F),
so the modulation is never as long as the tokens. weight, bias: [D]. float16, bfloat16, float32 or float64, each tensor
its own; the math and every sum is float32 (float64 where x, residual or addend is), rounded once. Strides are free; a
tensor whose last dimension is not contiguous is copied. Kernels take the first three and D up to 8192, and give the
same bits each time. Not differentiable, except on the backend "ref".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from skyreels_fast.ops import _adaln_kernels as kernels
from skyreels_fast.ops._dispatch import check_tensors, choose_kernel, math_dtype_of

BACKENDS = ("triton", "ref")


def _modulate(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return x
    frames = x.unflatten(1, (scale.shape[1], -1))
    return (frames * (1 + scale.to(x.dtype)).unsqueeze(2) + shift.to(x.dtype).unsqueeze(2)).flatten(1, 2)


def _gated_sum(
    residual: Tensor | None, x: Tensor, gate: Tensor | None, addend: Tensor | None, math_dtype: torch.dtype
) -> Tensor:
    total = x.to(math_dtype)
    if gate is not None:
        frames = total.unflatten(1, (gate.shape[1], -1)) * gate.to(math_dtype).unsqueeze(2)
        total = frames.flatten(1, 2)
    for other in (residual, addend):
        if other is not None:
            total = total + other.to(math_dtype)
    return total


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is not None and bias is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_scale_shift_ref(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    math_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`norm_scale_shift` in plain torch, computed in `math_dtype`."""
    total = _gated_sum(residual, x, gate, None, math_dtype)
    return _modulate(_norm(total, weight, bias, eps), scale, shift).to(out_dtype or x.dtype)


def scale_residual_ref(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    addend: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    math_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`scale_residual` in plain torch, computed in `math_dtype`."""
    return _gated_sum(residual, x, gate, addend, math_dtype).to(out_dtype or residual.dtype)


def scale_residual_norm_scale_shift_ref(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    math_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`scale_residual_norm_scale_shift` in plain torch, computed in `math_dtype`."""
    total = _gated_sum(residual, x, gate, addend, math_dtype)
    y = _modulate(_norm(total, weight, bias, eps), scale, shift)
    return total.to(residual_dtype or residual.dtype), y.to(out_dtype or x.dtype)


def norm_scale_shift_cost(
    shape: tuple[int, int, int], frames: int, *, residual_bytes: int = 0, x_bytes: int = 2, out_bytes: int = 2
) -> tuple[int, int]:
    """(bytes moved, flops) of one call on x of `shape` [B, L, D] with float32 modulation of `frames` rows.

    residual_bytes: of an element of the residual, which comes with a gate; 0: there is none.
    """
    batch, tokens, dim = shape
    elements, gated = batch * tokens * dim, residual_bytes > 0
    moved = elements * (residual_bytes + x_bytes + out_bytes)
    return moved + (2 + gated) * batch * frames * dim * 4, (9 + 2 * gated) * elements


def scale_residual_cost(
    shape: tuple[int, int, int],
    frames: int,
    *,
    residual_bytes: int = 4,
    x_bytes: int = 2,
    addend_bytes: int = 0,
    out_bytes: int = 2,
) -> tuple[int, int]:
    """(bytes moved, flops) of one call on x of `shape` [B, L, D] with a float32 gate of `frames` rows.

    addend_bytes: of an element of the addend; 0: there is none.
    """
    batch, tokens, dim = shape
    elements = batch * tokens * dim
    moved = elements * (residual_bytes + x_bytes + addend_bytes + out_bytes)
    return moved + batch * frames * dim * 4, (2 + (addend_bytes > 0)) * elements


def scale_residual_norm_scale_shift_cost(
    shape: tuple[int, int, int],
    frames: int,
    *,
    residual_bytes: int = 4,
    x_bytes: int = 2,
    addend_bytes: int = 0,
    residual_out_bytes: int = 4,
    out_bytes: int = 2,
) -> tuple[int, int]:
    """(bytes moved, flops) of one call on x of `shape` [B, L, D] with float32 gate and modulation of `frames` rows.

    addend_bytes: of an element of the addend; 0: there is none.
    """
    batch, tokens, dim = shape
    elements = batch * tokens * dim
    moved = elements * (residual_bytes + x_bytes + addend_bytes + residual_out_bytes + out_bytes)
    return moved + 3 * batch * frames * dim * 4, (11 + (addend_bytes > 0)) * elements


def _choose(name: str, backend: str | None, named: dict[str, Tensor | None], results: dict[str, torch.dtype]) -> str:
    """`choose_kernel` of checked tensors, the first of which is [B, L, D]."""
    check_tensors(name, **named, **results)
    x, *_ = tensors = [tensor for tensor in named.values() if tensor is not None]
    dtypes = [*(tensor.dtype for tensor in tensors), *results.values()]
    refusal = None
    if wrong := [dtype for dtype in dtypes if dtype not in kernels.DTYPES]:
        refusal = f"float32, float16 and bfloat16, not {wrong[0]}"
    elif x.shape[-1] > kernels.MAX_DIM:
        refusal = f"D up to {kernels.MAX_DIM}, not {x.shape[-1]}"
    return choose_kernel(name, backend, BACKENDS, refusal, *tensors)


def _check_tokens(name: str, x: Tensor, **others: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be [B, L, D], not {list(x.shape)}")
    for label, other in others.items():
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name}: {label} {list(other.shape)} and x {list(x.shape)} must have one shape")


def _check_rows(name: str, x: Tensor, **rows: Tensor | None) -> None:
    batch, tokens, dim = x.shape
    for label, row in rows.items():
        if row is None:
            continue
        if row.dim() != 3 or row.shape[0] != batch or row.shape[2] != dim:
            raise ValueError(f"{name}: {label} must be [B, F, D] = [{batch}, F, {dim}], not {list(row.shape)}")
        if row.shape[1] == 0 or tokens % row.shape[1]:
            raise ValueError(f"{name}: {tokens} tokens do not split into the {row.shape[1]} frames of {label}")


def _check_norm(
    name: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    if (scale is None) != (shift is None):
        raise ValueError(f"{name}: scale and shift come together, {'scale' if scale is None else 'shift'} is None")
    if scale is not None and shift is not None and scale.shape != shift.shape:
        raise ValueError(f"{name}: scale {list(scale.shape)} and shift {list(shift.shape)} must have one shape")
    _check_rows(name, x, scale=scale, shift=shift)
    if (weight is None) != (bias is None):
        raise ValueError(f"{name}: weight and bias come together, {'weight' if weight is None else 'bias'} is None")
    for label, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[2:]:
            raise ValueError(f"{name}: {label} must be [D] = [{x.shape[2]}], not {list(vector.shape)}")


def norm_scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm of x [B, L, D] over D, then modulation by its frame's row of scale and shift [B, F, D].

    weight and bias [D] make the norm affine; scale and shift may be None together. With residual [B, L, D] or gate
    [B, F, D] it is the norm of residual + gate * x, a sum that is neither rounded nor written. Returns [B, L, D] in
    `out_dtype` (default: x's). Raises ValueError for shapes or devices that do not fit, a dtype that is not one of
    float16, bfloat16, float32 and float64, or a backend that is not there or does not take them.
    """
    name = "norm_scale_shift"
    _check_tokens(name, x, residual=residual)
    _check_rows(name, x, gate=gate)
    _check_norm(name, x, scale, shift, weight, bias)
    dtype = out_dtype or x.dtype
    named = {"x": x, "scale": scale, "shift": shift, "weight": weight, "bias": bias, "residual": residual, "gate": gate}
    backend = _choose(name, backend, named, {"out_dtype": dtype})
    if backend != "ref":
        return kernels.norm_scale_shift(**named, eps=eps, out_dtype=dtype)
    return norm_scale_shift_ref(**named, eps=eps, out_dtype=dtype, math_dtype=math_dtype_of(x, residual))


def scale_residual(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    addend: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + gate * x + addend for residual, x, addend [B, L, D] (None: 0) and gate [B, F, D] (None: 1).

    Returns [B, L, D] in `out_dtype` (default: residual's). Raises ValueError as `norm_scale_shift` does.
    """
    name = "scale_residual"
    _check_tokens(name, x, residual=residual, addend=addend)
    _check_rows(name, x, gate=gate)
    dtype = out_dtype or residual.dtype
    named = {"residual": residual, "x": x, "gate": gate, "addend": addend}
    backend = _choose(name, backend, named, {"out_dtype": dtype})
    if backend != "ref":
        return kernels.scale_residual(**named, out_dtype=dtype)
    return scale_residual_ref(**named, out_dtype=dtype, math_dtype=math_dtype_of(residual, x, addend))


def scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`scale_residual`, then `norm_scale_shift` of the sum before it is rounded: (residual', y), both [B, L, D].

    residual' has `residual_dtype` (default: residual's), y `out_dtype` (default: x's). Arguments and errors as there.
    """
    name = "scale_residual_norm_scale_shift"
    _check_tokens(name, x, residual=residual, addend=addend)
    _check_rows(name, x, gate=gate)
    _check_norm(name, x, scale, shift, weight, bias)
    results = {"residual_dtype": residual_dtype or residual.dtype, "out_dtype": out_dtype or x.dtype}
    modulation = {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    named = {"residual": residual, "x": x, "gate": gate, **modulation, "addend": addend}
    backend = _choose(name, backend, named, results)
    if backend != "ref":
        return kernels.scale_residual_norm_scale_shift(**named, eps=eps, **results)
    return scale_residual_norm_scale_shift_ref(
        **named, eps=eps, **results, math_dtype=math_dtype_of(residual, x, addend)
    )
