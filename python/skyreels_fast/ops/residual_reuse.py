"""What TeaCache does between steps: tell how far a tensor moved, keep what the blocks added, add it again.

    relative_l1(new, old)         = sum |new - old| / sum |old|     (a ratio of means; NaN or inf where old is 0)
    residual_save(after, before)  = after - before
    residual_add(x, residual)     = x + residual

Two tensors of one shape (any), dtype and device. Kernels take float32, float16 and bfloat16; the math and the sums are
float32 (float64 where the inputs are), rounded once. Sums are taken in a fixed order: a repeated call gives the same
bits. Nothing waits for the device. Not differentiable, except on the backend "ref", which is chosen where a gradient is
asked for and for what kernels do not take.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyreels_fast.ops._dispatch import check_tensors, choose_kernel, jit, math_dtype_of, tl, triton

BACKENDS = ("triton", "ref")
_BLOCK = 2048  # elements a Triton program takes at a time
_MAX_PARTIALS = 1024  # the last program of relative_l1 adds up to so many partial sums
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def residual_add_ref(x: Tensor, residual: Tensor, *, math_dtype: torch.dtype = torch.float32) -> Tensor:
    """`residual_add` in plain torch, computed in `math_dtype`."""
    return (x.to(math_dtype) + residual.to(math_dtype)).to(x.dtype)


def residual_save_ref(after: Tensor, before: Tensor, *, math_dtype: torch.dtype = torch.float32) -> Tensor:
    """`residual_save` in plain torch, computed in `math_dtype`."""
    return (after.to(math_dtype) - before.to(math_dtype)).to(after.dtype)


def relative_l1_ref(new: Tensor, old: Tensor, *, math_dtype: torch.dtype = torch.float32) -> Tensor:
    """`relative_l1` in plain torch, computed in `math_dtype`, which the result has."""
    new, old = new.to(math_dtype), old.to(math_dtype)
    return (new - old).abs().mean() / old.abs().mean()


def residual_add_cost(shape: tuple[int, ...], *, itemsize: int = 2) -> tuple[int, int]:
    """(bytes moved, flops) of one call on tensors of `shape`."""
    elements = math.prod(shape)
    return 3 * elements * itemsize, elements


residual_save_cost = residual_add_cost


def relative_l1_cost(shape: tuple[int, ...], *, itemsize: int = 4) -> tuple[int, int]:
    """(bytes moved, flops) of one call on tensors of `shape`: a difference and two sums an element."""
    elements = math.prod(shape)
    return 2 * elements * itemsize, 3 * elements


@jit
def _add_kernel(out, a, b, count, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    """out = a + SIGN * b"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    left = tl.load(a + at, inside).to(tl.float32)
    right = tl.load(b + at, inside).to(tl.float32)
    tl.store(out + at, (left + SIGN * right).to(out.dtype.element_ty), inside)


@jit
def _partial_sums_kernel(partials, new, old, count, BLOCK: tl.constexpr):
    """Each program adds up every so-many-th block: (sum |new - old|, sum |old|) to its row of partials."""
    program = tl.program_id(0)
    changed = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    for block in range(program, tl.cdiv(count, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        before = tl.load(old + at, inside, other=0.0).to(tl.float32)
        changed += tl.abs(tl.load(new + at, inside, other=0.0).to(tl.float32) - before)
        size += tl.abs(before)
    tl.store(partials + 2 * program, tl.sum(changed, 0))
    tl.store(partials + 2 * program + 1, tl.sum(size, 0))


@jit
def _ratio_kernel(out, partials, count, BLOCK: tl.constexpr):
    """One program: the ratio of the sums of the two columns of partials."""
    at = tl.arange(0, BLOCK)
    changed = tl.load(partials + 2 * at, at < count, other=0.0)
    size = tl.load(partials + 2 * at + 1, at < count, other=0.0)
    tl.store(out, tl.sum(changed, 0) / tl.sum(size, 0))


def _check(name: str, backend: str | None, **tensors: Tensor) -> str:
    (a_name, a), (b_name, b) = tensors.items()
    if a.shape != b.shape:
        raise ValueError(f"{name}: {a_name} {list(a.shape)} and {b_name} {list(b.shape)} must have one shape")
    if a.dtype != b.dtype:
        raise ValueError(f"{name}: {a_name} ({a.dtype}) and {b_name} ({b.dtype}) must have one dtype")
    check_tensors(name, **tensors)
    refusal = None if a.dtype in _KERNEL_DTYPES else f"float32, float16 and bfloat16, not {a.dtype}"
    return choose_kernel(name, backend, BACKENDS, refusal, a, b)


def _elementwise(sign: int, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if out.numel() > 0:
        with torch.cuda.device_of(out):
            _add_kernel[(triton.cdiv(a.numel(), _BLOCK),)](out, a, b, a.numel(), SIGN=sign, BLOCK=_BLOCK)
    return out


@torch.library.custom_op("skyreels_fast::residual_add", mutates_args=())
def _residual_add(x: Tensor, residual: Tensor) -> Tensor:
    return _elementwise(1, x, residual)


@torch.library.custom_op("skyreels_fast::residual_save", mutates_args=())
def _residual_save(after: Tensor, before: Tensor) -> Tensor:
    return _elementwise(-1, after, before)


@torch.library.custom_op("skyreels_fast::relative_l1", mutates_args=())
def _relative_l1(new: Tensor, old: Tensor) -> Tensor:
    new, old = new.contiguous(), old.contiguous()
    out = torch.empty((), dtype=torch.float32, device=new.device)
    programs = min(triton.cdiv(new.numel(), _BLOCK), _MAX_PARTIALS)
    partials = torch.empty((programs, 2), dtype=torch.float32, device=new.device)
    with torch.cuda.device_of(out):
        _partial_sums_kernel[(programs,)](partials, new, old, new.numel(), BLOCK=_BLOCK)
        _ratio_kernel[(1,)](out, partials, programs, BLOCK=_MAX_PARTIALS)
    return out


@_residual_add.register_fake
@_residual_save.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(a.shape, dtype=a.dtype, device=a.device)


@_relative_l1.register_fake
def _(new: Tensor, old: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=new.device)


def residual_add(x: Tensor, residual: Tensor, *, backend: str | None = None) -> Tensor:
    """x + residual, a new tensor. Both of one shape, floating dtype and device, which the result has; strides are free.

    Raises ValueError where they differ, for a dtype that is not one of float16, bfloat16, float32 and float64, or a
    backend that is not there or does not take them.
    """
    backend = _check("residual_add", backend, x=x, residual=residual)
    if backend == "ref":
        return residual_add_ref(x, residual, math_dtype=math_dtype_of(x))
    return _residual_add(x, residual)


def residual_save(after: Tensor, before: Tensor, *, backend: str | None = None) -> Tensor:
    """after - before, a new tensor: what `residual_add` adds again. Arguments and errors as there."""
    backend = _check("residual_save", backend, after=after, before=before)
    if backend == "ref":
        return residual_save_ref(after, before, math_dtype=math_dtype_of(after))
    return _residual_save(after, before)


def relative_l1(new: Tensor, old: Tensor, *, backend: str | None = None) -> Tensor:
    """sum |new - old| / sum |old| as a 0-dim float32 tensor on their device; reading it there and then is what waits.

    new, old: of one shape (not empty), floating dtype and device; strides are free. Raises ValueError as
    `residual_add` does, and for empty tensors.
    """
    backend = _check("relative_l1", backend, new=new, old=old)
    if new.numel() == 0:
        raise ValueError(f"relative_l1: new {list(new.shape)} is empty")
    if backend == "ref":
        return relative_l1_ref(new, old, math_dtype=math_dtype_of(new)).float()
    return _relative_l1(new, old)
