"""Attention to keys and values that pass by in a ring (Liu et al., arXiv 2310.01889): softmaxes over parts of the keys
are put together by their log-sum-exp, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_fast.ops import attention_with_lse, merge_attention
from skyreels_fast.ops.attention import causal_blocks

PartAttention = tuple[Tensor, Tensor]


class RingBuffers:
    """Memory for the keys and values in hand and for those that come after them, used again by every call.

    What NCCL has been given is not used again before the device is done with it, however far the host is ahead: tensors
    made in each call would pile up.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def pair(self, like: Tensor, elements: int) -> Tensor:
        """Two buffers [2, at least so many elements] of the dtype and on the device of `like`."""
        flat = self._flat
        if flat is None or flat.shape[1] < elements or (flat.dtype, flat.device) != (like.dtype, like.device):
            self._flat = flat = None  # gone before there is another
            self._flat = like.new_empty(2, elements)
        return self._flat


@torch.no_grad()
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    block_frames: int | None,
    *,
    group: dist.ProcessGroup,
    buffers: RingBuffers,
    backend: str | None = None,
) -> Tensor:
    """Attention of this process's q [B, F * own, N, Dh] to the k, v [B, F' * own, N, Dh] of the whole ring.

    lengths: tokens of a frame that each process has; tokens go frame by frame. block_frames: None, or how many frames
    see themselves and the earlier ones only; then q has the last of the frames of k and v.
    The next keys and values arrive before the ones in hand are attended to: a kernel of attention that keeps every
    multiprocessor until it ends, as FlashAttention 3's does, leaves the exchange none, or waits for those that an
    exchange begun first holds until the other device has come as far. It has no gradient.
    """
    place, size = dist.get_rank(group), dist.get_world_size(group)
    own = lengths[place]
    key_frames = k.shape[1] // own
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    shapes = [(2, k.shape[0], key_frames * length, *k.shape[2:]) for length in lengths]
    here, there = buffers.pair(k, max(map(prod, shapes)))
    held, result = _view(here, shapes[place]), None
    torch.stack((k, v), out=held)
    for step in range(size):
        source = (place - step) % size
        coming = _view(there, shapes[source - 1])
        if step + 1 < size:
            _pass_on(held, coming, place, size, group)
        part = _attend(q, held, own, lengths[source], block_frames, backend)
        if result is not None:
            part = merge_attention(*result, *part, out_dtype=q.dtype if step + 1 == size else sum_dtype)
        result = part
        held, here, there = coming, there, here
    return result[0]


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: prod(shape)].view(shape)


def _pass_on(held: Tensor, coming: Tensor, place: int, size: int, group: dist.ProcessGroup) -> None:
    """Send what is held to the process after, and receive what comes from the one before."""
    after, before = (dist.get_global_rank(group, (place + step) % size) for step in (1, -1))
    exchange = [dist.P2POp(dist.isend, held, after, group), dist.P2POp(dist.irecv, coming, before, group)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()


def _attend(
    q: Tensor, held: Tensor, own: int, length: int, block_frames: int | None, backend: str | None
) -> PartAttention:
    """(result, log-sum-exp) over the keys and values in hand, which have `length` tokens a frame where q has `own`."""
    k, v = held
    if block_frames is None:
        return attention_with_lse(q, k, v, backend=backend)
    query_frames, key_frames = q.shape[1] // own, k.shape[1] // length
    first = key_frames - query_frames
    parts = [
        attention_with_lse(
            q[:, (start - first) * own : (stop - first) * own],
            k[:, : stop * length],
            v[:, : stop * length],
            backend=backend,
        )
        for start, stop in causal_blocks(query_frames, key_frames, block_frames)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)
