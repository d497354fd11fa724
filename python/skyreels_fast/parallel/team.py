"""Who does what in the denoising of one request: `sampling.team.Alone` for several processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from skyreels_fast.dit import Embedded

from .chain import Chain
from .layout import Layout, slices
from .sequence import SequenceAttention
from .world import World, all_gather

T = TypeVar("T")
Grid = tuple[int, int, int]


class Team:
    """All processes in one layout, for frames of `tokens_per_frame` tokens.

    chain: all processes, to share the VAE's layers; None for a single one.
    """

    def __init__(self, world: World, layout: Layout, tokens_per_frame: int, backend: str | None) -> None:
        self.world, self.layout, self.leads = world, layout, world.leads
        self._branch, self._place = divmod(world.rank, layout.sequence)
        self._slices = slices(tokens_per_frame, layout.sequence)
        self.token_range = self._slices[self._place]
        self.sequence = layout.sequence
        self.chain = Chain(world) if world.size > 1 else None
        groups = world.groups(layout)
        self._attention = partial(SequenceAttention, layout, groups, self._place, tokens_per_frame, backend)

    @property
    def attend(self) -> SequenceAttention:
        """Self-attention between this process's tokens and those of the others in its branch. It holds memory, so that
        each window asks for its own."""
        return self._attention()

    def first(self, make: Callable[[], T]) -> T:
        """See `World.first`."""
        return self.world.first(make)

    def agree(self, value: T) -> T:
        """The leader's value."""
        return self.world.agree(value)

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        return self.world.least(value)

    def branches(self, count: int) -> list[int]:
        """Which of `count` guidance branches this process computes."""
        return [self._branch] if self.layout.branches == count == 2 else list(range(count))

    def shard(self, embedded: Embedded) -> tuple[Embedded, Grid]:
        """This process's tokens, and the grid that they make up on their own."""
        start, stop = self.token_range
        frames = embedded.grid[0]
        x = embedded.x.unflatten(1, (frames, -1))[:, :, start:stop].flatten(1, 2)
        return embedded._replace(x=x), (frames, 1, stop - start)

    def whole(self, parts: list[Tensor], grid: Grid) -> list[Tensor]:
        """All branches' [B, 16, f, 2h, 2w] on every process, from its own branches' [B, 16, f, 2, 2 * own], in one
        exchange."""
        widest = 2 * max(stop - start for start, stop in self._slices)
        own = torch.stack(parts)
        sent = own.new_zeros(*own.shape[:-1], widest)
        sent[..., : own.shape[-1]] = own
        got = sent.new_empty(self.world.size * len(parts), *sent.shape[1:])
        all_gather(got, sent)
        # [ranks of a branch after one another, branches that each has] → branches, each a list of shards
        got = got.unflatten(0, (-1, self.sequence, len(parts))).transpose(1, 2).flatten(0, 1)
        return [self._joined(branch, grid) for branch in got]

    def _joined(self, shards: Tensor, grid: Grid) -> Tensor:
        rows = [shard[..., : 2 * (stop - start)] for shard, (start, stop) in zip(shards, self._slices, strict=True)]
        patches = torch.cat(rows, dim=-1).unflatten(-1, (*grid[1:], 2))  # [B, 16, f, 2, h, w, 2]
        return patches.transpose(3, 4).flatten(5, 6).flatten(3, 4)
