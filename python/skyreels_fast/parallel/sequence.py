"""Self-attention over shards: every process has, of every frame, its own slice of the h * w tokens.

Ulysses: one exchange gives each process all tokens of its group for some of the heads, another brings the result back.
Ring: keys and values of the other groups' tokens pass by (`ring`). Slices may differ in length: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_fast.ops import attention

from .layout import Layout, slices
from .ring import RingBuffers, ring_attention
from .world import Groups


class SequenceAttention:
    """`ops.attention` of tokens that are spread over the processes of one guidance branch.

    Called with this process's q [B, F * own, N, Dh] and k, v [B, F' * own, N, Dh], tokens frame by frame, and
    `block_tokens` of all processes together; gives its [B, F * own, N, Dh].

    place: this process's number in its branch. backend: as of `ops.attention`.
    """

    def __init__(self, layout: Layout, groups: Groups, place: int, tokens_per_frame: int, backend: str | None) -> None:
        self._tokens_per_frame, self._backend, self._groups = tokens_per_frame, backend, groups
        lengths = [stop - start for start, stop in slices(tokens_per_frame, layout.sequence)]
        self._own = lengths[place]
        self._members = [lengths[i : i + layout.ulysses] for i in range(0, layout.sequence, layout.ulysses)]
        self._ring_place, self._ulysses_place = divmod(place, layout.ulysses)
        self._buffers = RingBuffers()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None) -> Tensor:
        block_frames = None if block_tokens is None else block_tokens // self._tokens_per_frame
        if self._groups.ulysses is None:
            return self._attend(q, k, v, block_frames)
        members, group = self._members[self._ring_place], self._groups.ulysses
        # Dense attention does not ask for the order of tokens, so they stay in the order they came in.
        by_frame = block_frames is not None
        if q.shape == k.shape:
            q, k, v = to_heads((q, k, v), members, self._own, group, by_frame=by_frame)
        else:
            (q,) = to_heads((q,), members, self._own, group, by_frame=by_frame)
            k, v = to_heads((k, v), members, self._own, group, by_frame=by_frame)
        out = self._attend(q, k, v, block_frames)
        return to_tokens(out, members, self._ulysses_place, group, by_frame=by_frame)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, block_frames: int | None) -> Tensor:
        lengths = [sum(members) for members in self._members]
        if self._groups.ring is None:
            block_tokens = None if block_frames is None else block_frames * lengths[0]
            return attention(q, k, v, block_tokens=block_tokens, backend=self._backend)
        ring = {"group": self._groups.ring, "buffers": self._buffers, "backend": self._backend}
        return ring_attention(q, k, v, lengths, block_frames, **ring)


def to_heads(
    tensors: Sequence[Tensor], members: Sequence[int], own: int, group: dist.ProcessGroup, *, by_frame: bool
) -> list[Tensor]:
    """Own tokens of all heads → the group's tokens of some heads, in one exchange.

    tensors: each [B, F * own, N, Dh]. members: tokens of a frame that each of the group's processes has.
    Returns as many [B, F * sum(members), N / len(members), Dh], frame by frame, or not `by_frame` member by member.
    """
    batch, rows, heads, head_dim = tensors[0].shape
    frames, parts, count = rows // own, len(members), len(tensors)
    sent = tensors[0].new_empty(parts, rows, count, batch, heads // parts, head_dim)
    for i, tensor in enumerate(tensors):
        sent[:, :, i] = tensor.unflatten(2, (parts, -1)).permute(2, 1, 0, 3, 4)
    counts = [frames * length for length in members]
    got = sent.new_empty(sum(counts), *sent.shape[2:])
    dist.all_to_all_single(got, sent.flatten(0, 1), counts, [rows] * parts, group=group)
    # Attention is faster on tensors of their own than on slices of a common one.
    return [_in_order(part, counts, frames if by_frame else None).transpose(0, 1) for part in got.unbind(1)]


def _in_order(tokens: Tensor, counts: Sequence[int], frames: int | None) -> Tensor:
    """Tokens [L, …] that stand member by member, so many of each, frame by frame; with None as they stand."""
    if frames is None:
        return tokens.contiguous()
    return torch.cat([part.unflatten(0, (frames, -1)) for part in tokens.split(counts)], dim=1).flatten(0, 1)


def to_tokens(out: Tensor, members: Sequence[int], place: int, group: dist.ProcessGroup, *, by_frame: bool) -> Tensor:
    """The way back of `to_heads`: the group's tokens of some heads → own tokens of all heads, [B, F * own, N, Dh]."""
    sent = out.transpose(0, 1)
    frames, parts = sent.shape[0] // sum(members), len(members)
    if by_frame:
        by_member = sent.unflatten(0, (frames, -1)).split(list(members), dim=1)
        sent = torch.cat([part.flatten(0, 1) for part in by_member])
    rows = frames * members[place]
    got = sent.new_empty(parts * rows, *sent.shape[1:])
    dist.all_to_all_single(got, sent.contiguous(), [rows] * parts, [frames * length for length in members], group=group)
    return got.unflatten(0, (parts, rows)).permute(2, 1, 0, 3, 4).flatten(2, 3)
