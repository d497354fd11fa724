"""RMSNorm of queries and keys over all heads together, then rotary positions in time, height and width.

    norm(x)  = x / sqrt(mean(x^2) + eps) * weight, over the N * Dh channels of a token
    out_2j   = norm_2j cos a_j - norm_2j+1 sin a_j          (a head's Dh / 2 complex pairs, interleaved)
    out_2j+1 = norm_2j sin a_j + norm_2j+1 cos a_j

Of a head's d / 2 pairs the first d/2 - 2 (d/6) turn with the frame, then d/6 with the row, d/6 with the column (integer
division): a_j = position * theta^(-i / n) for pair i of the n in its part. Positions count from 0; frames from
`frame_offset`. q, k: [B, L, N, Dh], L = f * h * w tokens in (f, h, w) order; views of a fused QKV output are fine.
Angles are float64, norm and rotation float32 (float64 for float64 input); the result has the input's dtype.

Kernels take q and k in one launch, in float32, float16 and bfloat16, weights of any dtype, an even Dh up to 512, N * Dh
up to 8192: each element is read once, where it lies, and written once. They look up (cos, sin) in a table with a row
for each frame, row and column, made once for a grid. Not differentiable, except on the backend "ref", which is chosen
where a gradient is asked for and for what kernels do not take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from skyreels_fast.ops import _qk_norm_rope3d_operators as operators
from skyreels_fast.ops._dispatch import check_tensors, choose_kernel, math_dtype_of, needs_grad

Grid = tuple[int, int, int]

BACKENDS = ("cuda", "triton", "ref")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_CHANNELS, _MAX_HEAD_CHANNELS = 8192, 512


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)


def qk_norm_ref(x: Tensor, weight: Tensor, *, eps: float = 1e-6, math_dtype: torch.dtype = torch.float32) -> Tensor:
    """`qk_norm` in plain torch, computed and returned in `math_dtype`."""
    x = x.to(math_dtype)
    mean_square = x.square().mean(dim=(-2, -1), keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * weight.to(math_dtype).view(x.shape[-2:])


def qk_norm_rope3d_ref(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    grid: Grid,
    *,
    eps: float = 1e-6,
    frame_offset: int = 0,
    token_range: tuple[int, int] | None = None,
    theta: float = 10000.0,
    math_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope3d` in plain torch, computed in `math_dtype`; angles are float64 always."""
    token_range = token_range or (0, grid[1] * grid[2])
    make = operators.rope_table if torch.compiler.is_compiling() else operators.token_table
    cos, sin = make(grid, token_range, frame_offset, q.shape[-1], theta, q.device, math_dtype)
    q_out = _rotate(qk_norm_ref(q, q_weight, eps=eps, math_dtype=math_dtype), cos, sin)
    k_out = _rotate(qk_norm_ref(k, k_weight, eps=eps, math_dtype=math_dtype), cos, sin)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def qk_norm_cost(shape: tuple[int, int, int, int], *, itemsize: int = 2) -> tuple[int, int]:
    """(bytes moved, flops) of one call on x of `shape` [B, L, N, Dh]."""
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return 2 * elements * itemsize, 4 * elements


def qk_norm_rope3d_cost(shape: tuple[int, int, int, int], *, itemsize: int = 2) -> tuple[int, int]:
    """(bytes moved, flops) of one call on q and k of `shape` [B, L, N, Dh]; the angles are no traffic."""
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return 4 * elements * itemsize, 14 * elements


def _check_norm(name: str, label: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name}: {label} must be [B, L, N, Dh], not {list(x.shape)}")
    if weight.shape != (x.shape[2] * x.shape[3],):
        raise ValueError(
            f"{name}: the weight of {label} must be [N * Dh] = [{x.shape[2] * x.shape[3]}], not {list(weight.shape)}"
        )


def _integers(name: str, label: str, values: Any, names: str) -> tuple[int, ...]:
    """A tuple of as many integers as there are `names`."""
    count = names.count(",") + 1
    if (
        not isinstance(values, Sequence)
        or len(values) != count
        or not all(isinstance(n, SupportsIndex) for n in values)
    ):
        raise ValueError(f"{name}: {label} must be ({names}), {count} integers, not {values!r}")
    return tuple(values)


def _places(
    name: str, q: Tensor, k: Tensor, grid: Grid, token_range: tuple[int, int] | None
) -> tuple[Grid, tuple[int, int]]:
    """The grid, and which tokens of each frame q and k have, checked."""
    grid = _integers(name, "grid", grid, "f, h, w")
    if min(grid) < 1:
        raise ValueError(f"{name}: grid must be (f, h, w), each at least 1, not {grid}")
    if token_range is not None:
        token_range = _integers(name, "token_range", token_range, "start, stop")
    if q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            f"{name}: q {list(q.shape)} {q.dtype} and k {list(k.shape)} {k.dtype} must have one shape and dtype"
        )
    if q.shape[3] % 2:
        raise ValueError(f"{name}: a head of {q.shape[3]} channels has no complex pairs, the size must be even")
    start, stop = token_range or (0, grid[1] * grid[2])
    if not 0 <= start < stop <= grid[1] * grid[2]:
        raise ValueError(f"{name}: token_range {token_range} is not within a frame's {grid[1] * grid[2]} tokens")
    if q.shape[1] != grid[0] * (stop - start):
        raise ValueError(f"{name}: {q.shape[1]} tokens are not grid {grid}, {grid[0] * (stop - start)} tokens")
    return grid, (start, stop)


def _check_angles(name: str, frame_offset: Any, theta: Any) -> None:
    if not isinstance(frame_offset, SupportsIndex):
        raise ValueError(f"{name}: frame_offset must be an integer, not {frame_offset!r}")
    if not isinstance(theta, Real) or not 0 < theta < math.inf:
        raise ValueError(f"{name}: theta must be a positive number, not {theta!r}")


def _check_writable(name: str, q: Tensor, k: Tensor, *weights: Tensor) -> None:
    """Raises ValueError for what nothing may be written over."""
    if needs_grad(q, k, *weights):
        raise ValueError(f"{name}: has no gradient; use qk_norm_rope3d, or torch.no_grad()")
    if _share_memory(q, k):
        raise ValueError(f"{name}: q and k share memory")
    for label, x in (("q", q), ("k", k)):
        if operators.is_expanded(x):
            raise ValueError(f"{name}: {label} is expanded, elements of it are one in memory; use qk_norm_rope3d")


def _share_memory(q: Tensor, k: Tensor) -> bool:
    """Whether they are one tensor or begin at one address; fake tensors and those of a trace have none."""
    if q is k:
        return True
    if torch.compiler.is_compiling() or type(q) is not Tensor or type(k) is not Tensor:
        return False
    try:
        return q.data_ptr() == k.data_ptr() != 0
    except RuntimeError:  # within vmap and its kin
        return False


def _choose(name: str, backend: str | None, x: Tensor, *others: Tensor) -> str:
    heads, head_dim = x.shape[2:]
    fits = head_dim % 2 == 0 and 0 < head_dim <= _MAX_HEAD_CHANNELS and 0 < heads * head_dim <= _MAX_CHANNELS
    refusal = None
    if not fits or x.dtype not in _KERNEL_DTYPES:
        refusal = (
            f"float32, float16 and bfloat16, heads of an even size up to {_MAX_HEAD_CHANNELS} and up to "
            f"{_MAX_CHANNELS} channels, not {x.dtype} {list(x.shape)}"
        )
    return choose_kernel(name, backend, BACKENDS, refusal, x, *others)


def qk_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """RMSNorm of x [B, L, N, Dh] over all heads together, times weight [N * Dh]; shape and dtype of x.

    Raises ValueError for shapes or devices that do not fit, a dtype that is not one of float16, bfloat16, float32 and
    float64, or a backend that is not there or does not take them.
    """
    check_tensors("qk_norm", x=x, weight=weight)
    _check_norm("qk_norm", "x", x, weight)
    backend = _choose("qk_norm", backend, x, weight)
    if backend != "ref":
        return operators.qk_norm(x, weight, eps, backend)
    return qk_norm_ref(x, weight, eps=eps, math_dtype=math_dtype_of(x)).to(x.dtype)


def _norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    grid: Grid,
    *,
    in_place: bool,
    eps: float = 1e-6,
    frame_offset: int = 0,
    token_range: tuple[int, int] | None = None,
    theta: float = 10000.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    name = "qk_norm_rope3d_" if in_place else "qk_norm_rope3d"
    check_tensors(name, q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    _check_norm(name, "q", q, q_weight)
    _check_norm(name, "k", k, k_weight)
    grid, token_range = _places(name, q, k, grid, token_range)
    _check_angles(name, frame_offset, theta)
    theta = float(theta)
    if in_place:
        _check_writable(name, q, k, q_weight, k_weight)
    backend = _choose(name, backend, q, k, q_weight, k_weight)
    if backend != "ref":
        arguments = (q, k, q_weight, k_weight, grid, token_range, frame_offset, theta, eps, backend)
        if not in_place:
            return operators.qk_norm_rope3d(*arguments)
        operators.qk_norm_rope3d_(*arguments)
        return q, k
    places = {"frame_offset": frame_offset, "token_range": token_range, "theta": theta}
    math_dtype = math_dtype_of(q)
    outs = qk_norm_rope3d_ref(q, k, q_weight, k_weight, grid, eps=eps, math_dtype=math_dtype, **places)
    return (q.copy_(outs[0]), k.copy_(outs[1])) if in_place else outs


def qk_norm_rope3d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    grid: Grid,
    *,
    eps: float = 1e-6,
    frame_offset: int = 0,
    token_range: tuple[int, int] | None = None,
    theta: float = 10000.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads together, then 3D rotary positions, of q and k [B, L, N, Dh].

    q_weight, k_weight: [N * Dh]. grid: the (f, h, w) that L counts; `frame_offset` is the position of its first frame.
    With `token_range` (start, stop) the tokens are those of h * w alone in every frame, L = f * (stop - start): a
    shard's. Returns (q, k) of the given shape and dtype. Raises ValueError for shapes, dtypes or devices that do not
    fit, a dtype that is not one of float16, bfloat16, float32 and float64, or a backend that is not there or does not
    take them.
    """
    options = {"eps": eps, "frame_offset": frame_offset, "token_range": token_range, "theta": theta, "backend": backend}
    return _norm_rope(q, k, q_weight, k_weight, grid, in_place=False, **options)


def qk_norm_rope3d_(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, grid: Grid, **options: Any
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope3d`, with its options, written over q and k, which are returned: for inference.

    They may be views of one product: kernels take no memory of their own where channels adjoin. What q and k share is
    k's then. Raises ValueError as it does, where both begin at one address or one is expanded, and where a gradient is
    asked for.
    """
    return _norm_rope(q, k, q_weight, k_weight, grid, in_place=True, **options)
