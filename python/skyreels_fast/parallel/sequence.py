"""Self-attention over shards: every process has, of every frame, its own slice of the h * w tokens.

Ulysses: exchanges give each process all tokens of its group for some of the heads, another brings the result back.
Ring: keys and values of the other groups' tokens pass by (`ring`). Slices may differ in length: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from skyreels_fast.ops import attention

from .layout import Layout, slices
from .ring import RingBuffers, ring_attention
from .ulysses import Ulysses
from .world import Groups


class SequenceAttention:
    """`ops.attention` of tokens that are spread over the processes of one guidance branch.

    Called with this process's q [B, F * own, N, Dh] and k, v [B, F' * own, N, Dh], tokens frame by frame, and
    `block_tokens` of all processes together; gives its [B, F * own, N, Dh].

    place: this process's number in its branch. backend: as of `ops.attention`. It has no gradient.
    """

    def __init__(self, layout: Layout, groups: Groups, place: int, tokens_per_frame: int, backend: str | None) -> None:
        self._tokens_per_frame, self._backend, self._ring = tokens_per_frame, backend, groups.ring
        own = [stop - start for start, stop in slices(tokens_per_frame, layout.sequence)]
        by_group = [own[i : i + layout.ulysses] for i in range(0, layout.sequence, layout.ulysses)]
        self._lengths = [sum(lengths) for lengths in by_group]
        self._ulysses = groups.ulysses and Ulysses(groups.ulysses, by_group[place // layout.ulysses])
        self._buffers = RingBuffers()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None) -> Tensor:
        return self.begin(q, k, block_tokens=block_tokens)(v)

    def begin(self, q: Tensor, k: Tensor, *, block_tokens: int | None = None) -> Callable[[Tensor], Tensor]:
        """The call as far as it goes without v: q and k are on their way. What is returned takes v and ends it."""
        block_frames = None if block_tokens is None else block_tokens // self._tokens_per_frame
        if self._ulysses is None:
            return partial(self._attend, q, k, block_frames=block_frames)
        # Dense attention does not ask for the order of tokens, so they stay in the order they came in.
        by_frame = block_frames is not None
        coming = [self._ulysses.to_heads(x, by_frame=by_frame) for x in (q, k)]

        def end(v: Tensor) -> Tensor:
            coming.append(self._ulysses.to_heads(v, by_frame=by_frame))
            # Each is let go of as it arrives: in another order it is a copy.
            out = self._attend(*[coming.pop(0)() for _ in range(3)], block_frames=block_frames)
            return self._ulysses.to_tokens(out, by_frame=by_frame)

        return end

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, block_frames: int | None) -> Tensor:
        if self._ring is None:
            block_tokens = None if block_frames is None else block_frames * self._lengths[0]
            return attention(q, k, v, block_tokens=block_tokens, backend=self._backend)
        ring = {"group": self._ring, "buffers": self._buffers, "backend": self._backend}
        return ring_attention(q, k, v, self._lengths, block_frames, **ring)
