"""Noise levels and schedules against the golden tables, and what must hold for any schedule."""

from __future__ import annotations

import json

import pytest
from conftest import GOLDEN

from skyreels_fast.sampling.timesteps import Schedule, hold, sigma_schedule, timestep_matrix, timestep_schedule

TABLES = json.loads((GOLDEN / "schedule.json").read_text())


def _tuples(rows: list) -> tuple:
    return tuple(tuple(row) for row in rows)


@pytest.mark.parametrize("table", TABLES["timesteps"], ids=lambda t: f"{t['steps']}-{t['shift']}")
def test_levels_equal_the_golden_ones(table: dict) -> None:
    assert sigma_schedule(table["steps"], table["shift"]) == table["sigmas"]
    assert timestep_schedule(table["steps"], table["shift"]) == table["timesteps"]


@pytest.mark.parametrize("case", TABLES["matrices"], ids=lambda c: "-".join(str(v) for v in list(c.values())[:6]))
def test_matrices_equal_the_golden_ones(case: dict) -> None:
    schedule = timestep_matrix(
        case["frames"],
        timestep_schedule(case["steps"], case["shift"]),
        base=case["base"],
        ar_step=case["ar_step"],
        ready=case["ready"],
        block=case["block"],
    )
    assert schedule.timesteps == _tuples(case["matrix"])
    assert schedule.index == _tuples(case["index"])
    assert schedule.update == _tuples(case["update"])
    assert schedule.interval == _tuples(case["interval"])
    assert schedule.steps == case["steps"]


def _check_walks(schedule: Schedule, timesteps: list[int], held: set[int]) -> None:
    for column in range(len(schedule.index[0])):
        moves = [row for row, update in enumerate(schedule.update) if update[column]]
        if column in held:
            assert not moves
            assert {row[column] for row in schedule.timesteps} == {0}
            assert {row[column] for row in schedule.index} == {len(timesteps) + 1}
            continue
        assert [schedule.index[row][column] for row in moves] == list(range(1, len(timesteps) + 1))
        assert [schedule.timesteps[row][column] for row in moves] == timesteps
        assert all(start <= column < stop for start, stop in (schedule.interval[row] for row in moves))


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("ar_step", [0, 1, 4, 12, 30])
def test_every_frame_takes_every_step_once(block: int, ar_step: int) -> None:
    timesteps = timestep_schedule(9, 8.0)
    for prefix, end in [(0, False), (1, False), (4, True)]:
        schedule = timestep_matrix(6, timesteps, ar_step=ar_step, ready=prefix, block=block)
        rows = 9 + (6 // block - prefix // block - 1) * min(ar_step, 9)
        assert len(schedule.timesteps) == rows
        schedule = hold(schedule, prefix, end)
        assert schedule.steps == 9
        assert {len(row) for row in schedule.timesteps} == {6 + end}
        _check_walks(schedule, timesteps, {*range(prefix), *([6] if end else [])})


def test_sliding_interval_reaches_every_step() -> None:
    timesteps = timestep_schedule(8, 8.0)
    schedule = hold(timestep_matrix(12, timesteps, base=4, ar_step=4, block=2), 1, end=True)
    assert {stop - start for start, stop in schedule.interval[:-8]} == {4}
    assert schedule.interval[-1] == (8, 13)
    _check_walks(schedule, timesteps, {0, 12})


def test_hold_changes_nothing_without_given_frames() -> None:
    schedule = timestep_matrix(4, [999, 500], ar_step=1)
    assert hold(schedule, 0, end=False) == schedule


def test_bad_schedules_are_refused() -> None:
    timesteps = timestep_schedule(30, 8.0)
    with pytest.raises(ValueError, match="at least 15"):
        timestep_matrix(15, timesteps, base=10, ar_step=14, block=5)
    with pytest.raises(ValueError, match="at least 5"):
        timestep_matrix(31, timesteps, base=6)
    with pytest.raises(ValueError, match="causal_block_size=4"):
        timestep_matrix(6, timesteps, block=4)
    with pytest.raises(ValueError, match="ar_step=-1"):
        timestep_matrix(6, timesteps, ar_step=-1)
    with pytest.raises(ValueError, match="nothing to generate"):
        timestep_matrix(6, timesteps, ready=6)
    with pytest.raises(ValueError, match="6 given"):
        hold(timestep_matrix(6, timesteps), 6, end=False)


def test_bad_levels_are_refused() -> None:
    for function in (sigma_schedule, timestep_schedule):
        with pytest.raises(ValueError, match="inference_steps=0"):
            function(0, 8.0)
        for shift in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="shift="):
                function(4, shift)
    with pytest.raises(ValueError, match="smaller"):
        sigma_schedule(4, 1e12)
