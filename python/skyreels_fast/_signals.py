"""Signals that stop a run: raised as exceptions, though not in the midst of what must not be left by half."""

from __future__ import annotations

import signal
import threading
from contextlib import ContextDecorator
from typing import Any

_QUIET = (signal.SIGTERM, signal.SIGHUP)
STOPPING = (signal.SIGINT, *_QUIET)


class Stopped(KeyboardInterrupt):
    """A signal has come: its number is the first argument."""


class Held(ContextDecorator):
    """A context that the first signal waits for, to be raised at its end; a second Ctrl-C is raised at once.

    Contexts may lie in each other. It holds those signals that `stop` handles, and in the main thread alone: no other
    is ever raised in.
    """

    depth = 0
    came: int | None = None

    def __enter__(self) -> None:
        if is_main_thread():
            Held.depth += 1

    def __exit__(self, *_: object) -> None:
        if not is_main_thread():
            return
        Held.depth -= 1
        if Held.came is not None and not Held.depth:
            stop(Held.came, None)


def stop(number: int, _frame: object) -> None:
    """Raise Stopped, or have the context that is held raise it."""
    handle_signals(signal.SIG_IGN)  # the second shall not disturb the first's cleaning up
    if is_main_thread() and signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if Held.depth:
        Held.came = number
        return
    Held.came = None
    raise Stopped(number)


def handle_signals(handler: Any, *more: int) -> dict[int, Any]:
    """Set the handler of SIGTERM, SIGHUP and `more` unless they are ignored, as under nohup; those that were."""
    if not is_main_thread():
        return {}
    numbers = [number for number in (*_QUIET, *more) if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in numbers}


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
