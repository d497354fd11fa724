"""Ulysses (Jacobs et al., arXiv 2309.14509): some tokens of all heads become all tokens of some heads, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_fast.ops import query_rows

_WIDEST = torch.complex128


class Ulysses:
    """The exchanges within one group, in the tokens' own dtype.

    members: tokens of a frame that each of the group's processes has. place: this process's number among them.
    Tokens of the whole group stand frame by frame, or not `by_frame` member by member, as they come in.
    """

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int], place: int) -> None:
        self._group, self._members, self._own = group, list(members), members[place]

    def to_heads(self, x: Tensor, *, by_frame: bool) -> Callable[[], Tensor]:
        """Begin to exchange x [B, F * own, N, Dh]; what is returned waits for [B, F * sum(members), N / members, Dh].

        The exchange goes on beside whatever the device is given until then.
        """
        parts, rows = len(self._members), x.shape[1]
        frames = rows // self._own
        counts = [frames * length for length in self._members]
        sent = contiguous(x.unflatten(2, (parts, -1)).permute(2, 1, 0, 3, 4))
        got = sent.new_empty(query_rows(sum(counts)), *sent.shape[2:])[: sum(counts)]
        work = self._exchange(got, sent.flatten(0, 1), counts, [rows] * parts)

        def arrived() -> Tensor:
            work.wait()
            if not by_frame:
                return got.transpose(0, 1)
            members = [part.unflatten(0, (frames, -1)) for part in got.split(counts)]
            return torch.cat(members, dim=1).flatten(0, 1).transpose(0, 1)

        return arrived

    def to_tokens(self, out: Tensor, *, by_frame: bool) -> Tensor:
        """The way back: [B, F * sum(members), N / members, Dh] to [B, F * own, N, Dh]."""
        sent = out.transpose(0, 1)
        frames, parts = sent.shape[0] // sum(self._members), len(self._members)
        if by_frame:
            members = sent.unflatten(0, (frames, -1)).split(self._members, dim=1)
            sent = torch.cat([part.flatten(0, 1) for part in members])
        rows = frames * self._own
        got = sent.new_empty(parts * rows, *sent.shape[1:])
        counts = [frames * length for length in self._members]
        self._exchange(got, sent.contiguous(), [rows] * parts, counts).wait()
        return contiguous(got.unflatten(0, (parts, rows)).permute(2, 1, 0, 3, 4)).flatten(2, 3)

    def _exchange(self, got: Tensor, sent: Tensor, got_rows: list[int], sent_rows: list[int]) -> dist.Work:
        return dist.all_to_all_single(got, sent, got_rows, sent_rows, group=self._group, async_op=True)


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`, where it can in elements of 16 bytes: between strides torch copies one at a time."""
    ratio = _WIDEST.itemsize // x.itemsize
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or any(step % ratio for step in steps):
        return x.contiguous()
    return x.view(_WIDEST).contiguous().view(x.dtype)
