"""What each field of a request may hold, taken alone: types, ranges, files. No torch."""

from __future__ import annotations

import math
import numbers
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from ._files import open_image, open_video
from .config import PIXEL_MULTIPLE, RESOLUTIONS
from .sampling.windows import latent_frames, pixel_frames

CONTEXT_TOKENS = 512
CLIP_TOKENS = (1, 257, 1280)


class UsageError(ValueError):
    """A command line that cannot be run."""


class RequestError(ValueError):
    """A value that cannot be used: one line with the field, the value and what to do about it."""

    def __init__(self, name: str, value: object, fix: str) -> None:
        super().__init__(f"{name}{'' if value is None else '=' + _short(value)}: {fix}")


@dataclass(frozen=True)
class Number:
    """The numbers a field takes: from `low` (or only above it) to `high`, whole or real, in steps of `multiple`."""

    whole: bool
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    multiple: int = 1

    def check(self, name: str, value: Any) -> int | float:
        """Return `value` as int (whole) or float; RequestError unless it is allowed."""
        good = isinstance(value, numbers.Integral if self.whole else numbers.Real) and not isinstance(value, bool)
        number = _as_number(value, self.whole) if good else math.nan
        good = self.low < number <= self.high if self.above else self.low <= number <= self.high
        if not good or number in (math.inf, -math.inf):
            raise RequestError(name, value, f"must be {self._describe()}")
        if number % self.multiple and self.whole:
            nearest = max(int(self.low), (number + self.multiple // 2) // self.multiple * self.multiple)
            raise RequestError(name, value, f"must be a multiple of {self.multiple}; the nearest is {nearest}")
        return number

    def _describe(self) -> str:
        noun = "a whole number" if self.whole else "a number"
        if self.low == -math.inf:
            return "finite numbers, highest power first"
        if self.high < math.inf:
            return f"{noun} from {self.low} to {self.high}"
        return f"{noun} above {self.low}" if self.above else f"{noun} of {self.low} or more"


MOST_FRAMES = 1_000_000
MOST_PIXELS = 16_384  # of one side
NUMBERS = {
    "height": Number(True, PIXEL_MULTIPLE, MOST_PIXELS, multiple=PIXEL_MULTIPLE),
    "width": Number(True, PIXEL_MULTIPLE, MOST_PIXELS, multiple=PIXEL_MULTIPLE),
    "num_frames": Number(True, 1, MOST_FRAMES),
    "base_num_frames": Number(True, 1, MOST_FRAMES),
    "overlap_history": Number(True, 1, MOST_FRAMES),
    "ar_step": Number(True, 0),
    "causal_block_size": Number(True, 1, 1000),
    "addnoise_condition": Number(True, 0, 999),
    "inference_steps": Number(True, 1, 1000),
    "guidance_scale": Number(False, 0, 1000),
    "shift": Number(False, 0.01, 100),
    "fps": Number(False, 1, 240),
    "seed": Number(True, 0, 2**63 - 1),
    "teacache_thresh": Number(False, 0),
}
_COEFFICIENT = Number(False)


def checked(name: str, value: Any, where: str = "") -> Any:
    """The value of the field `name`, numbers as int or float; RequestError if no model takes it.

    `where` goes before the field's name in the message, for values that do not come from the user.
    """
    label = where + name
    if name in NUMBERS:
        return NUMBERS[name].check(label, value)
    if name == "resolution":
        return _resolution(label, value)
    if name == "teacache_coefficients":
        return _coefficients(label, value)
    if name in ("prompt", "negative_prompt"):
        _check_text(label, value)
    elif name in ("causal_attention", "teacache", "use_ret_steps"):
        if not isinstance(value, bool):
            raise RequestError(label, value, "must be True or False")
    elif name in ("context", "negative_context", "clip_features"):
        _check_tensor(label, value)
    return value


def probe_image(name: str, value: Any) -> tuple[int, int, None]:
    """(height, width, None) of an image that can be read; RequestError of any other."""
    try:
        width, height = open_image(value).size
    except ValueError as error:
        raise RequestError(name, value, str(error)) from None
    return height, width, None


def probe_video(name: str, value: Any, frames: int) -> tuple[int, int, float | None]:
    """(height, width, fps or None) of a video of at least `frames` frames; RequestError of any other."""
    if hasattr(value, "dtype"):
        if str(value.dtype) not in ("uint8", "torch.uint8") or value.ndim != 4 or value.shape[-1] != 3:
            raise RequestError(name, value, "must be uint8 of shape [F, H, W, 3]")
        found, size, fps = value.shape[0], tuple(value.shape[1:3]), None
        if 0 in value.shape:
            raise RequestError(name, value, "holds no picture")
    else:
        found, size, fps = _probe_video_file(name, value, frames)
    if found == 1 < frames:
        raise RequestError(name, value, "is a single picture: give image instead")
    if found < frames:
        most = max(1, pixel_frames(latent_frames(found)))
        fix = f"use overlap_history={most} or less, or a longer video"
        raise RequestError(name, value, f"has {found} of the {frames} frames that overlap_history takes: {fix}")
    return *size, fps


def device_name(name: str | None) -> str:
    """The device to use: `name`, else cuda where there is one. Raises UsageError for one that is not there."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name!r}: must be cuda, cuda:N or cpu")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name!r}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; "
                         "run with --device cpu or another one")  # fmt: skip
    return name


def own_device(name: str) -> str:
    """The device of this process, of those that torchrun has started: `name` as `device_name` gives it, made certain.

    Raises UsageError where there are more processes than devices.
    """
    import torch

    if name == "cpu":
        return name
    if name != "cuda":
        raise UsageError(f"--device {name}: with --use_usp each process has a GPU of its own; give cuda, or cpu")
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > devices:
        raise UsageError(
            f"--use_usp: {processes} processes for {devices} GPUs; start at most {devices} on this machine"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _probe_video_file(name: str, path: Any, frames: int) -> tuple[int, tuple[int, int], float | None]:
    """Frames found, `frames` at most, (height, width) and fps."""
    try:
        with open_video(path) as video:
            meta = video.metadata()
            found = sum(1 for _ in zip(range(frames), video.iter(), strict=False))
    except (ValueError, RuntimeError) as error:
        raise RequestError(name, path, str(error).split("\n")[0]) from None
    width, height = meta["size"]
    return found, (height, width), meta["fps"] if 1 <= meta["fps"] <= 240 else None


def _as_number(value: Any, whole: bool) -> int | float:
    try:
        return int(value) if whole else float(value)
    except OverflowError:
        return math.inf


def _resolution(label: str, value: Any) -> str:
    name = value.upper() if isinstance(value, str) else value
    if not isinstance(name, str) or name not in RESOLUTIONS:
        raise RequestError(label, value, f"must be {' or '.join(RESOLUTIONS)}, or give height and width")
    return name


def _coefficients(label: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise RequestError(label, value, f"must be {_COEFFICIENT._describe()}")
    return tuple(_COEFFICIENT.check(label, item) for item in value)


def _check_text(label: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RequestError(label, value, "must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(label, value, "is not valid Unicode: give it as UTF-8") from None


def _check_tensor(label: str, value: Any) -> None:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    if torch is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise RequestError(label, value, "must be a torch tensor of floating point numbers")
    if label == "clip_features":
        if tuple(value.shape) != CLIP_TOKENS:
            raise RequestError(label, value, f"must be of shape {list(CLIP_TOKENS)}")
    elif value.ndim != 2 or not 1 <= value.shape[0] <= CONTEXT_TOKENS:
        raise RequestError(label, value, f"must be of shape [n, text_dim] with n from 1 to {CONTEXT_TOKENS}")
    if not value.isfinite().all():
        raise RequestError(label, value, "holds NaN or infinite values")


def _short(value: Any) -> str:
    """A value in one short line: arrays and images by their shape, long text by its beginning."""
    if hasattr(value, "shape"):
        return f"{type(value).__name__}{list(value.shape)}"
    if hasattr(value, "getexif"):
        return f"{type(value).__name__}[{value.width}x{value.height}]"
    text = repr(value) if not hasattr(value, "__fspath__") else repr(value.__fspath__())
    return text if len(text) <= 200 else f"{text[:197]}..."
