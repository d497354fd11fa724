"""What block-causal attention lets a model call leave out, read off the schedule. Plain Python.

A block of frames sees itself and the blocks before it. So what comes after the last block that a row advances has no
say in the row, and once all blocks up to one are finished, that one's keys and values stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

from .timesteps import Schedule


class Span(NamedTuple):
    """Frames of a row's interval, counted from its start: the call computes [start, stop) and has those before `start`
    from earlier calls; after it those before `fixed` need not be computed again."""

    start: int
    stop: int
    fixed: int


def whole_spans(schedule: Schedule) -> list[Span]:
    """Every row computes all of its interval."""
    return [Span(0, stop - start, 0) for start, stop in schedule.interval]


def causal_spans(schedule: Schedule, block: int, *, keep: bool, noised: int = 0) -> list[Span]:
    """The least that each row has to compute when `block` frames go together.

    keep: keys and values can be kept between rows. noised: given frames at the start that get new noise in each row.
    An interval that moves on starts with none kept, for the frames that left it have been seen by those that stay.
    """
    spans: list[Span] = []
    settled = _settled_from(schedule)
    for row, (first, last) in enumerate(schedule.interval):
        moved = row > 0 and schedule.interval[row - 1][0] != first
        start = 0 if moved or not spans else spans[-1].fixed
        updated = [column - first for column in range(first, last) if schedule.update[row][column]]
        stop = min((max(updated, default=0) // block + 1) * block, last - first)
        fixed = 0
        while (
            keep
            and fixed + block <= stop
            and _is_fixed(settled, range(first + fixed, first + fixed + block), row, noised)
        ):
            fixed += block
        spans.append(Span(start, max(stop, start), max(fixed, start)))
    return spans


def _settled_from(schedule: Schedule) -> list[int]:
    """The first row from which on each column keeps its timestep and is not updated."""
    rows = list(zip(schedule.timesteps, schedule.update, strict=True))
    settled = []
    for column in range(len(schedule.timesteps[0])):
        row = len(rows)
        while row > 0 and not rows[row - 1][1][column] and rows[row - 1][0][column] == rows[-1][0][column]:
            row -= 1
        settled.append(row)
    return settled


def _is_fixed(settled: list[int], columns: range, row: int, noised: int) -> bool:
    return columns.start >= noised and all(settled[column] <= row for column in columns)
