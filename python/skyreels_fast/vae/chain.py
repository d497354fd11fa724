"""Several processes for one VAE: each runs some consecutive layers on whole frames and hands them on to the next.

A frame meets the same kernels as in one process and has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .layers import Frames, Shape


class Stage(NamedTuple):
    """A layer, what it costs for a whole video, and the shape [T, B, H, W, C] of the frames that come out of it."""

    layer: nn.Module
    cost: int
    out_shape: Shape


class Chain(Protocol):
    """The processes, all of which make the same calls. leads: whether this is the one at the chain's end."""

    leads: bool

    def flow(self, stages: Sequence[Stage], frames: Frames, dtype: torch.dtype) -> Frames:
        """Frames [B, H, W, C] of `dtype` through the stages, of which this process runs its part as it is iterated.

        frames: are asked for in the process that runs the first stage alone.
        Returns what comes out of the last stage in the leader, and nothing in the others.
        """

    def first(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, called in the leader alone."""


def stages_of(layers: Iterable[nn.Module], shape: Shape) -> list[Stage]:
    """The layers, for frames of `shape` [T, B, H, W, C]."""
    stages = []
    for layer in layers:
        cost, shape = layer.cost(shape), layer.out_shape(shape)
        stages.append(Stage(layer, cost, shape))
    return stages
