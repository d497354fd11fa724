"""Numbers and lists in messages."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """1 frame, 2 frames."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(items: Iterable[object], word: str = "and") -> str:
    """a, b and c."""
    *first, last = map(str, items)
    return f"{', '.join(first)} {word} {last}" if first else last
