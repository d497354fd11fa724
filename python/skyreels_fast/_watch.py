"""A signal is answered, whatever the main thread waits for.

Python raises a signal's exception in the main thread, and not before the call returns that this is in: one that waits
for a process that is gone, or for a GPU that waits for one, never does. So another thread looks after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from ._signals import STOPPING, Held, is_main_thread

ANSWER_S = 5.0  # torchrun gives all of its processes thirty


class Watch:
    """Ends the process after a signal that the main thread does not answer by `mine` within ANSWER_S.

    A context of the main thread, in which signals are handled as `handle_signals` does; elsewhere it does nothing.

    Attributes: end, called in a thread of its own with the signal's number, whose result is the exit code; until
        something else is set, it says nothing. It is not called in the midst of what is `Held`.
    """

    def __init__(self) -> None:
        self.end: Callable[[int], int] = lambda number: 128 + number
        self._owner: threading.Thread | None = None
        self._deciding = threading.Lock()
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None
        self._signals = self._old = -1

    def __enter__(self) -> Watch:
        if is_main_thread():
            signals, self._signals = os.pipe()
            os.set_blocking(self._signals, False)
            self._old = signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._look, args=(signals,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mine()
        if self._thread is not None:
            signal.set_wakeup_fd(self._old)
            os.close(self._signals)  # which ends the thread
            self._thread.join()

    def mine(self) -> None:
        """Whatever is to be said and done at the end, the caller does it. Never returns if it came too late."""
        if not self._take():
            while True:
                time.sleep(3600)
        self._answered.set()

    def _take(self) -> bool:
        with self._deciding:
            self._owner = self._owner or threading.current_thread()
            return self._owner is threading.current_thread()

    def _look(self, signals: int) -> None:
        number = _next(signals)
        os.close(signals)
        if number is None or self._is_answered() or not self._take():
            return
        code = 1
        try:
            code = self.end(number)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)

    def _is_answered(self) -> bool:
        """Whether it is within ANSWER_S; again so long where these end in the midst of what is held."""
        while not self._answered.wait(ANSWER_S):
            if not Held.depth:
                return False
        return True


def _next(signals: int) -> int | None:
    """The next signal that stops the run; None where the pipe is closed."""
    while came := os.read(signals, 1):
        if came[0] in STOPPING:
            return came[0]
    return None
