"""The video DiT: a stateless `embed()`, `run_blocks()`, `head()`."""

from __future__ import annotations

from skyreels_fast.dit.block import Attend, Block
from skyreels_fast.dit.context import Context
from skyreels_fast.dit.model import DiT, Embedded

__all__ = ["Attend", "Block", "Context", "DiT", "Embedded"]
