"""What made a video, as a JSON file beside it: every setting, the versions, the timings, the command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._durable import write_json
from ._flags import FIELDS, launched
from .request import Settings

# Not part of what to repeat: where the video went, and what has already become part of the settings.
_NOT_REPEATED = ("output", "prompt_enhancer", "resume")


class Record:
    """The JSON file beside a video, there from the start, so that it never goes with another run's video.

    video: where the video will be. values: what `describe_run` says.
    """

    def __init__(self, video: Path, values: Mapping[str, Any]) -> None:
        self._video, self._path = video, video.with_suffix(".json")
        self._values = dict(values)
        self._before: bytes | None = None
        self._made = [folder for folder in self._path.parents if not folder.exists()]

    def begin(self, frames: int = 0) -> None:
        """Make the folders and say how much is rendered already. Raises OSError, with nothing left behind."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._before = self._path.read_bytes() if self._path.exists() else None
            self.write(complete=False, frames=frames)
        except OSError:
            self._remove_folders()
            raise

    def write(self, complete: bool, frames: int, **more: Any) -> None:
        """Replace the record: `frames` that can be played, and more to know. Raises OSError."""
        state = {"complete": complete, "video": self._video.name, "frames": frames}
        write_json(self._path, state | self._values | more)

    def withdraw(self) -> None:
        """No video was begun: bring back what was there before. Raises OSError."""
        if self._before is None:
            self._path.unlink(missing_ok=True)
        else:
            self._path.write_bytes(self._before)
        self._remove_folders()

    def _remove_folders(self) -> None:
        with contextlib.suppress(OSError):  # one that is in use, with all above it
            for folder in self._made:
                folder.rmdir()


def describe_run(program: str, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """All that is known of a run before it starts; `args` with its device and dtype filled in."""
    import torch

    from .ops import choose_attention

    on_gpu = torch.device(args.device).type == "cuda"
    return {
        "settings": {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)},
        "model_id": args.model_id,
        "device": torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine(),
        "dtype": args.dtype,
        "vae_dtype": args.vae_dtype,
        "offload": args.offload,
        "vram": args.vram,
        "attention": choose_attention(args.attention, args.device, getattr(torch, args.dtype)),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "transformers": _version("transformers"),
            "skyreels_fast": _version("skyreels_fast"),
        },
        "command": command_line(program, args, settings),
    }


def command_line(program: str, args: argparse.Namespace, settings: Settings) -> str:
    """The command that renders the same video again, every setting spelled out."""
    words = launched(program)
    for flag, value in repeated_flags(args, settings).items():
        words += [f"--{flag}"] if value is True else _with_value(flag, value)
    return shlex.join(words)


def repeated_flags(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The flags and values that render the same video again, every setting spelled out."""
    fields, flags = {flag: field for field, flag in FIELDS.items()}, {}
    for flag, value in vars(args).items():
        if flag != "prompt_file":
            value = getattr(settings, fields.get(flag, flag), value)
        unused = flag.startswith(("teacache_", "use_ret")) and not settings.teacache
        unused = unused or (flag == "prompt" and settings.prompts is not None)
        if value is not None and value is not False and not unused and flag not in _NOT_REPEATED:
            flags[flag] = value
    return flags


def _with_value(flag: str, value: Any) -> list[str]:
    items = value if isinstance(value, tuple) else (value,)
    text = ",".join(repr(item).removesuffix(".0") if isinstance(item, float) else str(item) for item in items)
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]


def _plain(value: Any) -> Any:
    """A setting as JSON has it: paths as text, tensors, arrays and images by their shape."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "shape"):
        return {"shape": list(value.shape), "dtype": str(value.dtype)}
    return {"image": [value.height, value.width]} if hasattr(value, "getexif") else repr(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        from skyreels_fast import __version__

        return __version__ if package == "skyreels_fast" else None
