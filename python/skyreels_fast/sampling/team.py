"""Who computes which part of a model call. Here: this process alone, all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from skyreels_fast.dit.model import Embedded

T = TypeVar("T")
Grid = tuple[int, int, int]


class Team(Protocol):
    """What the denoising loop asks of the processes that share its work.

    leads: whether this process is the one that reads and writes for all. sequence: among how many the tokens of a
    branch are shared out. token_range: this process's tokens of each frame, None for all. chain: how the processes
    share the VAE's layers (`vae.Chain`), None for one that has them all.
    """

    leads: bool
    sequence: int
    token_range: tuple[int, int] | None
    chain: Any
    attend: Callable[..., Tensor]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns, called in the leader alone."""

    def agree(self, value: T) -> T:
        """The leader's value."""

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""

    def branches(self, count: int) -> list[int]:
        """Which of `count` guidance branches this process computes."""

    def shard(self, embedded: Embedded) -> tuple[Embedded, Grid]:
        """`embedded` with this process's tokens alone (its grid stays the whole's), and the grid these make up."""

    def whole(self, parts: list[Tensor], grid: Grid) -> list[Tensor]:
        """The velocities of all branches, from this process's part of its own."""


class Alone:
    """A team of one, whose self-attention is `attend`."""

    leads, sequence, token_range, chain = True, 1, None, None

    def __init__(self, attend: Callable[..., Tensor] | None = None) -> None:
        self.attend = attend

    def first(self, make: Callable[[], T]) -> T:
        return make()

    def agree(self, value: T) -> T:
        return value

    def least(self, value: int) -> int:
        return value

    def branches(self, count: int) -> list[int]:
        return list(range(count))

    def shard(self, embedded: Embedded) -> tuple[Embedded, Grid]:
        return embedded, embedded.grid

    def whole(self, parts: list[Tensor], grid: Grid) -> list[Tensor]:
        return parts
