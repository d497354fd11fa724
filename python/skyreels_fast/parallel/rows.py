"""A video's frames shared out by rows, for the VAE: `vae.model.SharedRows`. Nothing is computed twice but one row at
either edge of a convolution's input, and the result is that of whole frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import slices
from .world import World, all_gather


class FrameRows:
    """Some rows of the frames in every process, from the top down by rank; latents have `height` rows.

    Frames of another size than the latents have as many times their rows in each process.
    """

    def __init__(self, world: World, height: int) -> None:
        self._rank, self._last, self._leads = world.rank, world.size - 1, world.leads
        self._spans = slices(height, world.size)
        self._lengths = [stop - start for start, stop in self._spans]

    def own(self, latents: Tensor) -> Tensor:
        """This process's rows of latents [B, 16, F, h, w], or of frames [..., H, W]."""
        scale = latents.shape[-2] // self._spans[-1][1]
        start, stop = self._spans[self._rank]
        return latents[..., start * scale : stop * scale, :]

    def widen(self, frame: Tensor) -> Tensor:
        """[B, h, W, C] with the neighbours' next rows, or zeros at the frame's edges: [B, h + 2, W, C]."""
        above, below = frame.new_zeros(2, *frame[:, :1].shape)
        exchanges = []
        for there, row, coming, rank in (
            (self._rank > 0, frame[:, :1], above, self._rank - 1),
            (self._rank < self._last, frame[:, -1:], below, self._rank + 1),
        ):
            if there:
                exchanges.append(dist.P2POp(dist.isend, row.contiguous(), rank))
                exchanges.append(dist.P2POp(dist.irecv, coming, rank))
        for work in dist.batch_isend_irecv(exchanges):
            work.wait()
        return torch.cat((above, frame, below), dim=1)

    def whole(self, frame: Tensor) -> Tensor:
        """[B, h, W, C] and all other rows, in every process: [B, H, W, C]."""
        sent, lengths = self._padded(frame, dim=1)
        got = sent.new_empty(len(lengths) * sent.shape[0], *sent.shape[1:])
        all_gather(got, sent)
        parts = got.unflatten(0, (len(lengths), -1))
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1)

    def collected(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Whole frames [B, C, H, W] on the leader, of every process's rows [B, C, h, W]; none on the others."""
        for frame in frames:
            sent, lengths = self._padded(frame, dim=2)
            parts = [torch.empty_like(sent) for _ in lengths] if self._leads else None
            dist.gather(sent, parts)
            if parts is not None:
                yield torch.cat([part[:, :, :length] for part, length in zip(parts, lengths, strict=True)], dim=2)

    def _padded(self, frame: Tensor, dim: int) -> tuple[Tensor, list[int]]:
        """`frame` with as many rows, in `dim`, as the process with most has; and how many each has."""
        scale = frame.shape[dim] // self._lengths[self._rank]
        lengths = [length * scale for length in self._lengths]
        missing = max(lengths) - frame.shape[dim]
        if not missing:
            return frame.contiguous(), lengths
        shape = list(frame.shape)
        shape[dim] = missing
        return torch.cat((frame, frame.new_zeros(shape)), dim=dim), lengths
