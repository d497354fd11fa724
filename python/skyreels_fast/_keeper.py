"""When a window's states are saved: its end, others now and then, and the last one whatever ends the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._signals import Held
from .sampling.denoise import State

_SETTLE_S = 1.0


class Keeper:
    """Takes the states of one window from `denoise`, in a context; if it ends by an error, the last one is saved then.

    States are copied to the host as the device makes them, so that saving one asks nothing of the device: after an
    error it may not answer, or wait for a process that is gone. The host gets no further ahead of it than one row.

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
        self._copies = (_Copy(rows), _Copy(rows))  # the newer one first; another thread may look at any moment
        self._saving, self._ended = threading.Lock(), False

    def __enter__(self) -> Keeper:
        return self

    def __call__(self, state: State) -> None:
        if state.row <= self._saved or self._ended:
            return
        newer, older = self._copies
        newer.wait()  # one that is whole stays while the next one comes
        older.take(state, [generator.get_state() for generator in self._generators])
        self._copies = older, newer
        if state.row == self._rows:
            older.wait()
            self._save_newest()
        elif self._clock() - self._saved_at >= self._every_s:
            self._save_newest()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                self.save_last()
        except Exception:
            if issubclass(kind, KeyboardInterrupt):
                raise  # an error has its own cause to tell
        finally:
            self._copies = ()

    @Held()
    def save_last(self) -> None:
        """Save the last state that the device has made, or makes in a moment, and take no more.

        Another thread may call it. A signal waits for it: torchrun sends one soon after another process is gone.
        """
        end = time.monotonic() + _SETTLE_S
        while any(copy.coming for copy in self._copies[:1]) and time.monotonic() < end:
            time.sleep(0.01)
        self._save_newest(last=True)

    @Held()
    def _save_newest(self, last: bool = False) -> None:
        with self._saving:
            newest = next((copy for copy in self._copies if copy.whole), None)
            if newest is not None and newest.state.row > self._saved and not self._ended:
                self._save(newest.state, newest.generators)
                self._saved, self._saved_at = newest.state.row, self._clock()
            self._ended |= last


class _Copy:
    """A state on the host, to which it comes from a GPU behind nothing that is queued after it was made.

    Whether it is whole the GPU writes to memory: a call would wait where another thread waits to queue work.
    """

    def __init__(self, rows: int) -> None:
        self.state: State | None = None
        self.generators: list[Tensor] = []
        self._rows = rows
        self._numbers: Tensor | None = None
        self._arrived: Tensor | None = None
        self._buffers: list[Tensor] = []
        self._done: torch.cuda.Event | None = None
        self._source: list[Tensor] = []

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self.state is not None and (self._done is None or self._arrived.item() == self.state.row)

    @property
    def coming(self) -> bool:
        """Whether there is something to come."""
        return self.state is not None and not self.whole

    def wait(self) -> None:
        """Until all of it has come, if there is anything to come. Raises what the device has failed by."""
        if self._done is not None:
            while not self._done.query():  # in Python, where a signal is heard
                time.sleep(0.001)
            self._source = []

    def take(self, state: State, generators: list[Tensor]) -> None:
        """Begin to copy another state here. Its history may be written to by work queued after this."""
        self.state, self.generators = None, generators
        # The solver writes over its history in the next row, and a signal may come in the midst of that.
        source = [state.latents.contiguous(), *(tensor.clone() for tensor in state.history)]
        there = self._sent(source, state.row) if state.latents.is_cuda else source
        self.state = State(state.row, there[0], tuple(there[1:]))

    def _sent(self, source: list[Tensor], row: int) -> list[Tensor]:
        device = source[0].device
        if self._done is None:
            self._numbers = torch.arange(self._rows + 1, device=device)
            self._arrived = _pinned(self._numbers[:1]).fill_(-1)
            self._buffers = [_pinned(tensor) for tensor in source]
            self._done = torch.cuda.Event()
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for buffer, tensor in zip(self._buffers, source, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            self._arrived.copy_(self._numbers[row : row + 1], non_blocking=True)
            self._done.record()
        self._source = source  # kept until it has been read
        return self._buffers


def _pinned(tensor: Tensor) -> Tensor:
    """Host memory for what the tensor holds. Where it is not pinned, the host waits for copies to it."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # the system refuses, or the device has failed, which the next call reports
        return torch.empty(tensor.shape, dtype=tensor.dtype)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: torch has 32 and deals them out in turn, so that another may be one that waits."""
    return torch.cuda.Stream(device)
