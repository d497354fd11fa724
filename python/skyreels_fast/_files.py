"""Opening pictures and videos without torch: what checking a request and reading its inputs share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imageio.core.v3_plugin_api import PluginV3
    from PIL.Image import Image


def open_image(source: str | os.PathLike | Image) -> Image:
    """An image as RGB, decoded whole and turned upright as its EXIF data says. ValueError if it cannot be read."""
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(source), source.format)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError("must be a PIL image or the path of an image")
    check_file(source)
    try:
        with Image.open(source) as image:
            return _as_rgb(ImageOps.exif_transpose(image), image.format)
    except Exception as error:  # Pillow's decoders raise anything on a damaged file
        raise ValueError(f"is not a readable image ({first_line(error)}): give a PNG or JPEG file") from None


@contextmanager
def open_video(path: str | os.PathLike) -> Iterator[PluginV3]:
    """imageio's view of a video: `metadata()` with "size": (width, height) and "fps"; `iter()` of uint8 RGB frames.

    ValueError if the file is no video.
    """
    from imageio.v3 import imopen

    check_file(path)
    try:
        # An absolute path, so that ffmpeg never takes a name with a colon for an address.
        # The extension tells imageio that a video it is, whatever the file is called.
        video = imopen(Path(path).absolute(), "r", plugin="FFMPEG", extension=".mp4")
        video.metadata()
    except Exception as error:  # ffmpeg's report is parsed, which fails in many ways on other files
        reason = "ffmpeg finds no picture in it" if isinstance(error, (OSError, IndexError)) else first_line(error)
        raise ValueError(f"is not a readable video ({reason}): give an MP4, MOV, WebM or similar file") from None
    with video:
        yield video


def _as_rgb(image: Image, file_format: str | None) -> Image:
    """8-bit RGB; 16-bit grey, which Pillow's own conversion may clip at 255, is scaled to its nearest 8-bit level."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        import numpy as np
        from PIL import Image

        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB")


def check_file(path: object) -> None:
    """ValueError unless `path` names a file that can be opened for reading."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError("must be the path of a file")
    try:
        with open(path, "rb"):
            return
    except FileNotFoundError:
        raise ValueError("no such file: check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
