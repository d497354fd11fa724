"""How everything here is timed and written down: CUDA events, peaks of memory, rows that say where they come from.

A row is one JSON object on one line. Every row carries `common()`: the run (one process), the time, the GPU, versions
and the commit. Where there is no GPU a host clock stands in for the events and peaks are null.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
COMMIT_VARIABLE = "SKYREELS_FAST_COMMIT"  # `git describe --always --dirty --abbrev=40`, for a tree that has no .git
_FLUSH_BYTES = 512 * 2**20  # several times the L2 of any GPU
_PACKAGES = ("triton", "diffusers", "flash-attn", "flash-attn-3", "fa3-fwd", "xfuser", "skyreels-fast")


class Clock:
    """Marks in a device's queue of work, and the seconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """A point in time: of the device when it comes to it, without waiting; on the CPU of the host."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Waits until the device has come to `stop`."""
        if self._device.type != "cuda":
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


@dataclass(frozen=True)
class Timing:
    """Median and 20th and 80th percentile of some repeats, in seconds."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Raises ValueError where there is nothing to take a median of."""
        if not seconds:
            raise ValueError("no repeat was timed")
        p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
        return cls(median, p20, p80, len(seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    function: Callable[[], object],
    device: torch.device,
    *,
    budget_s: float = 0.5,
    repeats: tuple[int, int] = (10, 200),
    warm_up: int = 3,
    flush: bool = True,
) -> Timing:
    """Time `function`, which queues its work on the device's current stream.

    After `warm_up` calls it runs as often as fits into `budget_s`, within `repeats` (least, most). Before each timed
    call the L2 cache is overwritten, unless not `flush`; the time for that is not counted.
    """
    clock = Clock(device)
    for _ in range(max(warm_up, 1)):
        start = clock.mark()
        function()
        stop = clock.mark()
    once = max(clock.seconds(start, stop), 1e-7)
    count = int(min(max(budget_s / once, repeats[0]), repeats[1]))
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if flush and device.type == "cuda" else None
    marks = []
    for _ in range(count):
        if cache is not None:
            cache.zero_()
        start = clock.mark()
        function()
        marks.append((start, clock.mark()))
    return Timing.of([clock.seconds(*pair) for pair in marks])


def copy_gbps(device: torch.device, mib: int | None = None) -> float:
    """GB/s of a device-to-device copy, bytes read and written counted: the ceiling of what is bound by memory."""
    count = (mib or (2048 if device.type == "cuda" else 16)) * 2**20 // 4
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device, flush=False).median / 1e9


def memory_bound(row: dict[str, Any]) -> bool:
    """Whether GB/s is what counts for an op's row, or else TFLOP/s: an H200 has time for 190 operations a byte."""
    return row["flops"] < 190 * row["bytes"]


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks_gib(device: torch.device) -> tuple[float | None, float | None]:
    """GiB (allocated, reserved) at most since `reset_peaks`, of torch's allocator; None without a GPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB


@lru_cache(maxsize=1)
def run_id() -> str:
    """One name a process: rows that share it were measured beside each other."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


@lru_cache(maxsize=1)
def commit() -> tuple[str | None, bool | None]:
    """(commit, whether the tree differs from it, results apart), from git or else $SKYREELS_FAST_COMMIT."""
    if described := os.environ.get(COMMIT_VARIABLE, "").strip():
        return described.removesuffix("-dirty"), described.endswith("-dirty")
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return None, None
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head, bool(status)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    """Of Python, torch, CUDA, the driver, the packages that matter, and how the CUDA extension was built (or None)."""
    from skyreels_fast.ops._dispatch import extension

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["driver"] = driver.splitlines()[0] if driver else None
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["extension"] = extension.build_info() if extension else None
    return found


def common(device: torch.device) -> dict[str, Any]:
    """What every row of this run says: run_id, time (UTC), gpu, versions, commit, dirty."""
    head, dirty = commit()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    where = {"run_id": run_id(), "time": now, "gpu": gpu_name(device)}
    return {**where, "versions": versions(), "commit": head, "dirty": dirty}


def provenance(device: torch.device) -> str:
    """`common()` in a line for the terminal."""
    (head, dirty), found = commit(), versions()
    where = f"commit {head[:10]}{' and changes' if dirty else ''}" if head else f"no commit: set ${COMMIT_VARIABLE}"
    built = f"extension for {', '.join(found['extension']['archs'])}" if found["extension"] else "no extension"
    return f"run {run_id()}: {where}, {gpu_name(device)}, torch {found['torch']}, {built}"


def append(file: Path | None, row: dict[str, Any]) -> None:
    """Add one line to a file of rows, on the disk when this returns; None writes nothing.

    Raises ValueError for numbers that JSON has none for (NaN, infinity).
    """
    line = json.dumps(_rounded(row), allow_nan=False) + "\n"
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(line)
        out.flush()
        os.fsync(out.fileno())


def keep(rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str], file: Path | None) -> None:
    """Print each row as its `line` and `append` it, as soon as it is there."""
    for row in rows:
        print(line(row), flush=True)
        append(file, row)


def _rounded(value: Any) -> Any:
    """Floats to six digits, which is more than any clock here tells."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file. Raises ValueError naming the line that is none."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number} is no JSON ({error})") from error
        if not isinstance(row, dict) or "bench" not in row:
            raise ValueError(f"{file}:{number} is no row of a benchmark: it has no 'bench'")
        rows.append(row)
    return rows
