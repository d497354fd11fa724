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

from ._signals import STOPPING, Held, handle_signals, is_main_thread

ANSWER_S = 5.0  # torchrun gives all of its processes thirty
_LEAVE = b"\0"  # no signal's number


class Watch:
    """Ends the process after a signal that the main thread does not answer by `mine` within ANSWER_S.

    A context of the main thread, in which signals are handled as `handle_signals` does; elsewhere it does nothing.

    Attributes: end, called in a thread of its own with the signal's number, whose result is the exit code. It is not
        called in the midst of what is `Held`.
    """

    def __init__(self, end: Callable[[int], int]) -> None:
        self.end = end
        self._owner: dict[str, threading.Thread] = {}  # whose the end is
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None
        self._signals, self._told, self._old = -1, -1, -1

    def __enter__(self) -> Watch:
        try:
            with Held():
                self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    @Held()
    def __exit__(self, *_: object) -> None:
        self.mine()
        if self._thread is not None:
            signal.set_wakeup_fd(self._old)
            os.write(self._told, _LEAVE)  # a child that was forked may hold it open
            self._thread.join()
            os.close(self._told)
            os.close(self._signals)

    def _begin(self) -> None:
        if is_main_thread():
            self._signals, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
            self._old = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def mine(self) -> None:
        """Whatever is to be said and done at the end, the caller does it. Never returns if it came too late."""
        if not self._take():
            handle_signals(signal.SIG_IGN, signal.SIGINT)  # nothing shall end the process before it is saved
            while True:
                time.sleep(3600)
        self._answered.set()

    def _take(self) -> bool:
        # Without a lock, which an exception of a signal might leave taken.
        return self._owner.setdefault("end", threading.current_thread()) is threading.current_thread()

    def _look(self) -> None:
        number = self._next()
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

    def _next(self) -> int | None:
        """The next signal that stops the run; None where the watch is over."""
        while (came := os.read(self._signals, 1)) != _LEAVE:
            if came[0] in STOPPING:
                return came[0]
        return None

    def _is_answered(self) -> bool:
        """Whether it is within ANSWER_S; again so long where these end in the midst of what is held."""
        while not self._answered.wait(ANSWER_S):
            if not Held.depth:
                return False
        return True
