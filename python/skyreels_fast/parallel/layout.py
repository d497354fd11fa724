"""How the work of a model call is laid out over processes. Plain integers.

Rank = (branch * ring + place in the ring) * ulysses + place in the Ulysses group: the processes that exchange most are
neighbours, and so on one host. The processes of a branch are numbered alike; each has a slice of every frame's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from math import gcd
from typing import NamedTuple


@dataclass(frozen=True)
class Degrees:
    """What is asked for; None is chosen by `choose_layout`."""

    ulysses: int | None = None
    ring: int | None = None
    cfg_parallel: bool | None = None


class Layout(NamedTuple):
    """ulysses: processes that split the heads between them; ring: that pass keys and values round; branches: 2 where
    either guidance branch has processes of its own, else 1."""

    ulysses: int = 1
    ring: int = 1
    branches: int = 1

    @property
    def sequence(self) -> int:
        """Processes that share the tokens of a branch."""
        return self.ulysses * self.ring

    @property
    def size(self) -> int:
        return self.sequence * self.branches

    def ulysses_ranks(self) -> list[list[int]]:
        return [list(range(first, first + self.ulysses)) for first in range(0, self.size, self.ulysses)]

    def ring_ranks(self) -> list[list[int]]:
        firsts = [start + place for start in range(0, self.size, self.sequence) for place in range(self.ulysses)]
        return [list(range(first, first + self.sequence, self.ulysses)) for first in firsts]

    def __str__(self) -> str:
        branches = " in each guidance branch" if self.branches == 2 else ""
        return f"ulysses {self.ulysses} x ring {self.ring}{branches}"


def slices(tokens: int, parts: int) -> list[tuple[int, int]]:
    """(first, last + 1) of `parts` slices of a frame's tokens, as even as can be, the longer ones first."""
    length, longer = divmod(tokens, parts)
    starts = [part * length + min(part, longer) for part in range(parts + 1)]
    return list(zip(starts, starts[1:], strict=False))


def cut(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """(first, last + 1) of up to `parts` runs of neighbours, the dearest of which is as cheap as can be."""
    sums = [0, *accumulate(costs)]
    runs = {sums[stop] - sums[start] for start, stop in combinations(range(len(sums)), 2)}
    bounds = sorted(bound for bound in runs if bound >= max(costs))
    return next(found for found in (_filled(costs, bound) for bound in bounds) if len(found) <= parts)


def _filled(costs: Sequence[int], bound: int) -> list[tuple[int, int]]:
    """(first, last + 1) of runs of neighbours that cost up to `bound`, each as long as can be."""
    starts, filled = [0], 0
    for i, cost in enumerate(costs):
        if filled + cost > bound:
            starts.append(i)
            filled = 0
        filled += cost
    return list(zip(starts, [*starts[1:], len(costs)], strict=True))


def choose_layout(
    degrees: Degrees, size: int, *, heads: int, guided: bool, tokens_per_frame: int, guidance_scale: float = 1.0
) -> Layout:
    """The layout of `size` processes: guidance branches apart where it can be, then as much Ulysses as the heads allow.

    guided: whether the unconditional branch runs at `guidance_scale`. tokens_per_frame: h * w of the model's grid, each
        process has some.
    Raises ValueError, naming the degrees that work, where there is none as asked.
    """
    _check(degrees, size, guided, guidance_scale)
    apart = degrees.cfg_parallel if degrees.cfg_parallel is not None else guided and size % 2 == 0
    tried = [2] if degrees.cfg_parallel else [2, 1] if apart else [1]
    for branches in tried:
        sequence = size // branches
        ulysses = degrees.ulysses or (sequence // degrees.ring if degrees.ring else gcd(heads, sequence))
        layout = Layout(ulysses, degrees.ring or max(sequence // ulysses, 1), branches)
        if layout.size == size and heads % ulysses == 0 and sequence <= tokens_per_frame:
            return layout
    if size // tried[-1] > tokens_per_frame:
        raise ValueError(f"{size} processes are too many for frames of {tokens_per_frame} tokens: start fewer")
    asked = [("--ulysses_degree", degrees.ulysses), ("--ring_degree", degrees.ring)]
    flags = " ".join(f"{flag} {degree}" for flag, degree in asked if degree)
    works = ", ".join(_that_work(size, heads, tried))
    halves = f", {size // 2} for each guidance branch with --cfg_parallel" if tried == [2] else ""
    fits = f"{heads} heads and {size} processes{halves}"
    raise ValueError(f"{flags}: does not fit {fits}; ulysses x ring that do: {works}")


def _check(degrees: Degrees, size: int, guided: bool, guidance_scale: float) -> None:
    for flag, degree in (("--ulysses_degree", degrees.ulysses), ("--ring_degree", degrees.ring)):
        if degree is not None and degree < 1:
            raise ValueError(f"{flag} {degree}: must be at least 1")
    if degrees.cfg_parallel and size % 2:
        raise ValueError(f"--cfg_parallel: {size} processes do not make two halves; start an even number")
    if degrees.cfg_parallel and not guided:
        scale = f"guidance_scale={guidance_scale:g}"
        raise ValueError(f"--cfg_parallel: {scale} leaves a single branch; leave one of them out")


def _that_work(size: int, heads: int, tried: list[int]) -> list[str]:
    pairs = {
        (ulysses, size // branches // ulysses)
        for branches in tried
        for ulysses in range(1, size // branches + 1)
        if size // branches % ulysses == 0 and heads % ulysses == 0
    }
    return [f"{ulysses} x {ring}" for ulysses, ring in sorted(pairs, reverse=True)]
