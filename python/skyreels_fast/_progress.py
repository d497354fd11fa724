"""How far a run has got, on a terminal as bars and elsewhere as a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

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
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"


class ConsoleProgress(Progress):
    """Bars for the window and for the whole, with seconds a step and time left.

    Where `stream` (stderr by default) is no terminal: a line for each window and every `interval_s` seconds.

    total: steps of all windows together.
    """

    def __init__(self, total: int, stream: TextIO | None = None, interval_s: float = 30.0) -> None:
        self._stream = stream or sys.stderr
        self._bars: list[tqdm] = []
        self._fancy = self._stream.isatty()
        self._interval_s = interval_s
        self._stage, self._spoken, self._window = "", set[str](), ""
        self._total, self._done = total, 0
        self._calls = self._step = 0
        self._start = self._last_line = time.monotonic()

    def stage(self, name: str) -> None:
        if name == self._stage:
            return
        self._stage = name
        if name in SPOKEN and name not in self._spoken:
            self._spoken.add(name)
            self._line(f"{STAGES[name]} ...")
        elif self._bars:
            self._bars[0].set_description_str(f"{self._window}, {STAGES.get(name, name)}")

    def window(self, index: int, count: int, calls: int) -> None:
        self._stage, self._window = "", f"window {index + 1}/{count}"
        self._calls, self._step = calls, 0
        if not self._done:
            self._start = time.monotonic()
        if not self._fancy:
            self._line(f"{self._window}: {calls} steps")
            return
        if not self._bars:
            self._bars = [self._bar(0, calls)] + ([self._bar(1, self._total)] if count > 1 else [])
        self._bars[0].reset(calls)
        self._bars[0].set_description_str(self._window)
        if count > 1:
            self._bars[1].set_description_str("in total")

    def step(self) -> None:
        self._done += 1
        self._step += 1
        for bar in self._bars:
            bar.update()
        if not self._fancy and (self._step == self._calls or time.monotonic() - self._last_line >= self._interval_s):
            pace = (time.monotonic() - self._start) / self._done
            left = tqdm.format_interval(pace * max(0, self._total - self._done))
            self._line(f"{self._window}: step {self._step}/{self._calls}, {pace:.2f} s a step, {left} left")

    def close(self) -> None:
        """Leave the bars as they stand, the cursor below them."""
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []

    def _bar(self, position: int, total: int) -> tqdm:
        return tqdm(
            total=total, position=position, file=self._stream, unit="step", bar_format=BAR, dynamic_ncols=True,
            smoothing=0.1,
        )  # fmt: skip

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bars:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
