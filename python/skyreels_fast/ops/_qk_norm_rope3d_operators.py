"""The torch operators of `qk_norm_rope3d`: they launch the kernels, of csrc/qk_norm_rope3d.cu and of Triton.

`qk_norm_rope3d` checks what they are called with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from skyreels_fast.ops import _qk_norm_rope3d_kernels as triton_kernels
from skyreels_fast.ops._dispatch import adjoining, current_stream, extension

Grid = tuple[int, int, int]

# Of both operators, in the order in which `_launch_rope` takes them.
_OPTIONS = (
    "Tensor q_weight, Tensor k_weight, SymInt[] grid, SymInt[] token_range, SymInt frame_offset, float theta, "
    "float eps, str backend"
)


# A table is kept beyond the call that makes it, and so must not lie in the memory of a CUDA graph.
_TAGS = {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def axis_angles(length: int, start: int, pairs: int, theta: float, device: torch.device) -> Tensor:
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    exponents = torch.arange(pairs, dtype=torch.float64, device=device) / max(pairs, 1)
    return torch.outer(positions, theta**-exponents)


def pairs_by_axis(head_dim: int) -> tuple[int, int, int]:
    across = head_dim // 6
    return head_dim // 2 - 2 * across, across, across


@lru_cache(maxsize=2)
def token_table(
    grid: Grid,
    token_range: tuple[int, int],
    frame_offset: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """cos and sin [L, Dh / 2] of every token's angles."""
    parts = pairs_by_axis(head_dim)
    frames, height, width = grid
    start, stop = token_range
    # Kept across calls, so it must not be an inference tensor: autograd could not save it later.
    with torch.inference_mode(False), torch.no_grad():
        f, h, w = (
            axis_angles(length, first, pairs, theta, device)
            for length, first, pairs in zip(grid, (frame_offset, 0, 0), parts, strict=True)
        )
        rows = torch.cat((h[:, None].expand(-1, width, -1), w.expand(height, -1, -1)), dim=-1)
        rows = rows.flatten(0, 1)[start:stop]
        angles = torch.cat((f[:, None].expand(-1, stop - start, -1), rows.expand(frames, -1, -1)), dim=-1)
        angles = angles.flatten(0, 1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=8)
def _axis_table(grid: Grid, frame_offset: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(cos, sin) of each frame's pairs, then each row's, then each column's: float32 [..., 2], for the kernels."""
    axes = zip(grid, (frame_offset, 0, 0), pairs_by_axis(head_dim), strict=True)
    # Made on the CPU: the copy is complete when it returns, so that any stream may read the table.
    cpu = torch.device("cpu")
    angles = torch.cat([axis_angles(length, first, n, theta, cpu).flatten() for length, first, n in axes])
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)


def is_expanded(x: Tensor) -> bool:
    """Whether several of its elements are one in memory, as `Tensor.expand` makes them."""
    return any(stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


def _are_apart(q: Tensor, k: Tensor) -> bool:
    """Whether no element of one is known to be, or may be, an element of the other. They have one shape."""
    if q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return True
    if q.stride() != k.stride():
        return False
    dims = sorted(((stride, size) for size, stride in zip(q.shape, q.stride(), strict=True) if size > 1), reverse=True)
    return not _is_sum(q.storage_offset() - k.storage_offset(), dims)


def _is_sum(distance: int, dims: list[tuple[int, int]]) -> bool:
    """Whether steps of these (stride, size) add up to the distance, fewer than `size` of each, in either direction."""
    if not dims:
        return distance == 0
    (stride, size), *rest = dims
    within = sum(each * (count - 1) for each, count in rest)
    first, last = -((within - distance) // stride), (within + distance) // stride
    steps = range(max(first, 1 - size), min(last, size - 1) + 1)
    return any(_is_sum(distance - step * stride, rest) for step in steps)


def _strides(x: Tensor) -> tuple[int, ...]:
    # The stride of a dimension of one says nothing, and would speak against 16-byte loads.
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def _weights(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Contiguous, all of one dtype: x's if they have it, else float32."""
    dtype = x.dtype if all(weight.dtype == x.dtype for weight in weights) else torch.float32
    return [weight.to(dtype).contiguous() for weight in weights]


def _dtype_code(x: Tensor) -> int:
    codes = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    return getattr(extension, codes[x.dtype])


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "skyreels_fast::qk_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, str backend) -> Tensor"
)
def qk_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    x, (weight,), out = adjoining(x), _weights(x, weight), _like(x)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):
        if backend == "cuda":
            pointers = [tensor.data_ptr() for tensor in (out, x, weight)]
            dtypes = (_dtype_code(x), _dtype_code(weight))
            extension.qk_norm(*pointers, tuple(x.shape), _strides(x), eps, *dtypes, current_stream(x))
        else:
            triton_kernels.norm(out, x, weight, eps)
    return out


@torch.library.custom_op(
    "skyreels_fast::qk_norm_rope3d",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, {_OPTIONS}) -> (Tensor, Tensor)",
    **_TAGS,
)
def qk_norm_rope3d(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    outs = _like(q), _like(k)
    _launch_rope(outs, q, k, *options)
    return outs


def _launch_rope(
    outs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    grid: list[int],
    token_range: list[int],
    frame_offset: int,
    theta: float,
    eps: float,
    backend: str,
) -> None:
    """outs: with adjoining channels; they may be q and k, for a token is read whole before any of it is written."""
    q, k, weights = adjoining(q), adjoining(k), _weights(q, q_weight, k_weight)
    if q.numel() == 0:
        return
    frames, height, width = grid
    table = _axis_table((frames, height, width), frame_offset, q.shape[3], theta, q.device)
    tensors = (*outs, q, k, *weights, table)
    with torch.cuda.device_of(q):
        if backend == "cuda":
            layout = (tuple(q.shape), *map(_strides, (*outs, q, k)), tuple(grid), tuple(token_range))
            dtypes = (_dtype_code(q), _dtype_code(weights[0]))
            pointers = [tensor.data_ptr() for tensor in tensors]
            extension.qk_norm_rope3d(*pointers, *layout, eps, *dtypes, current_stream(q))
        else:
            triton_kernels.norm_rope(*tensors, tuple(grid), tuple(token_range), eps)


@torch.library.custom_op(
    "skyreels_fast::qk_norm_rope3d_",
    mutates_args=("q", "k"),
    schema=f"(Tensor(a!) q, Tensor(b!) k, {_OPTIONS}) -> ()",
    **_TAGS,
)
def qk_norm_rope3d_(q: Tensor, k: Tensor, *options: Any) -> None:
    if q.stride(3) == k.stride(3) == 1 and _are_apart(q, k):  # channels adjoin, and nothing is written twice
        _launch_rope((q, k), q, k, *options)
    else:
        for tensor, out in zip((q, k), qk_norm_rope3d(q, k, *options), strict=True):
            tensor.copy_(out)


@torch.library.custom_op(
    "skyreels_fast::rope_table",
    mutates_args=(),
    schema="(SymInt[] grid, SymInt[] token_range, SymInt frame_offset, SymInt head_dim, float theta, Device device, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    **_TAGS,
)
def rope_table(grid: list[int], token_range: list[int], *options: Any) -> tuple[Tensor, Tensor]:
    """`token_table`, an operator so that what is compiled around it does not compute the angles for every element."""
    cos, sin = token_table(tuple(grid), tuple(token_range), *options)
    return cos.clone(), sin.clone()  # what an operator returns may be written to


@rope_table.register_fake
def _(grid: list[int], token_range: list[int], *options: Any) -> tuple[Tensor, Tensor]:
    _, head_dim, _, device, dtype = options
    cos = torch.empty(grid[0] * (token_range[1] - token_range[0]), head_dim // 2, dtype=dtype, device=device)
    return cos, torch.empty_like(cos)


@qk_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return _like(x)


@qk_norm_rope3d.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _like(q), _like(k)


@qk_norm_rope3d_.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> None:
    return None
