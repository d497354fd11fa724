"""How far a run has got, on a terminal as bars and elsewhere as a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from ._words import counted
from .stages import Progress

STAGES = {
    "text": "reading the prompt",
    "image": "reading the image",
    "load": "loading the model",
    "encode": "encoding given frames",
    "denoise": "denoising",
    "decode": "decoding",
}
# Said once, or not at all: what comes back with each window shows in the bars.
SPOKEN = ("text", "load")
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class _Bar(tqdm):
    """A bar without a thread that watches over it: Ctrl-C in the midst of a bar would have that thread wait forever."""

    monitor_interval = 0


class ConsoleProgress(Progress):
    """Bars for the window and for the whole, with seconds a step and time left.

    Where `stream` (stderr by default) is no terminal: a line for each window and every `interval_s` seconds.
    Seconds a step are those of denoising. To the time left of the whole, each window still to be decoded adds what the
    windows before took beside their denoising; in the first window that is not known and not counted.

    total: steps of all windows together. clock: seconds, from anywhere.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._bars: list[tqdm] = []
        self._fancy = self._stream.isatty()
        self._interval_s, self._clock = interval_s, clock
        self._stage, self._spoken, self._window = "", set[str](), ""
        self._total, self._done = total, 0
        self._calls = self._step = self._windows_left = self._windows_seen = 0
        # Seconds: denoised in earlier windows, denoised in all, beside the denoising in an earlier window.
        self._earlier = self._denoised = self._beside = 0.0
        self._start = self._begun = self._last_line = clock()

    @property
    def current(self) -> str:
        """What is being done, in words."""
        return STAGES.get(self._stage, self._stage or "starting")

    def stage(self, name: str) -> None:
        if name == self._stage:
            return
        if name == "decode" and self._step:
            self._count()  # the device has caught up with the last step only now
        self._stage = name
        if name in SPOKEN and name not in self._spoken:
            self._spoken.add(name)
            self._line(f"{STAGES[name]} ...")
        elif self._bars:
            self._bars[0].set_description_str(f"{self._window}, {STAGES.get(name, name)}")

    def window(self, index: int, count: int, calls: int) -> None:
        self._begun, self._earlier = self._clock(), self._denoised
        if self._windows_seen == 0:
            self._start = self._begun
        else:
            self._beside = (self._begun - self._start - self._denoised) / self._windows_seen
        self._windows_seen += 1
        self._stage, self._window = "", f"window {index + 1}/{count}"
        self._calls, self._step, self._windows_left = calls, 0, count - index
        if not self._fancy:
            begins = counted(calls, "step") if calls else f"{STAGES['decode']} ..."
            self._line(f"{self._window}: {begins}")
            return
        if not self._bars:
            self._bars = [self._bar(0, calls)] + ([self._bar(1, self._total)] if count > 1 else [])
        self._bars[0].set_postfix_str("", refresh=False)
        self._bars[0].reset(calls)
        self._bars[0].set_description_str(self._window)
        if count > 1:
            self._bars[1].set_description_str("in total")

    def step(self) -> None:
        self._done += 1
        self._step += 1
        self._count()
        for bar in self._bars:
            bar.update()
        last = self._step == self._calls
        if not self._fancy and (last or self._clock() - self._last_line >= self._interval_s):
            self._line(f"{self._window}: step {self._step}/{self._calls}, {self._pace(self._total - self._done)}")
            if last:
                self._line(f"{self._window}: {STAGES['decode']} ...")

    def close(self) -> None:
        """Leave the bars as they stand, the cursor below them."""
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []

    def _count(self) -> None:
        """Take the time since the window began as denoising, and show the pace that follows."""
        self._denoised = self._earlier + self._clock() - self._begun
        counts = (self._calls - self._step, self._total - self._done)
        for position, (bar, steps) in enumerate(zip(self._bars, counts, strict=False)):
            bar.set_postfix_str(self._pace(steps, whole=position == 1), refresh=steps == 0)

    def _pace(self, steps: int, whole: bool = True) -> str:
        """Seconds a step, and what `steps` more will take; nothing of that when decoding alone is left."""
        pace = self._denoised / max(self._done, 1)
        if steps <= 0:
            return f"{pace:.2f} s a step"
        left = pace * steps + (self._beside * self._windows_left if whole else 0.0)
        return f"{pace:.2f} s a step, {tqdm.format_interval(left)} left"

    def _bar(self, position: int, total: int) -> tqdm:
        return _Bar(total=total, position=position, file=self._stream, bar_format=BAR, dynamic_ncols=True, miniters=1)

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        if self._bars:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
