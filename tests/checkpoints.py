"""Small model directories for the tests, made from the golden models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from conftest import GOLDEN
from safetensors.torch import save_file
from torch import Tensor

from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.dit.model import DiT


def published(directory: Path, *, golden: str = "df", weights: bool = True) -> Path:
    """A golden model as a directory of its own, in the published layout."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / golden / "config.json", directory)
    if weights:
        shutil.copy(GOLDEN / golden / "model.safetensors", directory)
    return directory


def save_shards(directory: Path, weights: dict[str, Tensor], stem: str, count: int, *, index: bool = False) -> None:
    names, placed = sorted(weights), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = names[i::count]
        save_file({name: weights[name] for name in shard}, directory / file)
        placed |= dict.fromkeys(shard, file)
    if index:
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def meta_dit(checkpoint: Checkpoint) -> DiT:
    with torch.device("meta"):
        return DiT(checkpoint.config)


def loaded(directory: Path) -> DiT:
    checkpoint = Checkpoint.open(directory)
    model = meta_dit(checkpoint)
    checkpoint.check_transformer(model)
    checkpoint.load_transformer(model, "cpu", torch.float32)
    return model
