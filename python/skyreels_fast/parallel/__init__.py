"""Several processes, a GPU each, for one video: sequence shards (Ulysses x ring) and both guidance branches at once."""

from __future__ import annotations

from .layout import Degrees, Layout, choose_layout
from .meeting import RefusedError, is_lost_peer, meet, require, settled
from .team import Team
from .world import LeaderError, World

__all__ = [
    "Degrees",
    "Layout",
    "LeaderError",
    "RefusedError",
    "Team",
    "World",
    "choose_layout",
    "is_lost_peer",
    "meet",
    "require",
    "settled",
]
