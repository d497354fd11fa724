"""When a window's states are saved: its end, others now and then, and the last one when a signal stops the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .sampling.denoise import State


class Keeper:
    """Takes the states of one window from `denoise`, in a context; if a signal ends it, the last one is saved then.

    rows: of the window's schedule. first: the one it goes on from, saved already.
    save: called with a state and the states that the noise generators had with it. every_s: how often, by `clock`.
    """

    def __init__(
        self,
        rows: int,
        first: int,
        generators: Sequence[torch.Generator],
        save: Callable[[State, list[Tensor]], None],
        every_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._rows, self._saved, self._generators, self._save = rows, first, generators, save
        self._every_s, self._clock, self._saved_at = every_s, clock, clock()
        self._last: tuple[State, list[Tensor], torch.cuda.Event | None] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __call__(self, state: State) -> None:
        if state.row <= self._saved:
            return
        # The next row writes over the solver's history, and a signal may come in the midst of that.
        state = state._replace(history=tuple(tensor.clone() for tensor in state.history))
        self._last = state, [generator.get_state() for generator in self._generators], _mark(state.latents)
        if state.row == self._rows or self._clock() - self._saved_at >= self._every_s:
            self._save_last()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._last is not None and kind is not None and issubclass(kind, KeyboardInterrupt):
            self._save_last()
        self._last = None

    def _save_last(self) -> None:
        state, generators, made = self._last
        with _once(made, state.latents.device):
            self._save(state, generators)
        self._saved, self._saved_at, self._last = state.row, self._clock(), None


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    """What the device reaches as soon as the tensor is made."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def _once(made: torch.cuda.Event | None, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Reads of what `made` stands for that wait for no later work: a process that is gone may never let it end."""
    if made is None:
        return contextlib.nullcontext()
    stream = _stream(device)
    stream.wait_event(made)
    return torch.cuda.stream(stream)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: torch has 32 and deals them out in turn, so that another may be one that waits."""
    return torch.cuda.Stream(device)
