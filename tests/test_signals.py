"""A signal at any moment, also in the midst of handing frames to ffmpeg: nothing waits forever, nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from skyreels_fast import _watch, media
from skyreels_fast._meta import without_weights
from skyreels_fast._signals import Held, Stopped, handle_signals, stop
from skyreels_fast._watch import Watch
from skyreels_fast.film import Film

FRAMES = np.arange(0, 240, 20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
HANG_S = 30


class _Hangs(Exception):
    """What should have ended long ago has not."""


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A test that waits for what never comes fails."""

    def give_up(*_: object) -> None:
        raise _Hangs

    old = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def happens(event: int, act: Callable[[], None], during: Callable[[], None]) -> bool:
    """Have `act` happen at the `event`-th call or return of `during`; False where it has fewer."""
    left = [event]

    def tick(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            sys.setprofile(None)
            act()

    with contextlib.suppress(KeyboardInterrupt):
        sys.setprofile(tick)
        during()
        sys.setprofile(None)
    return left[0] <= 0


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_writer_interrupted_anywhere_can_be_closed(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    for event in itertools.count(1):
        writer = media.VideoWriter(path, 24, 16, 16)
        happened = happens(event, interrupt, lambda writer=writer: writer.write(FRAMES[:4]))
        writer.close()
        assert writer.frames in (0, 4)
        assert media.playable_frames(path) == writer.frames
        if not happened:
            break
    assert event > 5


@pytest.fixture
def handled() -> Iterator[None]:
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handle_all()
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def handle_all() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_what_must_not_be_left_by_half(handled: None, number: int) -> None:
    done = []
    with pytest.raises(Stopped) as stopped, Held():
        with Held():
            signal.raise_signal(number)
            done.append("inner")
        done.append("outer")
    assert (done, stopped.value.args) == (["inner", "outer"], (number,))
    with Held():
        done.append("nothing is left to be raised")


def test_without_anything_held_a_signal_is_raised_at_once_and_no_second_one_disturbs(handled: None) -> None:
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)


def test_a_second_ctrl_c_does_not_wait(handled: None) -> None:
    done = []
    with pytest.raises(Stopped), Held():
        signal.raise_signal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            done.append("waited")
    assert done == []


def test_a_signal_never_meets_torch_in_its_modes(handled: None) -> None:
    """Wherever it comes while modules without weights are made, tensors are made on the CPU again after it."""
    for event in itertools.count(1, 11):
        left = [event]

        def tick(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)

        handle_all()
        with contextlib.suppress(Stopped):
            sys.setprofile(tick)
            try:
                with without_weights():
                    nn.Linear(2, 2)
                    nn.Linear(2, 2)
            finally:
                sys.setprofile(None)
        assert torch.empty(1).device.type == "cpu"
        assert not Held.depth
        if left[0] > 0:  # this one came too late
            break


def test_a_film_stopped_anywhere_has_every_frame_it_was_given(tmp_path: Path, handled: None) -> None:
    path, begun = tmp_path / "out.mp4", []
    for event in itertools.count(1, 41):  # not every moment: each costs two ffmpegs
        film = Film(path, 24, 16, 16, tmp_path)
        film.write(FRAMES[:4])

        def go_on(film: Film = film) -> None:
            film.cut()
            film.write(FRAMES[4:8])
            film.write(FRAMES[8:])

        handle_all()
        happened = happens(event, lambda: signal.raise_signal(signal.SIGINT), go_on)
        film.close()
        begun.append(film.frames)
        assert media.playable_frames(path) == film.frames
        assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
        if not happened:
            break
    assert begun == sorted(begun)
    assert set(begun) == {4, 8, 12}


def wait_for_ever() -> None:
    """In a call that no signal ends, as when CUDA waits for another process: for a mutex that is taken already."""
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


def forked(child: Callable[[], None]) -> tuple[int, str]:
    """(exit code, what it wrote to stdout) of a child that does this and is sent SIGTERM once it has written a line."""
    said, output = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(output, 1)
            _watch.ANSWER_S = 0.5
            handle_signals(stop)
            child()
        finally:
            os._exit(70)
    os.close(output)
    with os.fdopen(said) as pipe:
        text = pipe.readline()
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        text += pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def test_a_signal_is_answered_whatever_the_main_thread_waits_for() -> None:
    def child() -> None:
        with Watch(lambda number: say(f"stopped by {number}") or 7):
            say("begun")
            wait_for_ever()

    assert forked(child) == (7, f"begun\nstopped by {signal.SIGTERM}\n")


def test_the_watch_too_waits_for_what_must_not_be_left_by_half() -> None:
    def child() -> None:
        with contextlib.suppress(Stopped), Watch(lambda number: say("the watch") or 7), Held():
            say("begun")
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                time.sleep(0.1)
            say("done")
        os._exit(3)

    assert forked(child) == (3, "begun\ndone\n")


def test_a_main_thread_that_answers_ends_by_itself() -> None:
    def child() -> None:
        with contextlib.suppress(Stopped), Watch(lambda number: say("stopped by the watch") or 7) as watch:
            try:
                say("begun")
                time.sleep(20)
            except Stopped:
                watch.mine()
                time.sleep(1)
                say("in good order")
                raise
        os._exit(3)

    assert forked(child) == (3, "begun\nin good order\n")


def test_who_answers_too_late_does_nothing_more() -> None:
    def child() -> None:
        def end(number: int) -> int:
            time.sleep(1)
            say("the watch")
            return 7

        with Watch(end) as watch:
            try:
                say("begun")
                time.sleep(20)
            except Stopped:
                time.sleep(1)
                watch.mine()
                say("the main thread")

    assert forked(child) == (7, "begun\nthe watch\n")


def test_an_end_that_fails_is_an_end() -> None:
    def child() -> None:
        with Watch(lambda number: 1 // 0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            say("begun")
            wait_for_ever()

    assert forked(child) == (1, "begun\n")


def left_behind() -> tuple[int, int, int]:
    """Threads, open files, and where signals are told to."""
    told = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(told)
    return threading.active_count(), len(os.listdir("/proc/self/fd")), told


def test_a_watch_leaves_nothing_behind() -> None:
    before = left_behind()
    with Watch(lambda number: 7):
        assert left_behind() != before
    assert left_behind() == before


@pytest.mark.parametrize("place", ["_begin", "mine"])
def test_nor_does_one_that_a_signal_meets_as_it_begins_or_ends(place: str, handled: None, monkeypatch) -> None:
    method, before = getattr(Watch, place), left_behind()

    def signalled(watch: Watch) -> None:
        method(watch)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Watch, place, signalled)
    with pytest.raises(Stopped), Watch(lambda number: 7):
        pass
    assert left_behind() == before


def test_a_child_that_was_forked_holds_up_no_watch() -> None:
    with Watch(lambda number: 7):
        child = os.fork()
        if child == 0:
            time.sleep(HANG_S)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_no_other_thread_holds_signals(handled: None) -> None:
    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Held():
            holds.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    done.set()
    thread.join()
