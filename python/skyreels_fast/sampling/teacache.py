"""TeaCache: leave the blocks out of a model call where the time embedding says that little would change.

The time embedding depends on the timesteps alone, so the calls that run the blocks are chosen for a whole window
before it starts, from one read of the device. Off by default: it changes the result. (Liu et al., arXiv 2411.19108)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skyreels_fast.ops.residual_reuse import relative_l1, residual_add, residual_save

_FIRST_ROWS = 1
_FIRST_ROWS_RET = 5


@dataclass(frozen=True)
class TeaCacheSettings:
    """When to reuse: see `plan`. Raises ValueError for coefficients or a threshold that are no finite numbers."""

    coefficients: Sequence[float]  # of the polynomial, highest power first
    threshold: float
    use_ret_steps: bool = False

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise ValueError("TeaCache coefficients are empty; give at least one, highest power first")
        if not all(math.isfinite(value) for value in self.coefficients):
            raise ValueError(f"TeaCache coefficients {tuple(self.coefficients)} are not all finite numbers")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"teacache_thresh={self.threshold} is not a finite number of at least 0")


def plan(
    signals: Iterable[Tensor],
    coefficients: Sequence[float],
    threshold: float,
    use_ret_steps: bool,
    *,
    forced: Collection[int] = (),
) -> list[bool]:
    """Which rows of a window run the blocks; the others add the last residual. Waits for the device once.

    signals: of each row in turn, float32: the embedding e, or with `use_ret_steps` the modulation e0.
    A row's change is the polynomial of the relative L1 distance of its signal from the row before. Changes add up, and
    the row on which the sum reaches `threshold` runs the blocks and starts again from 0. The first row (with
    `use_ret_steps` the first 5; without it the last one too) and the rows in `forced` always run them, as does a row
    whose signal has another shape than the one before.
    """
    distances: list[Tensor | None] = []
    previous = None
    for signal in signals:
        comparable = previous is not None and previous.shape == signal.shape
        distances.append(relative_l1(signal, previous) if comparable else None)
        previous = signal
    measured = [distance for distance in distances if distance is not None]
    values = iter(torch.stack(measured).tolist() if measured else [])

    rows = len(distances)
    retained = {*range(_FIRST_ROWS_RET if use_ret_steps else _FIRST_ROWS), *forced}
    if not use_ret_steps:
        retained.add(rows - 1)
    computed, total = [], 0.0
    for row, distance in enumerate(distances):
        change = math.inf if distance is None else _polynomial(coefficients, next(values))
        total += change
        computed.append(row in retained or not total < threshold)  # a NaN computes
        if computed[-1]:
            total = 0.0
    return computed


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


class Residual:
    """What the blocks added to the tokens in the last computed call: one a guidance branch, for one window."""

    def __init__(self) -> None:
        self._residual: Tensor | None = None

    def save(self, before: Tensor, after: Tensor) -> None:
        """Keep the residual of a call: tokens [B,L,D] before and after the blocks."""
        self._residual = residual_save(after, before)

    def added_to(self, x: Tensor, *, keep: bool) -> Tensor:
        """Tokens [B,L,D] after the blocks, these left out: x plus the residual. keep: a later call needs it again."""
        after = residual_add(x, self._residual)
        if not keep:
            self.forget()
        return after

    def forget(self) -> None:
        self._residual = None
