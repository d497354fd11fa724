"""A VAE's layers shared out over the processes of the leader's host: `vae.Chain`.

The last rank there runs the first layers, rank 0, the leader, the last ones, and the dearest part is as cheap as can
be. A frame is on its way to the next process while the one after it is made. It goes from one fixed buffer into
another: memory that NCCL has been given is not used again before the device is done with it, however far the host is
ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .layout import cut
from .world import World

T = TypeVar("T")
Frames = Iterator[Tensor]


class Stage(Protocol):
    """As `vae.chain.Stage`."""

    layer: Any
    cost: int
    out_shape: Sequence[int]


class Chain:
    """The processes of `world` on the leader's host; the others do nothing, nor do more than there are layers."""

    def __init__(self, world: World) -> None:
        self._world, self.leads = world, world.leads

    def first(self, make: Callable[[], T]) -> T:
        """See `World.first`."""
        return self._world.first(make)

    def flow(self, stages: Sequence[Stage], frames: Frames, dtype: torch.dtype) -> Frames:
        """See `vae.Chain.flow`."""
        parts = cut([stage.cost for stage in stages], self._world.neighbours)
        part = len(parts) - 1 - self._world.rank
        if part < 0:
            return iter(())
        start, stop = parts[part]
        if part > 0:
            frames = self._received(stages[start - 1].out_shape, dtype)
        for stage in stages[start:stop]:
            frames = stage.layer.flow(frames)
        return frames if self.leads else self._handed_on(frames)

    def _received(self, shape: Sequence[int], dtype: torch.dtype) -> Frames:
        """The frames, `shape` [T, B, H, W, C] in all, that the process before hands on."""
        count, source = shape[0], self._world.rank + 1
        buffer = torch.empty(shape[1:], dtype=dtype, device=self._world.device)
        coming = self._world.receive(buffer, source) if count else None
        for left in reversed(range(count)):
            coming.wait()
            frame = [buffer.clone()]
            if left:
                coming = self._world.receive(buffer, source)
            yield frame.pop()  # held by no name while it is worked on

    def _handed_on(self, frames: Frames) -> Frames:
        """Nothing: the frames go to the process after."""
        buffer = going = None
        for frame in frames:
            if going is None:
                buffer = torch.empty_like(frame, memory_format=torch.contiguous_format)
            else:
                going.wait()
            buffer.copy_(frame)
            del frame
            going = self._world.send(buffer, self._world.rank - 1)
        if going is not None:
            going.wait()
            if buffer.is_cuda:  # this process may end with its part, and must not before the frame is gone
                torch.cuda.current_stream(buffer.device).synchronize()
        yield from ()
