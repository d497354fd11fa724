"""The kernels of `adaln`: one for Triton, here, and that of csrc/adaln.cu; `adaln` checks what they are called with.

Tokens [B, L, D] are a matrix with a row a token, and gate, scale and shift [B, F, D] one with a row a frame: token t of
all B * L takes row t // (L // F) of all B * F. So one pass reads every input and writes every output once. A tensor
whose rows are not evenly spaced is copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyreels_fast.ops._dispatch import current_stream, extension, jit, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 8192


@jit
def _columns(SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """0 to SIZE, as Triton cannot see that more than WIDTH are neighbours: so many a thread loads at once."""
    columns = tl.arange(0, SIZE)
    return columns // WIDTH * WIDTH + columns % WIDTH


@jit
def _load(row, columns, inside):
    return tl.load(row + columns, inside, other=0.0).to(tl.float32)


@jit
def _total(residual_out, x, residual, gate, columns, inside):
    """residual + gate * x at these columns, stored if wanted."""
    # Read once: what is evicted first leaves the cache to the rows that many tokens read.
    total = tl.load(x + columns, inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if gate is not None:
        total *= _load(gate, columns, inside)
    if residual is not None:
        total += tl.load(residual + columns, inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if residual_out is not None:
        tl.store(residual_out + columns, total.to(residual_out.dtype.element_ty), inside)
    return total


@jit
def _modulate(out, normal, scale, shift, weight, bias, columns, inside):
    """out = (normal * weight + bias) * (1 + scale) + shift at these columns."""
    if weight is not None:
        normal = normal * _load(weight, columns, inside) + _load(bias, columns, inside)
    if scale is not None:
        normal = normal * (1.0 + _load(scale, columns, inside)) + _load(shift, columns, inside)
    tl.store(out + columns, normal.to(out.dtype.element_ty), inside)


@jit
def _adaln_kernel(
    residual_out, out, x, residual, gate, scale, shift, weight, bias,
    x_stride, residual_stride, gate_stride, scale_stride, shift_stride, gate_span, scale_span, dim, eps,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a token; what is None is left out.

    Triton's blocks are powers of two, and one block over D = 5120 would idle three eighths of its 8192 lanes. So a row
    is two of them, the largest that fits and one for what is left: 5120 = 4096 + 1024, 1536 = 1024 + 512. Both stay in
    registers from the load to the store.
    """
    number = tl.program_id(0)
    token = number.to(tl.int64)
    x += token * x_stride
    if residual is not None:
        residual += token * residual_stride
    if gate is not None:
        gate += (number // gate_span).to(tl.int64) * gate_stride
    if residual_out is not None:
        residual_out += token * dim
    head = _columns(HEAD, WIDTH)
    in_head = head < dim
    head_values = _total(residual_out, x, residual, gate, head, in_head)
    if TAIL > 0:
        tail = HEAD + _columns(TAIL, WIDTH)
        in_tail = tail < dim
        tail_values = _total(residual_out, x, residual, gate, tail, in_tail)
    if out is not None:
        out += token * dim
        if scale is not None:
            frame = (number // scale_span).to(tl.int64)
            scale += frame * scale_stride
            shift += frame * shift_stride
        total = tl.sum(head_values, 0)
        if TAIL > 0:
            total += tl.sum(tail_values, 0)
        mean = total / dim
        head_values -= mean
        squares = tl.sum(head_values * head_values, 0)
        if TAIL > 0:
            tail_values = tl.where(in_tail, tail_values - mean, 0.0)
            squares += tl.sum(tail_values * tail_values, 0)
        factor = tl.rsqrt(squares / dim + eps)
        _modulate(out, head_values * factor, scale, shift, weight, bias, head, in_head)
        if TAIL > 0:
            _modulate(out, tail_values * factor, scale, shift, weight, bias, tail, in_tail)


def _matrix(tensor: Tensor) -> Tensor:
    """[..., D] as [rows, D], its rows contiguous."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _launch_triton(
    x: Tensor,
    *,
    residual_out: Tensor | None = None,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float,
) -> None:
    tokens, dim = x.shape
    head = 1 << dim.bit_length() - 1
    strides = [0 if tensor is None else tensor.stride(0) for tensor in (x, residual, gate, scale, shift)]
    spans = [1 if tensor is None else tokens // tensor.shape[0] for tensor in (gate, scale)]
    warps, width = _tuning(head, norm=out is not None, total=residual is not None)
    _adaln_kernel[(tokens,)](
        residual_out, out, x, residual, gate, scale, shift, weight, bias, *strides, *spans, dim, eps,
        HEAD=head, TAIL=triton.next_power_of_2(dim - head) if dim > head else 0, WIDTH=width, num_warps=warps,
    )  # fmt: skip


def _tuning(head: int, *, norm: bool, total: bool) -> tuple[int, int]:
    """Warps of a Triton program and elements to a load: what was fastest on an H200 at D of 1536 and 5120.

    A thread has 8 elements, and many more where a norm's sums would meet in too many warps.
    """
    most = 16 if not norm else 4 if total else 2
    return max(1, min(head // 256, most)), 8 if total else 4


def _launch_cuda(x: Tensor, eps: float, **others: Tensor | None) -> None:
    codes = dict(zip(DTYPES, (extension.FLOAT32, extension.FLOAT16, extension.BFLOAT16), strict=True))
    # Only x and out are long: the rest is float32, and kept until the launch.
    floats = {label: t if t is None or label == "out" else t.float() for label, t in others.items()}
    rows = {
        label: None if t is None else extension.Rows(t.data_ptr(), codes[t.dtype], t.shape[0], t.stride(0))
        for label, t in {"x": x, **floats}.items()
    }
    extension.norm_scale_shift(**rows, dim=x.shape[-1], eps=eps, stream=current_stream(x))


def _launch(backend: str, x: Tensor, tensors: dict[str, Tensor | None], eps: float = 0.0) -> None:
    if x.numel() == 0:
        return
    matrices = {label: None if t is None else _matrix(t) for label, t in {"x": x, **tensors}.items()}
    with torch.cuda.device_of(x):
        (_launch_cuda if backend == "cuda" else _launch_triton)(**matrices, eps=eps)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op(
    "skyreels_fast::norm_scale_shift",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype, "
    "str backend) -> Tensor",
)
def norm_scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    out = _like(x, out_dtype)
    tensors = {"out": out, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    _launch(backend, x, tensors, eps)
    return out


@norm_scale_shift.register_fake
def _(x, scale, shift, weight, bias, eps, out_dtype, backend):
    return _like(x, out_dtype)


@torch.library.custom_op(
    "skyreels_fast::scale_residual",
    mutates_args=(),
    schema="(Tensor residual, Tensor x, Tensor? gate, ScalarType out_dtype, str backend) -> Tensor",
)
def scale_residual(residual: Tensor, x: Tensor, gate: Tensor | None, out_dtype: torch.dtype, backend: str) -> Tensor:
    out = _like(x, out_dtype)
    _launch(backend, x, {"residual_out": out, "residual": residual, "gate": gate})
    return out


@scale_residual.register_fake
def _(residual, x, gate, out_dtype, backend):
    return _like(x, out_dtype)


@torch.library.custom_op(
    "skyreels_fast::scale_residual_norm_scale_shift",
    mutates_args=(),
    schema="(Tensor residual, Tensor x, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "float eps, ScalarType residual_dtype, ScalarType out_dtype, str backend) -> (Tensor, Tensor)",
)
def scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    residual_out, out = _like(x, residual_dtype), _like(x, out_dtype)
    tensors = {"residual_out": residual_out, "out": out, "residual": residual, "gate": gate}
    tensors |= {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    _launch(backend, x, tensors, eps)
    return residual_out, out


@scale_residual_norm_scale_shift.register_fake
def _(residual, x, gate, scale, shift, weight, bias, eps, residual_dtype, out_dtype, backend):
    return _like(x, residual_dtype), _like(x, out_dtype)
