"""Images and videos in and out: fitted to a size, streamed, encoded as they are made."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._encoder import VideoError, VideoWriter, check_encoder
from ._files import open_image, open_video

__all__ = [
    "ImageLike",
    "VideoError",
    "VideoSource",
    "VideoWriter",
    "check_encoder",
    "check_writable",
    "fit_image",
    "from_uint8",
    "load_image",
    "output_path",
    "playable_frames",
    "to_host",
    "to_uint8",
]

if TYPE_CHECKING:
    from imageio.core.v3_plugin_api import PluginV3

ImageLike: TypeAlias = "str | os.PathLike | Image.Image"
CHUNK_FRAMES = 8
NAME_BYTES = 255  # the longest file name that Linux takes
PROMPT_CHARACTERS = 100


def load_image(source: ImageLike) -> Image.Image:
    """An image as RGB, turned upright as its EXIF data says; transparency is dropped. ValueError if unreadable."""
    try:
        return open_image(source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def fit_image(image: Image.Image, height: int, width: int) -> Tensor:
    """Crop an RGB image around its centre to the target's aspect, then resize it (bicubic).

    The crop box is computed in floats and cut at whole pixels, without resampling. An image that has the target size
    already passes through untouched.

    Returns: float32 [3, 1, height, width] in [-1, 1].
    """
    return from_uint8(_as_tensor(_fit(image, height, width)))[0]


def from_uint8(frames: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] as float32 [1, 3, n, H, W] in [-1, 1]."""
    return (frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).contiguous()


def to_uint8(video: Tensor) -> Tensor:
    """Float [3, T, H, W] in [-1, 1] as uint8 [T, H, W, 3] on the same device, rounded to the nearest and clamped."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def to_host(chunks: Iterable[Tensor], *, floats: bool) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Chunks [1, 3, t, H, W] in [-1, 1] as they arrive on the host: (the chunk itself if `floats`, its uint8 frames).

    A GPU's chunk is given out when the work for the next one is queued: it is copied, and what the caller does with it
    is done, while the GPU makes that one.
    """
    behind: tuple[Tensor | None, Tensor, torch.cuda.Event] | None = None
    for chunk in chunks:
        frames, kept = to_uint8(chunk[0]), chunk if floats else None
        if not chunk.is_cuda:
            yield kept, frames
            continue
        with torch.cuda.device_of(chunk):
            sent = None if kept is None else _pinned_copy(kept), _pinned_copy(frames), torch.cuda.Event()
            sent[2].record()
        if behind is not None:
            yield _arrived(*behind)
        behind = sent
    if behind is not None:
        yield _arrived(*behind)


def _pinned_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _arrived(kept: Tensor | None, frames: Tensor, copied: torch.cuda.Event) -> tuple[Tensor | None, Tensor]:
    copied.synchronize()
    return kept, frames


class VideoSource:
    """A video to read: a file, or frames as uint8 [F, H, W, 3]. It is never held in memory whole.

    Attributes: height, width of its (upright) frames; fps, None where unknown.

    Raises ValueError: the file is no video, or the array has another shape or type.
    """

    def __init__(self, source: str | os.PathLike | np.ndarray | Tensor) -> None:
        self.fps: float | None = None
        self._path: str | os.PathLike | None = None
        if isinstance(source, (np.ndarray, Tensor)):
            self._array = np.asarray(source.cpu() if isinstance(source, Tensor) else source)
            if self._array.dtype != np.uint8 or self._array.ndim != 4 or self._array.shape[-1] != 3:
                raise ValueError(f"video: {self._array.dtype} {list(self._array.shape)} is not uint8 [F, H, W, 3]")
            self.height, self.width = self._array.shape[1:3]
            return
        self._path = source
        with self._open() as video:
            meta = video.metadata()
        self.width, self.height = meta["size"]
        self.fps = meta["fps"] or None
        duration_s = meta.get("duration") or 0.0
        self._declared = round(duration_s * (self.fps or 0)) if math.isfinite(duration_s) else 0

    def break_after(self, count: int) -> str | None:
        """What to say where a file that promises many more frames gives only `count`; sound may go on half a second."""
        if self._path is None or (self._declared - count) <= 0.5 * (self.fps or 0):
            return None
        return f"is broken off or damaged after {count} of about {self._declared} frames, and is extended from there"

    @property
    def frame_count(self) -> int:
        """Frames in the video; those of a file are counted by decoding it."""
        return sum(1 for _ in self) if self._path is not None else len(self._array)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames as uint8 [H, W, 3]."""
        if self._path is None:
            yield from self._array
            return
        with self._open() as video:
            yield from video.iter()

    def fitted(self, height: int, width: int) -> Iterator[Tensor]:
        """Frames cropped and resized as `fit_image` does, in chunks: uint8 [n, height, width, 3], n at most 8."""
        frames = iter(self)
        while chunk := list(itertools.islice(frames, CHUNK_FRAMES)):
            yield torch.cat([_as_tensor(_fit(Image.fromarray(frame), height, width)) for frame in chunk])

    @contextmanager
    def _open(self) -> Iterator[PluginV3]:
        try:
            with open_video(self._path) as video:
                yield video
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None


def playable_frames(path: str | os.PathLike) -> int:
    """How many frames of a video file can be decoded; 0 where it is missing or no video."""
    count = 0
    try:
        for _ in VideoSource(path):
            count += 1
    except (ValueError, RuntimeError, OSError):
        pass
    return count


def output_path(outdir: str | os.PathLike, prompt: str, seed: int, now: datetime.datetime) -> Path:
    """result/<outdir>/<prompt>_<seed>_<date>_<time>.mp4, a name that no file has yet, of 255 bytes at most.

    Of the prompt it holds the first 100 characters or as many as fit, path separators and control characters replaced.
    """
    tail = f"_{seed}_{now:%Y-%m-%d_%H-%M-%S}"
    folder = Path("result") / outdir
    stem = _file_name(prompt[:PROMPT_CHARACTERS], NAME_BYTES - len(f"{tail}_999.json")) + tail
    names = itertools.chain([stem], (f"{stem}_{count}" for count in itertools.count(1)))
    return next(
        folder / f"{name}.mp4"
        for name in names
        if not (folder / f"{name}.mp4").exists() and not (folder / f"{name}.json").exists()
    )


def check_writable(path: str | os.PathLike, make: bool = True) -> None:
    """Make the folders of a file to be written and try writing there. ValueError if that cannot be.

    make: False leaves nothing behind, and tries the folder in which the missing ones are to be made.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder; name a file")
        if _exists(path):
            with open(path, "r+b"):
                return
        nearest = next(folder for folder in path.parents if _exists(folder))
        if not nearest.is_dir():
            raise ValueError(f"cannot write {path}: {nearest} is a file, not a folder; choose another place")
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent if make else nearest):
            return
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another place") from None


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return image.crop(box).resize((width, height))


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))[None]


def _file_name(text: str, limit: int) -> str:
    """`text` as a file name's beginning: at most `limit` bytes of UTF-8, nothing that a path gives a meaning."""
    kept = "".join("_" if c in "/\\" else " " if unicodedata.category(c)[0] == "C" else c for c in text)
    cut = kept.strip().lstrip(".").encode()[:limit].decode(errors="ignore")
    return cut.strip() or "video"
