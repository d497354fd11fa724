"""Weights into host and device memory: several reads in flight, no second copy on the host.

A tensor that is mapped from a file is read from that file, chunk by chunk, by threads: into pinned memory and from
there to the device on a stream of the thread's own, where it is also cast. Page faults would bring one thread 4 KiB at
a time.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .host_memory import HostMemoryError

CHUNK_BYTES = 8 * 2**20
_MAX_THREADS = 16  # one core copies about 8 GB/s, PCIe takes 55
_INLINE_BYTES = 4 * CHUNK_BYTES  # below, threads cost more than they bring


class Source(NamedTuple):
    """A contiguous tensor in host memory and, where its memory is mapped from a file, the file and where it begins."""

    tensor: Tensor
    file: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class Rows:
    """A parameter's data: tensors of a checkpoint one below the other, each made or mapped when it is asked for."""

    shape: torch.Size
    sources: Mapping[str, Tensor]
    names: tuple[str, ...]

    def tensors(self) -> Iterator[Tensor]:
        return (self.sources[name].detach() for name in self.names)

    def pairs(self, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor with the rows of `target`, which has the parameter's shape, that it is."""
        if len(self.names) == 1:
            yield self.sources[self.names[0]].detach(), target
            return
        start = 0
        for tensor in self.tensors():
            yield tensor, target[start : start + tensor.shape[0]]
            start += tensor.shape[0]


class Ready:
    """Copies that have been queued: `wait` lets the current stream, not the host, wait for them."""

    def __init__(self, events: Sequence[torch.cuda.Event] = (), device: torch.device | None = None) -> None:
        self._events, self._device = events, device

    def wait(self) -> None:
        for event in self._events:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Lane:
    """What one thread needs to send chunks to a device: a stream, and two pinned chunks so that reads overlap sends."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device):
                self._chunks = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        except RuntimeError as error:
            raise HostMemoryError(f"{2 * CHUNK_BYTES // 2**20} MiB of host memory cannot be pinned") from error
        self._sent = [torch.cuda.Event() for _ in self._chunks]
        self._turn = 0

    def chunk(self) -> Tensor:
        """The pinned chunk to fill next, when what it held has been sent."""
        self._turn = 1 - self._turn
        self._sent[self._turn].synchronize()
        return self._chunks[self._turn]

    def send(self, source: Tensor, target: Tensor, after: torch.cuda.Event) -> None:
        """Queue a copy of the last chunk's data to the device; where dtypes differ it is cast there."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            if source.dtype != target.dtype:
                source = source.to(target.device, non_blocking=True)
            target.copy_(source, non_blocking=True)
            self._sent[self._turn].record()


class Reader:
    """Copies tensors from host memory or files to `device`, which may be the CPU, with several threads.

    A context manager: leaving it ends the threads.
    """

    def __init__(self, device: torch.device | str, threads: int | None = None) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())  # threads have one of their own
        self._pool = ThreadPoolExecutor(threads or _threads(), thread_name_prefix="weights")
        self._local = threading.local()
        self._lanes: list[_Lane] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown()

    def mark(self) -> torch.cuda.Event | None:
        """The point that the current stream's work has come to."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, pairs: Iterable[tuple[Source, Tensor]], after: torch.cuda.Event | None = None) -> Ready:
        """Read sources into targets, each contiguous and of as many elements; they may differ in dtype.

        Returns when everything has been read and its copies are queued; those to a GPU begin when it has come to
        `after`, by default to the current stream's work so far. Raises OSError where a file cannot be read.
        """
        after = after or self.mark()
        files: dict[str, int] = {}
        try:
            pieces, total = [], 0
            for source, target in pairs:
                if source.file is not None and source.file not in files:
                    files[source.file] = os.open(source.file, os.O_RDONLY)
                total += source.tensor.nbytes
                pieces += _pieces(source, target, files.get(source.file))
            self._read_all(pieces, after, at_once=total >= _INLINE_BYTES)
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        events = []
        for lane in self._lanes:
            events.append(torch.cuda.Event())
            events[-1].record(lane.stream)
        return Ready(events, self._device)

    def _read_all(self, pieces: list[_Piece], after: torch.cuda.Event | None, *, at_once: bool) -> None:
        if not at_once:
            for piece in pieces:
                self._read(piece, after)
            return
        reads = [self._pool.submit(self._read, piece, after) for piece in pieces]
        wait(reads)  # all of them, so that none is left to read from a file that is closed
        for read in reads:
            read.result()

    def _read(self, piece: _Piece, after: torch.cuda.Event | None) -> None:
        target, dtype = piece.target, piece.source.dtype
        if target.device.type == "cpu":
            if target.dtype == dtype:
                piece.read(target)
            else:
                scratch = torch.empty(target.shape, dtype=dtype)
                piece.read(scratch)
                target.copy_(scratch)
            return
        lane = self._lane()
        chunk = lane.chunk()[: piece.source.nbytes].view(dtype)
        piece.read(chunk)
        lane.send(chunk, target, after)

    def _lane(self) -> _Lane:
        if not hasattr(self._local, "lane"):
            self._local.lane = _Lane(self._device)
            self._lanes.append(self._local.lane)
        return self._local.lane


class _Piece(NamedTuple):
    """At most a chunk of a source: flat tensors of the same length; where it is in an open file, if it is."""

    source: Tensor
    target: Tensor
    descriptor: int | None
    offset: int

    def read(self, out: Tensor) -> None:
        """Fill `out`, of the source's dtype, in host memory; other threads run meanwhile."""
        held = out.view(torch.uint8).numpy()
        if self.descriptor is None:
            np.copyto(held, self.source.view(torch.uint8).numpy())
            return
        done = 0
        while done < len(held):
            count = os.preadv(self.descriptor, [held[done:]], self.offset + done)
            if not count:
                raise OSError(f"a weight file ends at byte {self.offset + done}, in the middle of a tensor")
            done += count


def _pieces(source: Source, target: Tensor, descriptor: int | None) -> Iterator[_Piece]:
    tensor, size = source.tensor.reshape(-1), source.tensor.element_size()
    target, step = target.view(-1), CHUNK_BYTES // size
    for start in range(0, len(tensor), step):
        part = slice(start, start + step)
        yield _Piece(tensor[part], target[part], descriptor, source.offset + start * size)


def _threads() -> int:
    return max(2, min(_MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))


def located(tensors: Iterable[Tensor]) -> list[Source]:
    """Each tensor with the file that its memory is mapped from, where the kernel says that it is mapped from one."""
    mappings = _mappings()
    starts = [mapping[0] for mapping in mappings]
    return [_located(tensor.contiguous(), mappings, starts) for tensor in tensors]


def _located(tensor: Tensor, mappings: list[tuple[int, int, str, int]], starts: list[int]) -> Source:
    place = tensor.data_ptr() if tensor.device.type == "cpu" else 0
    index = bisect_right(starts, place) - 1
    if index >= 0 and place + tensor.nbytes <= mappings[index][1]:
        start, _, file, offset = mappings[index]
        return Source(tensor, file, offset + place - start)
    return Source(tensor)


def _mappings() -> list[tuple[int, int, str, int]]:
    """This process's mapped files: address from and to, path, offset in the file. [] where the system does not tell."""
    found, same = [], {}
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                bounds, _, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
                if not path or not path[0].startswith("/"):
                    continue
                file = path[0]
                if (file, inode) not in same:
                    same[file, inode] = _is_inode(file, int(inode))
                if same[file, inode]:
                    start, end = (int(bound, 16) for bound in bounds.split("-"))
                    found.append((start, end, file, int(offset, 16)))
    except (OSError, ValueError):
        return []
    return sorted(found)


def _is_inode(file: str, inode: int) -> bool:
    """Whether the path still names the file that was mapped."""
    try:
        return os.stat(file).st_ino == inode
    except OSError:
        return False


@torch.inference_mode(False)
def load(module: nn.Module, rows: Mapping[str, Rows], device: torch.device | str, dtype: torch.dtype) -> None:
    """Give the parameters of `module` that `rows` names their data, on `device` in `dtype`.

    A tensor that is there already becomes the parameter as it is: on the CPU, mapped to its file.
    """
    device = torch.device(device)
    copies: list[tuple[Tensor, Tensor]] = []
    for name, row in rows.items():
        data = _there(row, device, dtype)
        if data is None:
            data = torch.empty(row.shape, dtype=dtype, device=device)
            copies += _from_host(row.pairs(data))
        put(module, name, data)
    with Reader(device) as reader:
        sources = located(source for source, _ in copies)
        reader.copy(zip(sources, (target for _, target in copies), strict=True)).wait()


def put(module: nn.Module, name: str, data: Tensor) -> None:
    """Make `data` the parameter of that name; it keeps whether it wants a gradient."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    setattr(parent, leaf, nn.Parameter(data, requires_grad=getattr(parent, leaf).requires_grad))


def _there(row: Rows, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A parameter's data where no copy from the host is needed for it."""
    if len(row.names) > 1:
        return None
    (tensor,) = row.tensors()
    is_there = tensor.device.type == device.type and (tensor.dtype == dtype or device.type != "cpu")
    return tensor.to(device=device, dtype=dtype).contiguous() if is_there else None


def _from_host(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs with sources in host memory; others are copied right away, so that they need not be held."""
    for source, target in pairs:
        if source.device.type == "cpu":
            yield source, target
        else:
            target.copy_(source)
