"""What is seen of a pipeline while it renders: the time of each row, peaks of memory, how often the blocks run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import skyreels_fast as sf
from benchmarks import harness
from benchmarks.options import is_chief
from skyreels_fast.dit.model import DiT


class Meter(sf.Progress):
    """Marks every row of the schedule and takes the peak of memory of every stage, without waiting inside a stage."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._clock = device, harness.Clock(device)
        self._stage: str | None = None
        self._began = time.perf_counter()
        self._windows: list[list[Any]] = []
        self._says = is_chief()
        self.peaks: dict[str, tuple[float | None, float | None]] = {}

    def stage(self, name: str | None) -> None:
        """A stage begins, or with None the last one is over."""
        if name == self._stage:
            return
        if self._stage is not None:
            self._close(self._stage)
        self._stage, self._began = name, time.perf_counter()
        harness.reset_peaks(self._device)

    def _close(self, stage: str) -> None:
        peak, before = harness.peaks_gib(self._device), self.peaks.get(stage)
        self.peaks[stage] = peak if before is None or None in peak else tuple(map(max, peak, before))
        seconds = time.perf_counter() - self._began
        if seconds > 0.05 and self._says:
            memory = "" if peak[0] is None else f", peak {peak[0]:.1f} GiB allocated, {peak[1]:.1f} reserved"
            print(f"  {stage}: {seconds:.2f} s{memory}", flush=True)

    def window(self, index: int, count: int, calls: int) -> None:
        if self._says:
            print(f"  window {index + 1} of {count}: {calls} rows", flush=True)
        self._windows.append([self._clock.mark()])

    def step(self) -> None:
        self._windows[-1].append(self._clock.mark())

    def rows(self) -> tuple[list[float], list[float]]:
        """Seconds of each window's first row, which also makes the keys and values of the text, and of all others."""
        first, others = [], []
        for marks in self._windows:
            seconds = [self._clock.seconds(*pair) for pair in zip(marks, marks[1:], strict=False)]
            first += seconds[:1]
            others += seconds[1:]
        return first, others


@contextmanager
def block_runs() -> Iterator[list[None]]:
    """Grows by one whenever a DiT runs its blocks, which a row that TeaCache passes over leaves out."""
    runs, run_branches = [], DiT.run_branches

    def counted(*args: Any, **options: Any) -> list[Tensor]:
        runs.append(None)
        return run_branches(*args, **options)

    DiT.run_branches = counted
    try:
        yield runs
    finally:
        DiT.run_branches = run_branches
