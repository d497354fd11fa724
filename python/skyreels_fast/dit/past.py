"""Keys and values that stay as they are while later frames are denoised: block-causal attention only looks back."""

from __future__ import annotations

import torch
from torch import Tensor


class Past:
    """The self-attention keys and values of a video's first frames, for every block of a DiT.

    What a frame's keys and values depend on are the frames it sees, so those of leading causal blocks are fixed once
    these blocks are finished. A call then computes the later frames alone, and `extend` gives them all keys.

    frames: how many are kept. max_frames: of the whole video, for which there is room.
    """

    def __init__(self, max_frames: int) -> None:
        self.frames, self.max_frames = 0, max_frames
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._per_frame = 0

    def extend(self, index: int, k: Tensor, v: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the kept frames, then k and v [B, L, N, Dh] of the `frames` after them, in DiT block
        `index`. Those of frames not yet kept are overwritten by the next call."""
        self._per_frame = k.shape[1] // frames
        if index not in self._kept:
            shape = (k.shape[0], self.max_frames * self._per_frame, *k.shape[2:])
            self._kept[index] = torch.empty(shape, dtype=k.dtype, device=k.device), v.new_empty(shape)
        start = self.frames * self._per_frame
        stop = start + k.shape[1]
        for kept, new in zip(self._kept[index], (k, v), strict=True):
            kept[:, start:stop] = new
        keys, values = self._kept[index]
        return keys[:, :stop], values[:, :stop]

    def keep(self, frames: int) -> None:
        """Have the first `frames` of the video fixed from now on; the last call computed those not kept before."""
        self.frames = max(self.frames, frames)

    @staticmethod
    def nbytes(blocks: int, tokens: int, dim: int, itemsize: int) -> int:
        """Bytes for `tokens` of one video in a DiT of so many blocks."""
        return 2 * blocks * tokens * dim * itemsize
