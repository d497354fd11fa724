"""The kernel of `adaln`, in Triton; `adaln` checks what it is called with.

Tokens [B, L, D] are a matrix with a row a token, and gate, scale and shift [B, F, D] one with a row a frame: token t of
all B * L takes row t // (L // F) of all B * F. So one pass reads every input and writes every output once. A tensor
whose rows are not evenly spaced is copied first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyreels_fast.ops._dispatch import adjoining, jit, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 8192
# How the cache is to treat what is read once, what many tokens read, and what is written. Without a residual that gives
# 88 % of the rate of a copy at D = 5120 and 83 % without, with one it costs up to 6 %: a sweep on an H200.
_IN_ONE_GO = {"ONCE": "evict_first", "OFTEN": "evict_last", "STORE": ".cs"}
_WITH_RESIDUAL = dict.fromkeys(_IN_ONE_GO, "")


@jit
def _columns(SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """0 to SIZE, as Triton cannot see that more than WIDTH are neighbours: so many a thread loads at once."""
    columns = tl.arange(0, SIZE)
    return columns // WIDTH * WIDTH + columns % WIDTH


@jit
def _load(at, inside, POLICY: tl.constexpr):
    return tl.load(at, inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@jit
def _gated_sum(x, residual, addend, gate, columns, in_row, inside, ONCE: tl.constexpr, OFTEN: tl.constexpr):
    """residual + gate * x + addend at these columns: gate points at the one row of all tokens, the others at each's."""
    total = _load(x + columns, inside, ONCE)
    if residual is not None:
        residual_values = _load(residual + columns, inside, ONCE)
    if addend is not None:
        addend_values = _load(addend + columns, inside, ONCE)
    if gate is not None:
        # One operation, which the compiler cannot join with the next: the sum has one value wherever it is used.
        base = residual_values if residual is not None else tl.zeros_like(total)
        total = tl.fma(total, _load(gate + columns, in_row, OFTEN), base)
    elif residual is not None:
        total += residual_values
    if addend is not None:
        total += addend_values
    return total


@jit
def _factor_and_offset(scale, shift, weight, bias, columns, in_row, OFTEN: tl.constexpr):
    """norm * factor + offset is (norm * weight + bias) * (1 + scale) + shift, by what is not None."""
    if weight is not None:
        factor = _load(weight + columns, in_row, OFTEN)
        offset = _load(bias + columns, in_row, OFTEN)
    if scale is not None:
        by = 1.0 + _load(scale + columns, in_row, OFTEN)
        plus = _load(shift + columns, in_row, OFTEN)
        if weight is not None:
            factor *= by
            offset = offset * by + plus
        else:
            factor = by
            offset = plus
    elif weight is None:
        factor = tl.full(columns.shape, 1.0, tl.float32)
        offset = tl.full(columns.shape, 0.0, tl.float32)
    return factor, offset


@jit
def _row_sums(head, tail, ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[ROWS, 1]: a thread first adds up all that it holds of a row, so that threads meet once."""
    if TAIL > 0:
        head = tl.sum(tl.reshape(head, (ROWS, HEAD // TAIL, TAIL)), 1) + tail
    return tl.sum(head, 1)[:, None]


@jit
def _adaln_kernel(
    residual_out, out, x, residual, addend, gate, scale, shift, weight, bias,
    x_stride, residual_stride, addend_stride, gate_stride, scale_stride, shift_stride,
    span, programs, gate_spans, scale_spans, dim, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr,
    EVEN: tl.constexpr, FULL: tl.constexpr, EARLY: tl.constexpr,
    ONCE: tl.constexpr, OFTEN: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program takes ROWS neighbouring tokens, and their one row of gate, scale and shift; what is None is left out.

    span: as many neighbours share those rows, `programs` take them (EVEN: with ROWS each), and gate_spans and
    scale_spans of them a row of gate and scale. Triton's blocks are powers of two, and one block over D = 5120 would
    idle three eighths of its 8192 lanes. So a row is two of them, the largest that fits and one for what is left,
    5120 = 4096 + 1024 and 1536 = 1024 + 512; FULL where those are D. Both stay in registers from load to store.
    """
    group = tl.program_id(0) // programs
    in_span = (tl.program_id(0) - group * programs) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    is_token = (row >= 0) if EVEN else (row < span - in_span)
    token = (group * span + in_span).to(tl.int64) + row
    x += token * x_stride
    if residual is not None:
        residual += token * residual_stride
    if addend is not None:
        addend += token * addend_stride
    if gate is not None:
        gate += (group // gate_spans).to(tl.int64) * gate_stride
    if scale is not None:
        frame = (group // scale_spans).to(tl.int64)
        scale += frame * scale_stride
        shift += frame * shift_stride

    head = _columns(HEAD, WIDTH)[None, :]
    in_head = head >= 0
    head_values = _gated_sum(x, residual, addend, gate, head, in_head, is_token & in_head, ONCE, OFTEN)
    tail_values = None
    if TAIL > 0:
        tail = HEAD + _columns(TAIL, WIDTH)[None, :]
        in_tail = (tail >= 0) if FULL else (tail < dim)
        tail_values = _gated_sum(x, residual, addend, gate, tail, in_tail, is_token & in_tail, ONCE, OFTEN)
    if EARLY and out is not None:
        head_factor, head_offset = _factor_and_offset(scale, shift, weight, bias, head, in_head, OFTEN)
        if TAIL > 0:
            tail_factor, tail_offset = _factor_and_offset(scale, shift, weight, bias, tail, in_tail, OFTEN)
    if residual_out is not None:
        residual_out += token * dim
        tl.store(residual_out + head, head_values.to(residual_out.dtype.element_ty), is_token & in_head)
        if TAIL > 0:
            tl.store(residual_out + tail, tail_values.to(residual_out.dtype.element_ty), is_token & in_tail)
    if out is not None:
        out += token * dim
        mean = _row_sums(head_values, tail_values, ROWS, HEAD, TAIL) / dim
        head_values -= mean
        head_squares = head_values * head_values
        tail_squares = None
        if TAIL > 0:
            tail_values = tl.where(in_tail, tail_values - mean, 0.0)
            tail_squares = tail_values * tail_values
        by = tl.rsqrt(_row_sums(head_squares, tail_squares, ROWS, HEAD, TAIL) / dim + eps)
        if not EARLY:
            head_factor, head_offset = _factor_and_offset(scale, shift, weight, bias, head, in_head, OFTEN)
            if TAIL > 0:
                tail_factor, tail_offset = _factor_and_offset(scale, shift, weight, bias, tail, in_tail, OFTEN)
        y = head_values * by * head_factor + head_offset
        tl.store(out + head, y.to(out.dtype.element_ty), is_token & in_head, cache_modifier=STORE)
        if TAIL > 0:
            y = tail_values * by * tail_factor + tail_offset
            tl.store(out + tail, y.to(out.dtype.element_ty), is_token & in_tail, cache_modifier=STORE)


def _matrix(tensor: Tensor) -> Tensor:
    """[..., D] as [rows, D], its rows contiguous."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return adjoining(matrix)


def _launch_triton(
    x: Tensor,
    *,
    residual_out: Tensor | None = None,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    addend: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float,
) -> None:
    tokens, dim = x.shape
    head = 1 << dim.bit_length() - 1
    tail = triton.next_power_of_2(dim - head) if dim > head else 0
    strides = [0 if tensor is None else tensor.stride(0) for tensor in (x, residual, addend, gate, scale, shift)]
    spans = [tokens if tensor is None else tokens // tensor.shape[0] for tensor in (gate, scale)]
    span = math.gcd(*spans)
    rows, warps, width, early = _tuning(head, norm=out is not None, total=residual is not None)
    rows = min(rows, triton.next_power_of_2(span))
    programs = triton.cdiv(span, rows)
    _adaln_kernel[(tokens // span * programs,)](
        residual_out, out, x, residual, addend, gate, scale, shift, weight, bias,
        *strides, span, programs, *(each // span for each in spans), dim, eps,
        ROWS=rows, HEAD=head, TAIL=tail, WIDTH=width, EARLY=early, EVEN=span % rows == 0, FULL=head + tail == dim,
        **(_IN_ONE_GO if residual is None else _WITH_RESIDUAL), num_warps=warps,
    )  # fmt: skip


def _tuning(head: int, *, norm: bool, total: bool) -> tuple[int, int, int, bool]:
    """Tokens and warps of a program, elements to a load, and whether scale and shift are loaded before the sums.

    Four elements to a load give every dtype, and head and tail, one layout: nothing changes threads but in the sums.
    Without a norm a thread has 8 elements of a token or 10. With one it has more, so that few warps meet: two tokens,
    of 24 elements at D = 1536 and 40 at 5120. `total`: whether the norm is of a sum with a residual. The fastest of a
    sweep on an H200.
    """
    if not norm:
        return 1, max(1, min(head // 256, 8)), 4, False
    if total:
        return 2, max(1, min(head // 512, 2), head // 1024), 4, False
    return 2, max(1, min(head // 256, 4), head // 1024), 4, head <= 1024


def _launch(x: Tensor, tensors: dict[str, Tensor | None], eps: float = 0.0) -> None:
    if x.numel() == 0:
        return
    matrices = {label: None if t is None else _matrix(t) for label, t in {"x": x, **tensors}.items()}
    with torch.cuda.device_of(x):
        _launch_triton(**matrices, eps=eps)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op(
    "skyreels_fast::norm_scale_shift",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate, "
    "float eps, ScalarType out_dtype) -> Tensor",
)
def norm_scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    out = _like(x, out_dtype)
    tensors = {"out": out, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    _launch(x, tensors | {"residual": residual, "gate": gate}, eps)
    return out


@norm_scale_shift.register_fake
def _(x, scale, shift, weight, bias, residual, gate, eps, out_dtype):
    return _like(x, out_dtype)


@torch.library.custom_op(
    "skyreels_fast::scale_residual",
    mutates_args=(),
    schema="(Tensor residual, Tensor x, Tensor? gate, Tensor? addend, ScalarType out_dtype) -> Tensor",
)
def scale_residual(
    residual: Tensor, x: Tensor, gate: Tensor | None, addend: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    out = _like(x, out_dtype)
    _launch(x, {"residual_out": out, "residual": residual, "gate": gate, "addend": addend})
    return out


@scale_residual.register_fake
def _(residual, x, gate, addend, out_dtype):
    return _like(x, out_dtype)


@torch.library.custom_op(
    "skyreels_fast::scale_residual_norm_scale_shift",
    mutates_args=(),
    schema="(Tensor residual, Tensor x, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "Tensor? addend, float eps, ScalarType residual_dtype, ScalarType out_dtype) -> (Tensor, Tensor)",
)
def scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    residual_out, out = _like(x, residual_dtype), _like(x, out_dtype)
    tensors = {"residual_out": residual_out, "out": out, "residual": residual, "addend": addend, "gate": gate}
    tensors |= {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    _launch(x, tensors, eps)
    return residual_out, out


@scale_residual_norm_scale_shift.register_fake
def _(residual, x, gate, scale, shift, weight, bias, addend, eps, residual_dtype, out_dtype):
    return _like(x, residual_dtype), _like(x, out_dtype)
