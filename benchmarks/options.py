"""The options of the benchmarks' commands. What is wrong with one is said in one line, before anything is measured."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.harness import RESULTS
from skyreels_fast._values import device_name
from skyreels_fast.sampling.windows import latent_frames, pixel_frames


class Parser(argparse.ArgumentParser):
    """Options with a `device` and an `out`, which `parse_args` gives as they are to be used.

    rows: with this name there is --out, by default benchmarks/results/NAME.jsonl on a GPU. device: whether there is
    --device; without it, and by default, it is a GPU where there is one.
    """

    def __init__(self, description: str | None, rows: str | None = None, *, device: bool = True) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._rows = rows
        if device:
            self.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda where there is one)")
        if rows is not None:
            self.add_argument("--out", type=Path, help=f"default: benchmarks/results/{rows}.jsonl, on a GPU")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Of several processes the first alone has an `out`."""
        result = super().parse_args(args, namespace)
        try:
            result.device = checked_device(getattr(result, "device", None))
            result.out = output_file(getattr(result, "out", None), self._rows, result.device) if is_chief() else None
        except ValueError as error:
            self.error(str(error))
        return result

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2."""
        self.exit(2, f"error: {message}\n")


def is_chief() -> bool:
    """Whether this is the process that prints and writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def checked_device(name: str | None) -> torch.device:
    """By default a GPU where there is one; "cuda" is each process's own. Raises ValueError where it is not there."""
    name = device_name(name)
    return torch.device(device_name(f"cuda:{os.environ.get('LOCAL_RANK', '0')}") if name == "cuda" else name)


def output_file(out: Path | None, rows: str | None, device: torch.device) -> Path | None:
    """Where rows go: `out`, else on a GPU benchmarks/results/ROWS.jsonl; a CPU's numbers are kept only when asked.

    Raises ValueError where nothing can be written there.
    """
    if out is None and rows is not None and device.type == "cuda":
        out = RESULTS / f"{rows}.jsonl"
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
        except OSError as error:
            raise ValueError(f"--out {out}: cannot be written: {reason(error)}") from None
    return out


def reason(error: Exception) -> str:
    """An error's message without the number and the path that Python puts beside it."""
    return getattr(error, "strerror", None) or str(error)


def at_least_one(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def frame_count(text: str) -> int:
    """The type of an option that counts frames, of which the model makes 4k + 1."""
    below = pixel_frames(latent_frames(at_least_one(text)))
    if below != int(text):
        raise argparse.ArgumentTypeError(f"{text} frames are not 4k + 1; nearest: {below} or {below + 4}")
    return int(text)
