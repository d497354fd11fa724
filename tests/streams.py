"""Copies on the CPU that show wrong orders, and models of more layers than there are slots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import published
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = 7


class LateCopies:
    """Copies that take as long as they may: from when they are queued the target holds NaN, until they are waited for.

    A target that is still in use, or used without waiting, spoils the result. log: ("mark", n), ("queue", target,
    source, after) and ("wait", target) in order; targets and sources by address.
    """

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self._marks = 0

    def mark(self) -> int:
        self._marks += 1
        self.log.append(("mark", self._marks))
        return self._marks

    def copy(self, target: Tensor, source: Tensor, after: int) -> LateCopy:
        self.log.append(("queue", target.data_ptr(), source.data_ptr(), after))
        return LateCopy(self, target, source)

    def named(self, kind: str) -> list[Any]:
        return [entry[1:] for entry in self.log if entry[0] == kind]


class LateCopy:
    def __init__(self, copies: LateCopies, target: Tensor, source: Tensor) -> None:
        self._copies, self._target, self._source = copies, target, source
        target.fill_(torch.nan)

    def wait(self) -> None:
        self._copies.log.append(("wait", self._target.data_ptr()))
        if self._source is not None:
            self._target.copy_(self._source)
            self._source = None


def deep_model(directory: Path, golden: str) -> Path:
    """A golden model with LAYERS blocks, each with weights of its own."""
    published(directory, golden=golden)
    file = directory / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    first = {name: tensor for name, tensor in weights.items() if name.startswith("blocks.0.")}
    for index in range(1, LAYERS):
        for name, tensor in first.items():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std().nan_to_num()
            weights[name.replace("blocks.0.", f"blocks.{index}.")] = tensor + 0.2 * noise
    save_file(weights, file)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_layers": LAYERS}))
    return directory
