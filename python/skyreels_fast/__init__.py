"""SkyReels-V2 video generation on fused kernels: `Pipeline`, `Request`, `Result`; `ops` for other projects."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Pipeline", "Plan", "Progress", "Request", "Result", "__version__", "ops"]

if TYPE_CHECKING:
    from . import ops
    from .pipeline import Pipeline, Result
    from .plan import Plan
    from .request import Request
    from .stages import Progress

_MODULES = {"Pipeline": "pipeline", "Progress": "stages", "Result": "pipeline", "Plan": "plan", "Request": "request"}


def __getattr__(name: str) -> object:
    """Import a module when it is first asked for: `skyreels_fast.ops` alone must not bring in transformers."""
    if name == "ops":
        return import_module(".ops", __name__)
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
