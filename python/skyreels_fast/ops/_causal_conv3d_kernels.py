"""The kernels of `causal_conv3d`, which checks what they are called with.

The convolution is a matrix product with a row a pixel: for each tap, a column block of the newest frame's pixels or of
an older frame's, shifted by the tap, times that tap's weights. Frames lie wherever they were made: an older one is
found by its distance from the newest, in elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from skyreels_fast.ops._dispatch import available, jit, tl, triton
from skyreels_fast.ops.norm_silu import norm_silu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNEL_MULTIPLE = 16
MAX_FRAMES = 3
MAX_TAPS = 32  # in a frame, for each has a bit of an int32
_ADD_ROWS, _ADD_COLUMNS = 64, 64
_UNIT = 16  # elements; whole ones tell Triton that wide loads are aligned
_MOST_SHARED = 163840  # bytes
_MANY_PIXELS = 16384  # above, enough large blocks for any GPU


@jit
def _add(sums, bias, residual, row, rows, column, columns):
    """sums + bias + residual at these rows and columns."""
    if bias is not None:
        sums += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    return sums


@jit
def _store(out, sums, factor, gamma, row, rows, column, columns):
    """out = sums at these rows and columns; with gamma SiLU of sums * factor * gamma, factor one a row."""
    if gamma is not None:
        y = sums * factor[:, None] * tl.load(gamma + column, column < columns, other=0.0).to(tl.float32)[None, :]
        sums = y * tl.sigmoid(y)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


@jit
def _weights(at, column, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """A block of weights; no mask where the columns divide into blocks."""
    if COLUMNS % SPAN == 0:
        return tl.load(at)
    return tl.load(at, (column < COLUMNS)[None, :], other=0.0)


@partial(jit, do_not_specialize=["to_middle", "to_oldest", "first", "rows", "height", "width"])
def _convolution_kernel(
    out, newest, weight, bias, residual, gamma, to_middle: tl.int64, to_oldest: tl.int64, first, rows, height, width,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    CACHE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M pixels times HEAD + TAIL output channels, two powers of two: 96 = 64 + 32, 192 = 128 + 64.

    newest: a frame [rows, CHANNELS]; to_middle, to_oldest: how far the frames before it lie from it, in UNITs. weight:
    [COLUMNS, KT * KH * KW * CHANNELS]. first: the first of the KT frames that is there. A turn of the loop takes GROUP
    blocks of BLOCK_K channels of one tap: what it costs to find the tap is paid once for all of them. CACHE: ".ca"
    keeps pixels in the L1 cache for the neighbouring taps, "" passes it by. With gamma a program has all COLUMNS.
    """
    SPAN: tl.constexpr = HEAD + TAIL
    TURNS: tl.constexpr = CHANNELS // (GROUP * BLOCK_K)  # to a tap
    DEPTH: tl.constexpr = KT * KH * KW * CHANNELS
    tiles = tl.cdiv(COLUMNS, SPAN)
    program = tl.program_id(0)
    # The programs for one block of pixels follow each other, so that it is in the cache.
    row = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    line, across = row // width % height, row % width
    seen = tl.zeros((BLOCK_M,), tl.int32)  # a bit for each tap that lies inside the frame
    for spot in tl.static_range(KH * KW):
        y, x = line + (spot // KW - KH // 2), across + (spot % KW - KW // 2)
        inside = (row < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        seen |= inside.to(tl.int32) << spot
    k = tl.arange(0, BLOCK_K)
    pixel = newest + row.to(tl.int64)[:, None] * CHANNELS + k[None, :]
    head = program % tiles * SPAN + tl.arange(0, HEAD)
    head_weight = weight + head.to(tl.int64)[None, :] * DEPTH + k[:, None]
    head_sums = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL > 0:
        tail = program % tiles * SPAN + HEAD + tl.arange(0, TAIL)
        tail_weight = weight + tail.to(tl.int64)[None, :] * DEPTH + k[:, None]
        tail_sums = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for turn in range(first * (KH * KW * TURNS), KT * KH * KW * TURNS):
        frame = turn // (KH * KW * TURNS)
        tap = turn // TURNS % (KH * KW)
        shift = (tap // KW - KH // 2) * width + (tap % KW - KW // 2)
        distance = tl.where(frame == KT - 1, 0, tl.where(frame == KT - 2, to_middle, to_oldest))
        here = pixel + (distance * UNIT + shift * CHANNELS + turn % TURNS * (GROUP * BLOCK_K))
        there = ((seen >> tap) & 1 != 0)[:, None]
        for block in tl.static_range(GROUP):
            depth = turn * (GROUP * BLOCK_K) + block * BLOCK_K
            pixels = tl.load(here + block * BLOCK_K, there, other=0.0, cache_modifier=CACHE)
            taps = _weights(head_weight + depth, head, COLUMNS, SPAN)
            head_sums = tl.dot(pixels, taps, head_sums, input_precision=PRECISION)
            if TAIL > 0:
                taps = _weights(tail_weight + depth, tail, COLUMNS, SPAN)
                tail_sums = tl.dot(pixels, taps, tail_sums, input_precision=PRECISION)
    head_sums = _add(head_sums, bias, residual, row, rows, head, COLUMNS)
    squares = tl.sum(head_sums * head_sums, 1)
    if TAIL > 0:
        tail_sums = _add(tail_sums, bias, residual, row, rows, tail, COLUMNS)
        squares += tl.sum(tail_sums * tail_sums, 1)
    factor = tl.sqrt(COLUMNS * 1.0) / tl.maximum(tl.sqrt(squares), 1e-12)
    _store(out, head_sums, factor, gamma, row, rows, head, COLUMNS)
    if TAIL > 0:
        _store(out, tail_sums, factor, gamma, row, rows, tail, COLUMNS)


@jit
def _add_kernel(out, bias, residual, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out += bias + residual, ROWS rows and BLOCK columns a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    sums = tl.load(out + at, (row < rows)[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)
    sums = _add(sums, bias, residual, row, rows, column, columns)
    _store(out, sums, None, None, row, rows, column, columns)


def present(x: Tensor) -> bool:
    """Whether kernels run on x's device."""
    return "triton" in available(x.device.type)


@lru_cache
def has_room(device: torch.device) -> bool:
    """Whether the convolution runs on the device: Triton is there, and shared memory for the blocks of `blocks_of`."""
    if device.type != "cuda" or "triton" not in available("cuda"):
        return "triton" in available(device.type)
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= _MOST_SHARED


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def add_in_place(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """out + bias + residual, over out [..., O] itself, which is contiguous."""
    columns = out.shape[-1]
    rows = out.numel() // columns
    block = min(triton.next_power_of_2(columns), _ADD_COLUMNS)
    with torch.cuda.device_of(out):
        _add_kernel[(triton.cdiv(rows, _ADD_ROWS), triton.cdiv(columns, block))](
            out, _contiguous(bias), _contiguous(residual), rows, columns, ROWS=_ADD_ROWS, BLOCK=block
        )
    return out


def blocks_of(out_channels: int, channels: int, pixels: int) -> dict[str, int | str]:
    """Block sizes, warps and pipeline stages for a shape: the fastest of a sweep on an H200, in bfloat16 at 540P."""
    depth = next(size for size in (64, 32, 16) if channels % size == 0)
    if 128 < out_channels <= 192:
        head, tail = 128, 64
    else:
        head, tail = min(128, max(16, triton.next_power_of_2(out_channels))), 0
    few = pixels < _MANY_PIXELS and out_channels < 256
    return {
        "BLOCK_M": 64 if few else 128 if tail else 256,
        "HEAD": head,
        "TAIL": tail,
        "BLOCK_K": depth,
        "GROUP": 3 if channels == 96 else 1,
        "CACHE": "",
        "num_warps": 4 if few else 8,
        "num_stages": 3,
    }


def _whole_units_apart(frames: list[Tensor], unit: int) -> list[Tensor]:
    """The frames; where they do not lie whole `unit`s of bytes apart, those off a multiple of it are copied."""
    if len({frame.data_ptr() % unit for frame in frames}) == 1:
        return frames
    return [frame.clone() if frame.data_ptr() % unit else frame for frame in frames]


def launch(
    frames: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    blocks: dict[str, int | str],
) -> Tensor:
    """The convolution with the given block sizes, as `blocks_of` names them."""
    unit = _UNIT * frames[-1].itemsize
    *older, newest = _whole_units_apart([frame.contiguous() for frame in frames], unit)
    batch, height, width, channels = newest.shape
    out_channels, _, *taps = weight.shape
    out = torch.empty((batch, height, width, out_channels), dtype=newest.dtype, device=newest.device)
    if out.numel() == 0:
        return out
    matrix = weight.permute(0, 2, 3, 4, 1).contiguous()  # no copy in the order of channels_last_3d
    distances = [(frame.data_ptr() - newest.data_ptr()) // unit for frame in reversed(older)]
    rows = batch * height * width
    tiles = triton.cdiv(out_channels, blocks["HEAD"] + blocks["TAIL"])
    fused = tiles == 1
    with torch.cuda.device_of(newest):
        _convolution_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]) * tiles,)](
            out, newest, matrix, _contiguous(bias), _contiguous(residual), _contiguous(gamma) if fused else None,
            *(distances + [0, 0])[:2], taps[0] - len(frames), rows, height, width,
            KT=taps[0], KH=taps[1], KW=taps[2], CHANNELS=channels, COLUMNS=out_channels, UNIT=_UNIT,
            PRECISION="ieee" if newest.dtype == torch.float32 else "tf32", **blocks,
        )  # fmt: skip
    return out if fused or gamma is None else norm_silu(out, gamma, backend="triton")


@torch.library.custom_op("skyreels_fast::causal_conv3d", mutates_args=())
def causal_conv3d(
    frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None
) -> Tensor:
    shape = frames[-1].shape
    return launch(frames, weight, bias, residual, gamma, blocks_of(len(weight), shape[3], shape.numel() // shape[3]))


@causal_conv3d.register_fake
def _(frames, weight, bias, residual, gamma):
    return frames[-1].new_empty((*frames[-1].shape[:3], weight.shape[0]))
