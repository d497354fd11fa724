"""Host memory that a GPU reads by itself: how much of it there may be, and buffers of it."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30
PINNED_VARIABLE = "SKYREELS_FAST_PINNED_GIB"
_SPARE_SHARE, _SPARE_BYTES = 0.2, 8 * GIB
_CGROUP = Path("/sys/fs/cgroup")


class HostMemoryError(MemoryError):
    """Host memory cannot be had; one line."""


class PinnedBuffer:
    """Host memory that copies to the GPU run from at full speed and beside everything else.

    Filling it first and pinning it then lets the threads that fill it have the pages made, and rounds no size up.

    Attributes: data: uint8 [nbytes].
    Raises HostMemoryError where there is no memory.
    """

    def __init__(self, nbytes: int) -> None:
        # Shared memory, which is what Python maps unless told, has no large pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            pages = mmap.mmap(-1, max(nbytes, 1), **private)
        except (OSError, ValueError) as error:
            raise HostMemoryError(f"{nbytes / GIB:.1f} GiB of host memory cannot be had ({error})") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        self.data: Tensor = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]

    def pin(self, device: torch.device) -> bool:
        """Pin the pages for as long as this object lives; False where the system refuses."""
        runtime, address = torch.cuda.cudart(), self.data.data_ptr()
        with torch.cuda.device(device):
            if int(runtime.cudaHostRegister(address, self.data.nbytes, 0)) != 0:
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=device)  # the runtime reports the refusal once more, to the next launch
                return False
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False
        return True


def pinnable_bytes(held: int = 0) -> int:
    """Host memory that may be pinned beside `held` bytes: what is available less a fifth, or 8 GiB where that is more;
    of several processes that torchrun has started on this host each may have as much as the next.

    $SKYREELS_FAST_PINNED_GIB, where set, is the whole that may be pinned: for machines that tell less memory than they
    have, as some virtual ones do. Raises ValueError where it is no number.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if given := os.environ.get(PINNED_VARIABLE):
        try:
            return max(0, int(float(given) * GIB) // processes - held)
        except (ValueError, OverflowError):
            raise ValueError(f"{PINNED_VARIABLE}={given!r} is not a number of GiB") from None
    available = available_bytes()
    return max(0, available - max(int(available * _SPARE_SHARE), _SPARE_BYTES)) // processes


def available_bytes() -> int:
    """Memory that programs can still have, by the kernel's estimate and this process's cgroup limits."""
    return min((limit for limit in (_meminfo(), _cgroup_left()) if limit is not None), default=0)


def _meminfo() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left() -> int | None:
    """What the tightest of the cgroups above this process leaves; None without a limit.

    Pages of files that were read count as used there, though they make way when memory is wanted.
    """
    left = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        root = _CGROUP if is_v2 else _CGROUP / "memory"
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group != root and root not in group.parents:
                break
            limit, used = (next(iter(_lines(group / name)), "") for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
                left.append(int(limit) - int(used) + _file_pages(group))
    return max(0, min(left)) if left else None


def _file_pages(group: Path) -> int:
    names = {"inactive_file", "active_file"}
    pairs = (line.split() for line in _lines(group / "memory.stat"))
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in names)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
