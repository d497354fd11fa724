"""Another forward for a module that stays itself: its class, its parameters and whatever hooks it carries.

Offloading and caching put their own wrappers in place of `module.forward` and keep the one they found. So the forward
to replace is the innermost one, wherever it stands, and a wrapper that comes later finds the replacement.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn


class Replacement:
    """A forward of `module`: a callable that uses the module's own layers and parameters and holds none itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def _places(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where the module's innermost forward may stand, as (object, attribute)."""
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "forward" if reference.original_forward is None else "original_forward"
    if hasattr(module, "_old_forward"):  # accelerate's
        yield module, "_old_forward"
    yield module, "forward"


def _place(module: nn.Module) -> tuple[Any, str]:
    for holder, name in _places(module):
        forward = getattr(holder, name)
        own = inspect.ismethod(forward) and forward.__self__ is module and forward.__func__ is type(module).forward
        if own or isinstance(forward, Replacement):
            return holder, name
    raise ValueError(f"the forward of a {type(module).__name__} is already replaced by others: undo that first")


def check_replaceable(module: nn.Module) -> None:
    """Raises ValueError where something unknown stands in place of the module's forward."""
    _place(module)


def install(replacement: Replacement) -> None:
    """Put it in place of its module's forward, under any hooks."""
    holder, name = _place(replacement.module)
    setattr(holder, name, replacement)


def remove(module: nn.Module) -> None:
    """Give the module its own forward back; nothing happens where it has it."""
    holder, name = _place(module)
    if not isinstance(getattr(holder, name), Replacement):
        return
    if holder is module and name == "forward":
        del module.forward
    else:
        setattr(holder, name, MethodType(type(module).forward, module))
