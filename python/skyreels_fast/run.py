"""A run's directory: what a run has got done, as it gets it, so that a broken-off run goes on from there.

    run.json                    what the run is (see `identity.py`), how to begin it, how many windows are out
    window-00000.safetensors    a window's clean latents and the noise generators' states after it
    steps.safetensors           the window in progress, between two rows of its schedule
    history-00001.safetensors   the frames that the next window begins with, where so many windows are out

Every file is there whole or not at all; run.json is replaced last, so that it never speaks of what is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ._durable import UNFINISHED, write_json, write_whole
from ._keeper import Keeper
from ._signals import Held
from .identity import difference
from .sampling.denoise import State

if TYPE_CHECKING:
    from .conditions import History

FORMAT = 1
SAVE_EVERY_S = 60.0
_MANIFEST, _STEPS, _LOCK = "run.json", "steps.safetensors", "lock"
_HISTORY = re.compile(r"history-\d+\.safetensors")


class RunError(ValueError):
    """A run directory that cannot be gone on with: one line that says why and what to do."""


class Outlet(Protocol):
    """Where a run's frames go and stay: what is there up to a cut is not made again."""

    def cut(self) -> tuple[int, ...]:
        """End what goes together, have it reach the disk, and say where to go on."""
        ...


class Run:
    """What is saved of one run, in `directory`; with None nothing is.

    outlet: keeps the frames put out. Without one, the windows that are done are decoded again from their latents.
    every_s: how often the window in progress is saved, by `clock`.

    Attributes: windows, how many the outlet has.

    Writing raises OSError when the disk is full; what was saved before stays.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None,
        outlet: Outlet | None = None,
        every_s: float = SAVE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.outlet, self.windows = outlet, 0
        self._every_s, self._clock = every_s, clock
        self._manifest: dict[str, Any] | None = None
        self._generators: tuple[torch.Generator, ...] = ()
        self._lock: IO[str] | None = None
        self._keeper: Keeper | None = None

    def begin(self, identity: Mapping[str, Any], anew: bool = False, **more: Any) -> None:
        """Take up the directory's run, or make it and begin one; `more` is kept in run.json.

        anew: begin one, too, where the run there has saved nothing yet.

        Raises RunError where the run there is another one, or another process is at it.
        """
        if self.directory is None:
            return
        try:
            if self._manifest is None:
                self._open({"format": FORMAT, "identity": dict(identity), "windows": 0, "mark": None, **more}, anew)
            if changed := difference(self._manifest["identity"], identity, self.directory):
                raise RunError(changed)
        except BaseException:
            if self._manifest is None and self._lock is not None:
                self._leave_nothing()
            self.release()
            raise

    @property
    def seed(self) -> int | None:
        """That of the run in the directory; None where there is none. Raises RunError."""
        if self.directory is None or not (self.directory / _MANIFEST).exists():
            return None
        return read_manifest(self.directory)["identity"].get("seed")

    @property
    def kept(self) -> dict[str, Any]:
        """What run.json holds."""
        return self._manifest

    @property
    def finished(self) -> bool:
        return bool(self._manifest.get("finished"))

    @property
    def mark(self) -> list[int] | None:
        """Where the outlet goes on."""
        return self._manifest["mark"]

    @property
    def has_something(self) -> bool:
        """Whether going on from here would spare any work."""
        return self.directory is not None and any(self.directory.glob("*.safetensors"))

    @property
    def rows_saved(self) -> int:
        """Schedule rows that are done of the windows that the outlet does not have."""
        if self.directory is None:
            return 0
        done = {}
        for path in sorted(self.directory.glob(_STEPS)) + sorted(self.directory.glob("window-*.safetensors")):
            metadata = _read_metadata(path)
            done[int(metadata["window"])] = int(metadata["row"])  # a window's own file comes last and counts
        return sum(row for window, row in done.items() if window >= self.windows)

    def rewind(self) -> None:
        """What the outlet had is lost: put all windows out again, from their latents where these are there."""
        self._manifest |= {"windows": 0, "mark": None, "finished": False}
        self.windows = 0

    def attach(self, generators: tuple[torch.Generator, ...], history: History) -> None:
        """Set the noise generators and the history to where the windows that are out have left them."""
        self._generators = generators
        if not self.windows:
            return
        self._load(self._window(self.windows - 1))
        tensors, _ = _read(self._history(self.windows))
        if tensors:
            history.add(tensors["frames"])

    def state(self, index: int) -> State | None:
        """Where window `index` was left, the noise generators set to what they were there; None if it never began."""
        if self.directory is None:
            return None
        if self._window(index).exists():
            return self._load(self._window(index))
        steps = self.directory / _STEPS
        return self._load(steps) if steps.exists() and _read_metadata(steps)["window"] == str(index) else None

    @contextlib.contextmanager
    def keeper(self, index: int, rows: int, first: int) -> Iterator[Keeper | None]:
        """A context that gives what window `index`, of so many rows, shall hand its states to after row `first`."""
        if self.directory is None:
            yield None
            return
        save_state = partial(self._save, index, rows)
        try:
            with Keeper(rows, first, self._generators, save_state, self._every_s, self._clock) as self._keeper:
                yield self._keeper
        finally:
            self._keeper = None

    def save_last(self) -> None:
        """Save what there is of the window in progress; another thread may call it. Raises OSError."""
        if keeper := self._keeper:
            keeper.save_last()

    @Held()
    def put_out(self, index: int, history: History) -> None:
        """All frames of window `index` have been taken: note it, with what the next window begins with."""
        if self.outlet is None or self.directory is None:
            return
        mark = list(self.outlet.cut())
        kept = history.whole()
        write_whole(self._history(index + 1), save({} if kept is None else {"frames": kept.contiguous()}))
        self.windows = index + 1
        self._manifest |= {"windows": self.windows, "mark": mark}
        self._write()
        for file in self.directory.iterdir():
            if _HISTORY.fullmatch(file.name) and file != self._history(self.windows):
                file.unlink()

    def finish(self) -> None:
        """Note that nothing is left to be done but to remove the directory."""
        self._manifest["finished"] = True
        self._write()

    def remove(self) -> None:
        """Delete the directory, run.json last. Raises OSError."""
        for file in sorted(self.directory.iterdir(), key=lambda file: file.name == _MANIFEST):
            file.unlink()
        self.directory.rmdir()
        self.release()

    def withdraw(self) -> None:
        """Leave no folder of a run that came to nothing, and let go of any other."""
        if self._manifest is not None and not self.has_something:
            with contextlib.suppress(OSError):
                self.remove()
        self.release()

    def release(self) -> None:
        """Let another process go on with the run."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def released_after(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """The chunks of the run, which is let go when they end, however they do."""
        try:
            yield from chunks
        finally:
            self.release()

    def _save(self, index: int, rows: int, state: State, generators: list[Tensor]) -> None:
        done = state.row == rows
        tensors = {"latents": state.latents} | {f"generator.{i}": kept for i, kept in enumerate(generators)}
        if not done:
            tensors |= {f"history.{i}": tensor for i, tensor in enumerate(state.history)}
        metadata = {"window": str(index), "row": str(state.row)}
        path = self._window(index) if done else self.directory / _STEPS
        write_whole(path, save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata))
        if done:
            (self.directory / _STEPS).unlink(missing_ok=True)

    def _load(self, path: Path) -> State:
        tensors, metadata = _read(path)
        for i, generator in enumerate(self._generators):
            generator.set_state(tensors[f"generator.{i}"])
        history = tuple(tensors[name] for name in sorted(tensors) if name.startswith("history."))
        return State(int(metadata["row"]), tensors["latents"], history)

    def _open(self, manifest: dict[str, Any], anew: bool) -> None:
        """Read run.json, or write `manifest` to it where there is none."""
        folder, path = self.directory, self.directory / _MANIFEST
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = [name for name in os.listdir(folder) if UNFINISHED.fullmatch(name)]
        if not path.exists() and {*os.listdir(folder)} - {_LOCK, *unfinished}:
            raise RunError(f"{folder} holds other files and no run: choose another folder")
        self._take_lock()
        for name in unfinished:
            (folder / name).unlink(missing_ok=True)
        if not path.exists() or (anew and not self.has_something):
            write_json(path, manifest)
        self._manifest = read_manifest(folder)
        self.windows = self._manifest["windows"] if self.outlet is not None else 0

    def _write(self) -> None:
        write_json(self.directory / _MANIFEST, self._manifest)

    def _window(self, index: int) -> Path:
        return self.directory / f"window-{index:05d}.safetensors"

    def _history(self, windows: int) -> Path:
        return self.directory / f"history-{windows:05d}.safetensors"

    def _leave_nothing(self) -> None:
        """Take back the folder of a run that could not even begin."""
        with contextlib.suppress(OSError):
            if os.listdir(self.directory) == [_LOCK]:
                (self.directory / _LOCK).unlink()
                self.directory.rmdir()

    def _take_lock(self) -> None:
        import fcntl

        lock = open(self.directory / _LOCK, "a")  # noqa: SIM115 - closed by `release`
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunError(f"{self.directory} is in use: another process is rendering this run") from None
        self._lock = lock


def read_manifest(directory: Path) -> dict[str, Any]:
    """What run.json holds. Raises RunError where there is none, or one of another version."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except FileNotFoundError:
        raise RunError(f"{directory} is no run directory: it holds no {_MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{directory / _MANIFEST} cannot be read: {error}") from None
    if not known:
        raise RunError(f"{directory / _MANIFEST} is of another version of skyreels_fast: go on with that one")
    return manifest


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return file.metadata()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it, and what it holds is made again") from None
