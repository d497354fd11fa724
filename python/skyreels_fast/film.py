"""A video of many takes in one file, which plays at any moment while it grows and can be taken up where it was left.

Each take is encoded by an ffmpeg of its own, so what is in the file up to a cut depends on the frames before the cut
alone. ffmpeg writes a fragmented MP4 beside; whole fragments move from there into the film as they come, their place
in time and their number moved on behind the takes before (ISO/IEC 14496-12: mfhd 8.8.5, tfdt 8.8.12).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from ._durable import sync_folder, unfinished
from ._encoder import VideoError, VideoWriter, frame_rate, make_plain
from ._signals import Held


class Mark(NamedTuple):
    """How far a film is at a cut: the file's length, the frames and the fragments in it."""

    bytes: int = 0
    frames: int = 0
    fragments: int = 0


class Film:
    """An H.264 MP4 at `path`, made of takes; `write` begins one where none is open.

    Where there are several takes, each has three frames or more: one of fewer has no B-frames and would not fit in.

    folder: where the current take and, at the end, the plain copy lie. The first write drops any older file, or what
    comes after the cut to `go_on` from.

    A signal that stops the run waits until a method is done.

    Attributes: begun, whether the file is this film's; frames, those of earlier takes and those that ffmpeg has been
        given of this one.
    """

    def __init__(self, path: str | os.PathLike, fps: float, height: int, width: int, folder: Path) -> None:
        self.path, self._folder = Path(path), Path(folder)
        self._fps, self._height, self._width = fps, height, width
        self._mark, self.begun = Mark(), False
        self._file: BinaryIO | None = None
        self._writer: VideoWriter | None = None
        self._take: _Take | None = None

    @property
    def frames(self) -> int:
        return self._mark.frames + (self._writer.frames if self._writer else 0)

    def go_on(self, mark: Mark) -> bool:
        """Take up the film at a cut; False where the file is shorter than it was then."""
        if not self.path.is_file() or self.path.stat().st_size < mark.bytes:
            return False
        self._mark, self.begun = mark, True
        return True

    @Held()
    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append uint8 frames [n, H, W, 3]. Raises VideoError when ffmpeg stops, OSError when the disk is full."""
        if self._file is None:
            self._file = _opened(self.path, self._mark.bytes)
            self.begun = True
        if self._writer is None:
            self._take = _Take(unfinished(self._folder, ".mp4"), self._mark, self._fps)
            self._writer = VideoWriter(self._take.path, self._fps, self._height, self._width)
        self._writer.write(frames)
        self._move_on()

    @Held()
    def cut(self) -> Mark:
        """End the take, have it reach the disk, and say where the film stands. Raises as `write` does."""
        if self._writer is None:
            return self._mark
        try:
            self._writer.close()
        finally:
            frames, self._writer = self.frames, None
            try:
                self._move_on()
            finally:
                self._take.path.unlink(missing_ok=True)
                self._mark = Mark(self._file.tell(), frames, self._take.fragments)
                self._take = None
        os.fsync(self._file.fileno())
        return self._mark

    @Held()
    def close(self) -> None:
        """End the take and the file; does nothing the second time. Raises as `write` does."""
        try:
            self.cut()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def make_plain(self) -> None:
        """Replace the closed file by the same pictures with one index. VideoError or OSError if it has to stay.

        A file that has one is left alone: ffmpeg's copy of a copy may show a picture twice.
        """
        if not _in_fragments(self.path):
            return
        plain = unfinished(self._folder, ".mp4")
        try:
            make_plain(self.path, plain)
            if _seconds(plain) < (self.frames - 0.5) / frame_rate(self._fps):
                raise VideoError("this ffmpeg copies all but the last frame's time; ffmpeg 7 does not")
            with open(plain, "rb") as file:
                os.fsync(file.fileno())
            os.replace(plain, self.path)
            sync_folder(self.path.parent)
        finally:
            plain.unlink(missing_ok=True)

    def _move_on(self) -> None:
        for data in self._take.fragments_until_now(self._head):
            start = self._file.tell()
            try:
                _write(self._file, data)
            except BaseException:
                self._file.seek(start)
                self._file.truncate()  # no half of a fragment
                raise

    def _head(self, own: bytes) -> bytes:
        """What to put before a take's fragments: what describes the video, if nothing does yet; it must be the same."""
        position = self._file.tell()
        if not position:
            return own
        self._file.seek(0)
        known = self._file.read(len(own))
        self._file.seek(position)
        if known != own:
            raise VideoError(
                f"{self.path} was begun by another ffmpeg, whose pictures do not mix with those of this one: "
                "set IMAGEIO_FFMPEG_EXE to that one"
            )
        return b""


class _Take:
    """The file that ffmpeg is writing, read as far as its fragments are whole."""

    def __init__(self, path: Path, before: Mark, fps: float) -> None:
        self.path, self._position = path, 0
        self._before, self._rate = before, frame_rate(fps)
        self.fragments = before.fragments
        self._own = self._moof = b""
        self._ticks = 0

    def fragments_until_now(self, head: Callable[[bytes], bytes]) -> Iterator[bytes]:
        """What to append to the film: what `head` makes of the take's own head, then fragments, each whole."""
        for kind, box in self._boxes():
            if kind == b"ftyp":
                self._own = box
            elif kind == b"moov":
                timescale, _ = _time(box)
                self._ticks = int(timescale / self._rate * self._before.frames)
                yield head(self._own + box)
            elif kind == b"moof":
                self._moof = box
            elif kind == b"mdat":
                yield _moved(self._moof, self.fragments + 1, self._ticks) + box
                self.fragments += 1

    def _boxes(self) -> Iterator[tuple[bytes, bytes]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for kind, start, size in _whole_boxes(file, self._position):
                file.seek(start)
                yield kind, file.read(size)
                self._position = start + size  # only now: what could not be appended comes again


def _in_fragments(path: Path) -> bool:
    with open(path, "rb") as file:
        return any(kind == b"moof" for kind, *_ in _whole_boxes(file))


def _whole_boxes(file: BinaryIO, position: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, size) of the outermost boxes from `position` on, as far as they are whole."""
    length = os.fstat(file.fileno()).st_size
    while position + 8 <= length:
        file.seek(position)
        size, kind = struct.unpack(">I4s", file.read(8))
        if size == 1:  # then it stands behind, in 64 bits
            size = int.from_bytes(file.read(8), "big")
        if size < 8 or position + size > length:
            return
        yield kind, position, size
        position += size


def _opened(path: Path, length: int) -> BinaryIO:
    """The file, cut to `length` bytes, to be read and written at its end."""
    file = open(path, "r+b" if length else "w+b", buffering=0)  # noqa: SIM115 - closed by the film
    file.truncate(length)
    file.seek(length)
    sync_folder(path.absolute().parent)
    return file


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _find(data: bytes, *path: bytes) -> int:
    """Where the payload of a box inside boxes begins, `data` being the payload of the outermost. KeyError if absent."""
    start, stop = 0, len(data)
    for depth, wanted in enumerate(path):
        while start + 8 <= stop:
            size, kind = struct.unpack_from(">I4s", data, start)
            if kind == wanted:
                start, stop = start + 8, start + size
                break
            start += max(size, 8)
        else:
            raise KeyError(b"/".join(path[: depth + 1]))
    return start


def _time(moov: bytes) -> tuple[int, int]:
    """The (only) track's ticks a second, and how many it lasts."""
    at = _find(moov, b"moov", b"trak", b"mdia", b"mdhd")
    return struct.unpack_from(">IQ" if moov[at] else ">II", moov, at + (20 if moov[at] else 12))


def _seconds(path: Path) -> Fraction:
    """How long an MP4 with an index lasts."""
    with open(path, "rb") as file:
        start, size = next((start, size) for kind, start, size in _whole_boxes(file) if kind == b"moov")
        file.seek(start)
        timescale, ticks = _time(file.read(size))
    return Fraction(ticks, timescale)


def _moved(moof: bytes, number: int, ticks: int) -> bytes:
    """A fragment's head with another number, its pictures `ticks` later."""
    moved = bytearray(moof)
    struct.pack_into(">I", moved, _find(moof, b"moof", b"mfhd") + 4, number)
    at = _find(moof, b"moof", b"traf", b"tfdt")
    form = ">Q" if moof[at] else ">I"
    struct.pack_into(form, moved, at + 4, struct.unpack_from(form, moof, at + 4)[0] + ticks)
    return bytes(moved)
