"""Prompts over time: one a window, or each from a frame on. No torch."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ._values import RequestError
from ._words import counted
from .sampling.windows import Window

# A prompt a window, or (first frame, prompt) pairs in ascending order, the first at frame 0.
Prompts = tuple[str, ...] | tuple[tuple[int, str], ...]
_TIMED = re.compile(r"(\d+)\s*:\s*(.*)")


def read_prompts(path: str | os.PathLike) -> Prompts:
    """The prompts of a file: a line each, all with "FRAME:" before them or none; # comments and empty lines are free.

    Raises RequestError, of the field `prompts`, naming the line and the fix.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise _error(path, f"is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror or error}; check the path") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not numbered:
        raise _error(path, "holds no prompt: write one a line")
    timed = [_TIMED.fullmatch(line) for _, line in numbered]
    if not any(timed):
        return tuple(line for _, line in numbered)
    found: list[tuple[int, str]] = []
    for (number, _), match in zip(numbered, timed, strict=True):
        if match is None:
            first = next(n for (n, _), other in zip(numbered, timed, strict=True) if other)
            raise _error(path, f"line {number} has no frame, line {first} has: write FRAME: PROMPT in all or in none")
        fault = _fault([*found, (int(match[1]), match[2])])
        if fault:
            raise _error(path, f"line {number}: {fault}")
        found.append((int(match[1]), match[2]))
    return tuple(found)


def checked_prompts(value: Any) -> Prompts:
    """A request's `prompts`: texts, or (first frame, text) pairs. Raises RequestError."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise RequestError("prompts", value, "must be a list of texts, one a window, or of (first frame, text) pairs")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    found: list[tuple[int, str]] = []
    for number, item in enumerate(value, 1):
        pair = tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else ()
        if len(pair) != 2 or type(pair[0]) is not int or not isinstance(pair[1], str):
            raise RequestError("prompts", value, f"number {number} is no (first frame, text) pair as others are")
        found.append(pair)
        if fault := _fault(found):
            raise RequestError("prompts", value, f"number {number}: {fault}")
    return tuple(found)


def window_prompts(prompts: Prompts, windows: Sequence[Window], source_frames: int) -> tuple[str, ...]:
    """The prompt of each window: its own or the last there is, or the one that holds at its first new frame.

    source_frames: frames that come out before the first window's.

    Raises RequestError where there are more prompts than windows, or one begins after the last frame.
    """
    if isinstance(prompts[0], str):
        if len(prompts) > len(windows):
            counts = f"{counted(len(prompts), 'prompt')} for {counted(len(windows), 'window')}"
            fix = f"leave out {len(prompts) - len(windows)}, or make the video longer"
            raise RequestError("prompts", None, f"{counts}: {fix}")
        return prompts + prompts[-1:] * (len(windows) - len(prompts))
    firsts = first_frames(windows, source_frames)
    total = firsts[-1] + windows[-1].frames
    if prompts[-1][0] >= total:
        raise RequestError("prompts", None, f"frame {prompts[-1][0]} is past the last frame, {total - 1}: leave it out")
    return tuple(prompts[_at(prompts, first)][1] for first in firsts)


def unused(prompts: Prompts, windows: Sequence[Window], source_frames: int) -> list[int]:
    """First frames of the prompts that no window takes."""
    if isinstance(prompts[0], str):
        return []
    firsts = first_frames(windows, source_frames)
    taken = {_at(prompts, first) for first in firsts}
    return [frame for index, (frame, _) in enumerate(prompts) if index not in taken]


def delayed(prompts: Prompts, windows: Sequence[Window], source_frames: int) -> list[tuple[int, int]]:
    """(its own frame, the first frame of the window that takes it) of each prompt that has to wait for its window."""
    if isinstance(prompts[0], str):
        return []
    firsts = first_frames(windows, source_frames)
    taken = {prompts[_at(prompts, first)][0]: first for first in reversed(firsts)}
    # Frame 0 stands for the beginning, also where a source video's frames come before it.
    return [(frame, taken[frame]) for frame, _ in prompts[1:] if taken.get(frame, frame) != frame]


def first_frames(windows: Sequence[Window], source_frames: int) -> list[int]:
    """The first frame that each window adds to the video."""
    firsts, frame = [], source_frames
    for window in windows:
        firsts.append(frame)
        frame += window.frames
    return firsts


def _at(prompts: Sequence[tuple[int, str]], frame: int) -> int:
    """Which of the prompts holds at a frame."""
    return bisect_right(prompts, frame, key=lambda prompt: prompt[0]) - 1


def _fault(pairs: Sequence[tuple[int, str]]) -> str | None:
    """What is wrong with the last of the pairs."""
    frame, text = pairs[-1]
    if not text.strip():
        return f"frame {frame} has no prompt: write one after the colon"
    if len(pairs) == 1:
        return None if frame == 0 else f"the first prompt begins at frame {frame}: let it begin at 0"
    before = pairs[-2][0]
    return None if frame > before else f"frame {frame} is not after {before}: write them in ascending order"


def _error(path: str | os.PathLike, fix: str) -> RequestError:
    return RequestError("prompts", os.fspath(path), fix)
