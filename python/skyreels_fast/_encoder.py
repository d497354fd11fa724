"""Writing a video while it is being made: frames go to an ffmpeg process whose file can be played at any moment."""

from __future__ import annotations

import os
import queue
import subprocess
import tempfile
import threading
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

CRF = 10  # imageio's quality 8 of 10
QUEUED_CHUNKS = 4
# Fragments make the file playable as it grows. Its index waits for the first of them, so that an edit list can take
# back the delay of the B-frames.
_FRAGMENTED = "+frag_keyframe+delay_moov+default_base_moof"
_PLAIN = "+faststart+negative_cts_offsets"


class VideoError(RuntimeError):
    """ffmpeg cannot encode or has given up; one line with what it said last."""


class VideoWriter:
    """An H.264 (yuv420p) MP4 of frames [H, W, 3], encoded in the background as they come.

    The file is playable after `close`, and up to its last second if this process, or ffmpeg, is killed before.
    A Ctrl-C does not reach ffmpeg, so that frames in flight still get into the file.

    Attributes: path; frames, how many ffmpeg has been given.

    Raises VideoError, here or from the next call, when ffmpeg stops.
    """

    def __init__(self, path: str | os.PathLike, fps: float, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"{width}x{height}: H.264 video needs an even width and height")
        self.path, self.frames = Path(path), 0
        self._shape = (height, width, 3)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            _command(self.path, fps, height, width),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )
        self._broken = self._closed = False
        # An exception that a signal raises may leave a queue.Queue locked for good; a SimpleQueue it cannot.
        self._chunks = queue.SimpleQueue[np.ndarray | None]()
        self._room = queue.SimpleQueue[None]()  # as many items as chunks may still be queued
        for _ in range(QUEUED_CHUNKS):
            self._room.put(None)
        # A thread is out of reach of KeyboardInterrupt, so no frame is ever written by half.
        self._feeder = threading.Thread(target=self._feed, name="video writer", daemon=True)
        self._feeder.start()

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append uint8 frames [n, H, W, 3]; waits while ffmpeg lags behind."""
        array = np.ascontiguousarray(frames.cpu() if isinstance(frames, Tensor) else frames)
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != self._shape:
            raise ValueError(f"frames: {array.dtype} {list(array.shape)} is not uint8 [n, {str(self._shape)[1:-1]}]")
        if self._broken:
            self.close()
        self._room.get()
        self._chunks.put(array)

    def close(self) -> None:
        """Finish the file; does nothing the second time."""
        if self._log.closed:
            return
        self._closed = True
        self._chunks.put(None)
        self._feeder.join()
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self._log.close()
        if code or self._broken:
            raise VideoError(f"ffmpeg stopped writing {self.path}: {lines[-1] if lines else f'exit code {code}'}")

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except VideoError:
            if kind is None:
                raise

    def _feed(self) -> None:
        """Pass chunks on to ffmpeg until None comes; keep taking them when it is gone, so that nobody waits forever."""
        pipe = self._process.stdin
        while (chunk := self._chunks.get()) is not None:
            if not self._broken:
                try:
                    pipe.write(memoryview(chunk).cast("B"))
                    self.frames += len(chunk)
                except OSError:
                    self._broken = True
            self._room.put(None)
        try:
            pipe.close()
        except OSError:
            self._broken = True


@lru_cache
def check_encoder() -> str:
    """The ffmpeg to use, once it has shown that it encodes H.264. VideoError if it cannot or there is none."""
    try:
        import imageio_ffmpeg  # needed where a video is written, not where one is rendered

        program = imageio_ffmpeg.get_ffmpeg_exe()
        trial = ["-f", "lavfi", "-i", "nullsrc=s=64x64:d=0.1", "-c:v", "libx264", "-f", "null", "-"]
        done = subprocess.run([program, "-v", "error", *trial], stdin=subprocess.DEVNULL, capture_output=True)
    except (OSError, RuntimeError) as error:
        raise VideoError(f"ffmpeg cannot be run: {error}; install imageio-ffmpeg or set IMAGEIO_FFMPEG_EXE") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise VideoError(f"{program} cannot encode H.264 (libx264): {said[-1]}; set IMAGEIO_FFMPEG_EXE to one that can")
    return program


def make_plain(source: Path, target: Path) -> None:
    """Copy an MP4 of fragments, picture by picture as it is, into one with a single index. VideoError if that fails."""
    command = [check_encoder(), "-y", "-v", "error", "-i", f"file:{source.absolute()}", "-c", "copy"]
    command += ["-movflags", _PLAIN, "-f", "mp4", f"file:{target.absolute()}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise VideoError(f"ffmpeg stopped writing {target}: {said[-1] if said else f'exit code {done.returncode}'}")


def _command(path: Path, fps: float, height: int, width: int) -> list[str]:
    program, rate = check_encoder(), frame_rate(fps)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "pipe:0"]
    codec = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF), "-g", str(max(1, round(fps)))]
    container = ["-movflags", _FRAGMENTED, "-flush_packets", "1", "-f", "mp4", f"file:{path.absolute()}"]
    return [program, "-y", "-v", "error", *source, *codec, *container]


def frame_rate(fps: float) -> Fraction:
    """The exact rate behind a rounded one: 29.97 is 30000/1001."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if fps != round(fps) and abs(ntsc - Fraction(fps)) < Fraction(1, 100):
        return ntsc
    return Fraction(fps).limit_denominator(1000)
