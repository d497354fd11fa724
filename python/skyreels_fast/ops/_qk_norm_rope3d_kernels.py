"""The Triton kernels of `qk_norm_rope3d`, which states their contract.

A program takes a token of q or of k. Its N * Dh channels lie in two blocks that are powers of two, the second as short
as it can be (5120 = 4096 + 1024, 1536 = 1024 + 512), so that few lanes idle and every element is read once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from skyreels_fast.ops._dispatch import jit, tl

_THREAD_CHANNELS = 16  # of the first block: two words of 16 bytes on their way at a time
_MIN_WARPS = 4


@jit
def _place(channel, head_stride, HEAD: tl.constexpr):
    """Where a token's channels are; head_stride None: heads adjoin."""
    at = channel
    if head_stride is not None:
        at = channel // HEAD * tl.cast(head_stride, tl.int64) + channel % HEAD
    return at


@jit
def _load(row, head_stride, FIRST: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr):
    """Channels FIRST, FIRST + 1, ... of a token as float32, zeros past its end."""
    channel = FIRST + tl.arange(0, BLOCK)
    return tl.load(row + _place(channel, head_stride, HEAD), channel < DIM, other=0.0).to(tl.float32)


@jit
def _turn(x, table, frame_at, row_at, column_at, FIRST: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """x, its pairs turned by the angles whose (cos, sin) the table holds at `*_at` + pair, by the pair's axis."""
    ACROSS: tl.constexpr = HEAD // 6
    ALONG: tl.constexpr = HEAD // 2 - 2 * ACROSS
    # Heads of a power of two share one set of angles; in others each pair looks its own up.
    SPAN: tl.constexpr = HEAD if HEAD & (HEAD - 1) == 0 else BLOCK
    pair = (FIRST // 2 + tl.arange(0, SPAN // 2)) % (HEAD // 2)
    at = tl.where(pair < ALONG, frame_at, tl.where(pair < ALONG + ACROSS, row_at, column_at)) + pair
    cos = tl.load(table + 2 * at)[None, :]
    sin = tl.load(table + 2 * at + 1)[None, :]
    real, imaginary = tl.split(tl.reshape(x, (BLOCK // SPAN, SPAN // 2, 2)))
    turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(turned, (BLOCK,))


@jit
def _finish(
    out_row, out_head_stride, x, weight, table, frame_at, row_at, column_at,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Store the normed x times its weights, turned if there is a table, as channels FIRST, FIRST + 1, ..."""
    channel = FIRST + tl.arange(0, BLOCK)
    y = x * tl.load(weight + channel, channel < DIM, other=0.0).to(tl.float32)
    if table is not None:
        y = _turn(y, table, frame_at, row_at, column_at, FIRST, BLOCK, HEAD)
    tl.store(out_row + _place(channel, out_head_stride, HEAD), y.to(out_row.dtype.element_ty), channel < DIM)


@jit
def _token(
    out, x, weight, table, out_batch_stride, out_token_stride, out_head_stride, batch_stride, token_stride, head_stride,
    place, places, height, width, start, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Of the `places` tokens in a frame the one at `place`, in frame program_id(1) of batch row program_id(2)."""
    frame, frames = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    token = frame.to(tl.int64) * places + place
    row = x + batch * batch_stride + token * token_stride
    main = _load(row, head_stride, 0, MAIN, DIM, HEAD)
    total = tl.sum(main * main, 0)
    if TAIL:
        tail = _load(row, head_stride, MAIN, TAIL, DIM, HEAD)
        total += tl.sum(tail * tail, 0)
    mean_square = total * (1.0 / DIM) + eps
    scale = tl.rsqrt(mean_square)
    scale += 0.5 * scale * (1.0 - mean_square * scale * scale)  # rsqrt's last bits would be off for a whole token

    ACROSS: tl.constexpr = HEAD // 6
    ALONG: tl.constexpr = HEAD // 2 - 2 * ACROSS
    frame_at = frame * ALONG
    row_at = frames * ALONG + (start + place) // width * ACROSS - ALONG
    column_at = frames * ALONG + (height + (start + place) % width - 1) * ACROSS - ALONG
    out_row = out + batch * out_batch_stride + token * out_token_stride
    _finish(out_row, out_head_stride, main * scale, weight, table, frame_at, row_at, column_at, 0, MAIN, DIM, HEAD)
    if TAIL:
        _finish(
            out_row, out_head_stride, tail * scale, weight, table, frame_at, row_at, column_at, MAIN, TAIL, DIM, HEAD
        )


@jit
def _norm_kernel(
    out, x, weight, out_batch_stride, out_token_stride, out_head_stride, batch_stride, token_stride, head_stride, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    place, places = tl.program_id(0), tl.num_programs(0)
    _token(
        out, x, weight, None, out_batch_stride, out_token_stride, out_head_stride, batch_stride, token_stride,
        head_stride, place, places, 1, 1, 0, eps, DIM, HEAD, MAIN, TAIL,
    )  # fmt: skip


@jit
def _norm_rope_kernel(
    q_out, k_out, q, k, q_weight, k_weight, table, q_out_batch_stride, q_out_token_stride, q_out_head_stride,
    k_out_batch_stride, k_out_token_stride, k_out_head_stride, q_batch_stride, q_token_stride, q_head_stride,
    k_batch_stride, k_token_stride, k_head_stride, height, width, start, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Even programs take q, odd ones k: neighbours share their angles."""
    place, places = tl.program_id(0) // 2, tl.num_programs(0) // 2
    if tl.program_id(0) % 2 == 0:
        _token(
            q_out, q, q_weight, table, q_out_batch_stride, q_out_token_stride, q_out_head_stride,
            q_batch_stride, q_token_stride, q_head_stride, place, places, height, width, start, eps,
            DIM, HEAD, MAIN, TAIL,
        )  # fmt: skip
    else:
        _token(
            k_out, k, k_weight, table, k_out_batch_stride, k_out_token_stride, k_out_head_stride,
            k_batch_stride, k_token_stride, k_head_stride, place, places, height, width, start, eps,
            DIM, HEAD, MAIN, TAIL,
        )  # fmt: skip


def _blocks(x: Tensor) -> dict[str, int]:
    dim = x.shape[2] * x.shape[3]
    main = 1 << (dim.bit_length() - 1)
    tail = 1 << (dim - main - 1).bit_length() if dim > main else 0
    warps = max(main // (32 * _THREAD_CHANNELS), _MIN_WARPS)
    return {"DIM": dim, "HEAD": x.shape[3], "MAIN": main, "TAIL": tail, "num_warps": warps}


def _strides(x: Tensor) -> tuple[int, int, int | None]:
    batch, token, head, _ = x.stride()
    return batch, token, None if head == x.shape[3] or x.shape[2] == 1 else head


def norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out = qk_norm(x)."""
    kernel: Any = _norm_kernel
    kernel[(x.shape[1], 1, x.shape[0])](out, x, weight, *_strides(out), *_strides(x), eps, **_blocks(x))


def norm_rope(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    grid: tuple[int, int, int],
    token_range: tuple[int, int],
    eps: float,
) -> None:
    """q_out, k_out = qk_norm_rope3d(q, k), with the table of `qk_norm_rope3d._axis_table`."""
    frames, height, width = grid
    start, stop = token_range
    tensors = (q_out, k_out, q, k, q_weight, k_weight, table)
    kernel: Any = _norm_rope_kernel
    programs = (2 * (stop - start), frames, q.shape[0])
    strides = [stride for x in (q_out, k_out, q, k) for stride in _strides(x)]
    kernel[programs](*tensors, *strides, height, width, start, eps, **_blocks(q))
