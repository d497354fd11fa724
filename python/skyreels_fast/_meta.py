"""Modules that have no memory for their weights yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ._signals import Held


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """What is made here has parameters on the meta device, to load weights into.

    A signal that stops the run waits: raised while torch changes its stack of modes, it would leave that broken.
    """
    with Held(), torch.device("meta"):
        yield
