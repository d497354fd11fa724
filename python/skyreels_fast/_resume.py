"""What --resume needs: where a run's folder lies, what it keeps of the command line, and how to come back to it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._flags import ABOUT_USP, PROGRAMS, Parser, launched
from ._values import UsageError

_FILES = ("image", "end_image", "video_path", "prompt_file", "model_id")


def run_directory(video: Path) -> Path:
    """The folder beside a video, in which its run is kept until it is finished."""
    return video.with_suffix(".run")


def check_no_run(video: Path) -> None:
    """Raises UsageError where a run to the same file was broken off and has something to go on from."""
    folder = run_directory(video)
    if any(folder.glob("*.safetensors")):
        how = f"go on with --resume {shlex.quote(str(folder))}, or delete that folder"
        raise UsageError(f"--output {str(video)!r}: an unfinished run lies beside it: {how}")


def begun_with(program: str, mode: str, video: Path, flags: Mapping[str, Any], made_with: Mapping) -> dict[str, Any]:
    """What to keep in run.json of a run that begins; inputs by absolute paths, so that one can go on from anywhere."""
    kept = {flag: value for flag, value in flags.items() if flag not in ABOUT_USP}
    for flag in _FILES:
        if flag in kept and Path(kept[flag]).expanduser().exists():
            kept[flag] = os.path.abspath(os.path.expanduser(kept[flag]))
    how = {"go_on_with": resume_line(program, run_directory(video))}
    return how | {"mode": mode, "video": video.name, "flags": kept, "made_with": dict(made_with)}


def resumed(folder: str, mode: str, parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The arguments of the run in `folder`, save those given anew; its video as `output`. Raises UsageError."""
    from .run import RunError, read_manifest

    path = Path(folder)
    if path.suffix == ".mp4":
        path = run_directory(path)
    try:
        manifest = read_manifest(path)
    except RunError as error:
        if not path.exists() and _is_complete(path.with_suffix(".json")):
            raise UsageError(f"--resume {folder!r}: this run is finished: {path.with_suffix('.mp4')}") from None
        missing = f"no folder {path}: give the NAME.run that lies beside a broken-off NAME.mp4, or NAME.mp4 itself"
        raise UsageError(f"--resume {folder!r}: {error if path.exists() else missing}") from None
    if "flags" not in manifest:
        raise UsageError(f"--resume {folder!r}: this run was begun from Python: go on from there")
    if manifest["mode"] != mode:
        raise UsageError(f"--resume {folder!r}: this run is one of {PROGRAMS[manifest['mode']][0]}: go on with that")
    flags = {flag: tuple(v) if isinstance(v, list) else v for flag, v in manifest["flags"].items()}
    parser.set_defaults(**flags)
    args = parser.parse(argv)
    args.resume, args.output = str(path), str(path.parent / manifest["video"])
    return args


def notes(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since the run was begun and may change the last bits of what comes."""
    return [
        f"the run was begun with {name} {kept.get(name)}, this is {value}: the rest may differ in its last bits"
        for name, value in now.items()
        if kept.get(name) != value
    ]


def resume_line(program: str, folder: Path) -> str:
    """The command that goes on with a run."""
    words = launched(program)
    return shlex.join([*words, *(["--use_usp"] if words[0] == "torchrun" else []), "--resume", str(folder)])


def _is_complete(record: Path) -> bool:
    try:
        return json.loads(record.read_text(encoding="utf-8"))["complete"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False
