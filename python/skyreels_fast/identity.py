"""What decides about a run's frames, in a form that can be kept and compared: model, settings, inputs, precision."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .request import Settings

_EDGE_BYTES = 2**20


def identity(
    checkpoint: Checkpoint,
    settings: Settings,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    attention: str,
) -> dict[str, Any]:
    """What decides about a run's frames, as JSON: weights by the edges of their files, inputs by their contents."""
    values = {f"model file {name}": _edges(path) for name, path in checkpoint.files().items()}
    for field in dataclasses.fields(settings):
        if field.name != "notes":
            values[field.name] = _comparable(field.name, getattr(settings, field.name))
    precision = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    return values | {"device": device.type, **precision, "attention": attention}


def _comparable(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        return _digest(str((value.dtype, tuple(value.shape))).encode(), value.view(torch.uint8).numpy())
    if hasattr(value, "__array_interface__"):  # arrays and PIL images
        array = np.ascontiguousarray(value)
        return _digest(str((array.dtype, array.shape)).encode(), array)
    if name in ("image", "end_image", "video") and value is not None:
        return _edges(Path(value))
    return value


def _digest(*parts: Any) -> dict[str, str]:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {"sha256": digest.hexdigest()}


def _edges(path: Path) -> dict[str, Any]:
    """A file's size and the digest of its first and last MiB: names, shapes and some values of any weights file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        return {"bytes": size} | _digest(start, file.read())


def difference(known: Mapping[str, Any], new: Mapping[str, Any], directory: Path) -> str | None:
    """One line on the first thing that is not as in the identity kept in a run's `directory`; None if all is."""
    new = json.loads(json.dumps(new))
    for name in [*known, *(name for name in new if name not in known)]:
        if known.get(name) != new.get(name):
            return _line(directory, name, known.get(name), new.get(name))
    return None


def _line(directory: Path, name: str, known: Any, new: Any) -> str:
    if name.startswith("model file "):
        file = name.removeprefix("model file ")
        return f"the run in {directory} was begun with another model: its {file} differs; give the same model"
    if isinstance(known, dict) or isinstance(new, dict):
        return f"{name}: differs from what the run in {directory} was begun with; give the same"
    if name == "prompts" and isinstance(known, list) and isinstance(new, list):
        return _different_prompts(directory, known, new)
    shown = [repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..." for value in (known, new)]
    return f"{name}={shown[1]}: the run in {directory} was begun with {shown[0]}; give the same"


def _different_prompts(directory: Path, known: list, new: list) -> str:
    at = next((i for i, (a, b) in enumerate(zip(known, new, strict=False)) if a != b), min(len(known), len(new)))
    return f"prompts: number {at + 1} differs from that of the run in {directory}; give the same {len(known)} prompts"
