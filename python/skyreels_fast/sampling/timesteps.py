"""Noise levels and the diffusion forcing schedule: which latent frame stands at which timestep in each model call.

Plain Python. A *row* is one model call (both guidance branches), a *column* one latent frame.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Training noise levels: sigma reaches 0.999, timesteps are thousandths of it.
_SIGMA_MAX = struct.unpack("f", struct.pack("f", 0.999))[0]  # the training table is float32
_TIMESTEPS = 1000
# Where a frame stands before its first step.
_WAITING = 999


@dataclass(frozen=True)
class Schedule:
    """The model calls of one window: tuples of rows, each a tuple of columns."""

    timesteps: tuple[tuple[int, ...], ...]  # 999 while a frame waits, 0 once it is finished or given
    index: tuple[tuple[int, ...], ...]  # 0 waiting, i the i-th of the N solver steps, N + 1 finished
    update: tuple[tuple[bool, ...], ...]  # the frame takes its solver step in this row
    interval: tuple[tuple[int, int], ...]  # first and last + 1 column that the model sees

    @property
    def steps(self) -> int:
        """N, the solver steps each generated frame takes."""
        # The frame that finishes last takes its N-th step in the last row; all others stand there or beyond.
        return min(self.index[-1])


def _float64_sigmas(steps: int, shift: float) -> list[float]:
    if steps < 1:
        raise ValueError(f"inference_steps={steps} is less than one step; give at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift} is not a positive number")
    sigmas = [_SIGMA_MAX - i * (_SIGMA_MAX / steps) for i in range(steps)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]


def sigma_schedule(steps: int, shift: float) -> list[float]:
    """N + 1 noise levels for N = steps, falling from just below 1 to 0; every one a float32 value.

    Evenly spaced from 0.999 to 0, then sigma → shift·sigma / (1 + (shift − 1)·sigma).
    Raises ValueError when steps < 1, or shift is not positive or so large that the first level rounds to 1.
    """
    sigmas = [*_float64_sigmas(steps, shift), 0.0]
    rounded = list(struct.unpack(f"{steps + 1}f", struct.pack(f"{steps + 1}f", *sigmas)))
    if rounded[0] >= 1:
        raise ValueError(f"shift={shift} leaves nothing but noise in the first step; give a smaller one (3 to 8)")
    return rounded


def timestep_schedule(steps: int, shift: float) -> list[int]:
    """N integer timesteps: 1000 times each level of `sigma_schedule` but the last, the fraction cut off."""
    return [int(sigma * _TIMESTEPS) for sigma in _float64_sigmas(steps, shift)]


def timestep_matrix(
    latents: int, timesteps: Sequence[int], *, base: int | None = None, ar_step: int = 0, ready: int = 0, block: int = 1
) -> Schedule:
    """Stagger the blocks of a window: each starts `ar_step` rows after the one before it; 0 is all together.

    latents: columns. timesteps: of the N solver steps. base: columns that one call sees (all by default); when fewer,
    the interval slides on as the block behind it starts. ready: given columns at the start, held in whole blocks
    (`hold` takes care of the rest). block: columns that go together.

    Raises ValueError when latents or base are not whole blocks, when nothing is left to generate, or when ar_step is
    so small that a block would have to start before the interval reaches it.
    """
    base = latents if base is None else min(base, latents)
    if latents % block or base % block or base < block:
        raise ValueError(
            f"{latents} latent frames, {base} at a time, are not whole blocks of causal_block_size={block}"
        )
    if ar_step < 0:
        raise ValueError(f"ar_step={ar_step} is negative; give 0 (synchronous) or more")
    if ready // block >= latents // block:
        raise ValueError(f"all of {latents} latent frames are given: nothing to generate")
    steps, base_blocks = len(timesteps), base // block
    if base < latents and ar_step * base_blocks < steps:
        raise ValueError(
            f"ar_step={ar_step} is too small for {base} of {latents} latent frames at a time: "
            f"give at least {-(-steps // base_blocks)}"
        )

    counters = _counters(latents // block, steps, ar_step, ready // block)
    template = (_WAITING, *timesteps, 0)
    rows, index, update, interval = [], [], [], []
    stop = base_blocks
    for before, after in zip(counters, counters[1:], strict=False):
        moves = [new != old and new <= steps for old, new in zip(before, after, strict=True)]
        if stop < len(after) and moves[stop]:
            stop += 1
        rows.append(_spread([template[counter] for counter in after], block))
        index.append(_spread(after, block))
        update.append(_spread(moves, block))
        interval.append((max(stop - base_blocks, 0) * block, stop * block))
    return Schedule(tuple(rows), tuple(index), tuple(update), tuple(interval))


def _counters(blocks: int, steps: int, ar_step: int, ready: int) -> list[list[int]]:
    """How far each block is: the state before the first row, then after each row's advance."""
    finished = steps + 1
    counters = [[finished] * ready + [0] * (blocks - ready)]
    while any(counter < steps for counter in counters[-1]):
        before, after = counters[-1], []
        for i, counter in enumerate(before):
            leads = i == 0 or before[i - 1] >= steps
            value = counter + 1 if leads else after[i - 1] - ar_step
            after.append(min(max(value, 0), finished))
        counters.append(after)
    return counters


def _spread(values: Sequence, block: int) -> tuple:
    return tuple(value for value in values for _ in range(block))


def hold(schedule: Schedule, prefix: int, end: bool) -> Schedule:
    """Hold given frames, whatever the block: the first `prefix` columns and, if `end`, a column appended for the end.

    Held columns stand at timestep 0, finished, and are never updated. The end column is in the interval of the rows
    that see the last generated frame. Raises ValueError when the prefix leaves no column to generate.
    """
    columns = len(schedule.index[0])
    if not 0 <= prefix < columns:
        raise ValueError(f"{prefix} given latent frames leave none of {columns} to generate")

    def held(rows: tuple[tuple, ...], value: int | bool) -> tuple[tuple, ...]:
        return tuple((value,) * prefix + row[prefix:] + (value,) * end for row in rows)

    schedule = replace(
        schedule,
        timesteps=held(schedule.timesteps, 0),
        index=held(schedule.index, schedule.steps + 1),
        update=held(schedule.update, False),
    )
    if not end:
        return schedule
    interval = tuple((start, stop + (stop == columns)) for start, stop in schedule.interval)
    return replace(schedule, interval=interval)
