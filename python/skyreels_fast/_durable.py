"""Files that are there whole or not at all, whatever becomes of the process or the machine."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNFINISHED = re.compile(r"\.\d+\.\w+")  # what a kill leaves of a file being written


def unfinished(folder: Path, suffix: str) -> Path:
    """A new file's name that nobody else writes to, not even an ffmpeg that outlives its killed program."""
    return folder / f".{time.time_ns()}{os.getpid()}{suffix}"


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file; when this returns it has reached the disk. Raises OSError, the old file untouched."""
    new = unfinished(path.parent, path.suffix)
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_folder(path.parent)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """As `write_whole`, of values as JSON."""
    write_whole(path, (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, as fsync of a file does its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
