"""A directory or hub id → strict, renamed, memory-mapped weights."""

from __future__ import annotations

from .fill import check, fill
from .model import Checkpoint
from .weights import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "check", "fill"]
