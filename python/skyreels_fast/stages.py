"""The stages of a run: who is told when one begins, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Progress:
    """What a run reports as it goes; override what you want to show."""

    def stage(self, name: str) -> None:
        """A stage begins: "text", "image", "load", "encode", "denoise" or "decode"."""

    def window(self, index: int, count: int, calls: int) -> None:
        """Window `index` of `count` begins to denoise; `step` will be called `calls` times."""

    def step(self) -> None:
        """One row of the schedule is done: every latent frame that it moves has moved."""


class Clock:
    """Adds up the seconds of each stage, device work included, and tells `progress` when one begins."""

    def __init__(self, device: torch.device, timings: dict[str, float], progress: Progress) -> None:
        self._device, self._timings, self._progress = device, timings, progress

    @contextmanager
    def __call__(self, stage: str, wait: bool = True) -> Iterator[None]:
        """Time a stage. wait: for the device, at its end; not where an error ends it, after which it may hang."""
        self._progress.stage(stage)
        start = time.perf_counter()
        try:
            yield
            if wait and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self._timings[stage] = self._timings.get(stage, 0.0) + time.perf_counter() - start

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """Count the making of each item, which is on the host, not what is done with it."""
        iterator, done = iter(items), object()
        while True:
            with self(stage, wait=False):
                item = next(iterator, done)
            if item is done:
                return
            yield item
