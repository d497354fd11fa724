"""Ulysses (Jacobs et al., arXiv 2309.14509): some tokens of all heads become all tokens of some heads, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from skyreels_fast.ops import query_rows

_WIDEST = torch.complex128  # 16 bytes, which are only moved


class Ulysses:
    """The exchanges within one group, in the tokens' own dtype.

    lengths: tokens of a frame that each of the group's processes has. The whole group's tokens stand frame by frame,
    or where not `by_frame` process by process, as they come in.
    """

    def __init__(self, group: dist.ProcessGroup, lengths: Sequence[int]) -> None:
        self._group, self._lengths, self._own = group, list(lengths), lengths[dist.get_rank(group)]

    def to_heads(self, x: Tensor, *, by_frame: bool) -> Callable[[], Tensor]:
        """Begin to exchange x [B, F * own, N, Dh]; what is returned waits for [B, F * all, N / size, Dh].

        The exchange goes on beside whatever the device is given until then, which must leave x as it is.
        """
        size, rows = len(self._lengths), x.shape[1]
        frames = rows // self._own
        counts = [frames * length for length in self._lengths]
        sent = contiguous(x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4))
        # With room behind, in case these are queries.
        got = sent.new_empty(query_rows(sum(counts)), *sent.shape[2:])[: sum(counts)]
        wait = self._exchange(got, sent.flatten(0, 1), counts, [rows] * size)

        def arrived() -> Tensor:
            wait()
            if not by_frame:
                return got.transpose(0, 1)
            by_process = [tokens.unflatten(0, (frames, -1)) for tokens in got.split(counts)]
            return torch.cat(by_process, dim=1).flatten(0, 1).transpose(0, 1)

        return arrived

    def to_tokens(self, out: Tensor, *, by_frame: bool) -> Tensor:
        """The way back: [B, F * all, N / size, Dh] to [B, F * own, N, Dh]."""
        sent = out.transpose(0, 1)
        frames, size = sent.shape[0] // sum(self._lengths), len(self._lengths)
        if by_frame:
            by_process = sent.unflatten(0, (frames, -1)).split(self._lengths, dim=1)
            sent = torch.cat([tokens.flatten(0, 1) for tokens in by_process])
        rows = frames * self._own
        got = sent.new_empty(size * rows, *sent.shape[1:])
        counts = [frames * length for length in self._lengths]
        self._exchange(got, contiguous(sent), [rows] * size, counts)()
        return contiguous(got.unflatten(0, (size, rows)).permute(2, 1, 0, 3, 4)).flatten(2, 3)

    def _exchange(self, got: Tensor, sent: Tensor, got_rows: list[int], sent_rows: list[int]) -> Callable[[], object]:
        """Begin an exchange; what is returned waits for it."""
        traced = torch.compiler.is_compiling()  # a graph holds exchanges that are waited for, and no others
        work = dist.all_to_all_single(got, sent, got_rows, sent_rows, group=self._group, async_op=not traced)
        return _nothing if traced else work.wait


def _nothing() -> None:
    pass


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`, where it can in elements of 16 bytes: between strides torch copies one at a time."""
    if torch.compiler.is_compiling():
        return x.contiguous()
    ratio = _WIDEST.itemsize // x.itemsize
    spans = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or any(span % ratio for span in spans):
        return x.contiguous()
    return x.view(_WIDEST).contiguous().view(x.dtype)
