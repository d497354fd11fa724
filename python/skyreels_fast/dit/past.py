"""Keys and values that stay as they are while later frames are denoised: block-causal attention only looks back."""

from __future__ import annotations

from torch import Tensor


class Past:
    """The self-attention keys and values of a video's first frames, for every block of a DiT.

    What a frame's keys and values depend on are the frames it sees, so those of leading causal blocks are fixed once
    these blocks are finished. A call then computes the later frames alone, and gets all keys from here.

    frames: how many are kept. max_frames: of the whole video, for which there is room.
    """

    def __init__(self, max_frames: int) -> None:
        self.frames, self.max_frames = 0, max_frames
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def keys(self, index: int, k: Tensor, frames: int) -> Tensor:
        """The keys of the kept frames, then k [B, L, N, Dh] of the `frames` after them, in DiT block `index`. Those of
        frames not yet kept are overwritten by the next call."""
        return self._extended(self._keys, index, k, frames)

    def values(self, index: int, v: Tensor, frames: int) -> Tensor:
        """As `keys`, of the values."""
        return self._extended(self._values, index, v, frames)

    def _extended(self, kept: dict[int, Tensor], index: int, new: Tensor, frames: int) -> Tensor:
        per_frame = new.shape[1] // frames
        if index not in kept:
            kept[index] = new.new_empty(new.shape[0], self.max_frames * per_frame, *new.shape[2:])
        start = self.frames * per_frame
        stop = start + new.shape[1]
        kept[index][:, start:stop] = new
        return kept[index][:, :stop]

    def keep(self, frames: int) -> None:
        """Have the first `frames` of the video fixed from now on; the last call computed those not kept before."""
        self.frames = max(self.frames, frames)

    @staticmethod
    def nbytes(blocks: int, tokens: int, dim: int, itemsize: int) -> int:
        """Bytes for `tokens` of one video in a DiT of so many blocks."""
        return 2 * blocks * tokens * dim * itemsize
