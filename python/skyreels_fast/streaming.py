"""Layers that are on the GPU only while they run: their weights pass through two slots, in order, again and again.

While one layer runs, the next one's weights are on their way: from pinned host memory by one copy, or, where the host
has no room for that, from the weight files. Events order the copies and the work; neither waits on the host.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .host_memory import GIB, HostMemoryError, PinnedBuffer, pinnable_bytes
from .transfer import Reader, Ready, Rows, Source, located

logger = logging.getLogger(__name__)

_ALIGN_BYTES = 256
_SLOTS = 2
_PINNERS = 4  # threads


class Copies(Protocol):
    """Copies beside the work, and marks in the work that they wait for."""

    def mark(self) -> Any:
        """The point that the work queued so far ends at."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Ready:
        """Queue a copy that begins when the work has come to the mark `after`."""


class CudaCopies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> Ready:
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            done.record()
        return Ready([done], self._device)


class _Piece(NamedTuple):
    """One parameter of a layer and where it is in the layer's flat buffer, in elements."""

    owner: nn.Module
    leaf: str
    start: int
    rows: Rows


class _Layer:
    """The parameters of one module, laid out in one flat buffer of one dtype."""

    def __init__(self, module: nn.Module, rows: Mapping[str, Rows], dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.pieces: list[_Piece] = []
        self.numel, align = 0, _ALIGN_BYTES // dtype.itemsize
        for name, row in rows.items():
            owner, _, leaf = name.rpartition(".")
            self.pieces.append(_Piece(module.get_submodule(owner), leaf, self.numel, row))
            self.numel += -(-row.shape.numel() // align) * align
        self.flat: Tensor | None = None  # in pinned host memory
        self.sources: list[tuple[Source, int]] = []  # else where to read, each with its start in the buffer
        self._buffer: PinnedBuffer | None = None
        self._bound: dict[int, list[nn.Parameter]] = {}

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def views(self, flat: Tensor) -> list[Tensor]:
        return [flat[piece.start :][: piece.rows.shape.numel()].view(piece.rows.shape) for piece in self.pieces]

    def bind(self, flat: Tensor | None) -> None:
        """Let the parameters be views of `flat`; None: of the host's copy, without data where it has none."""
        flat = self.flat if flat is None else flat
        key = 0 if flat is None else flat.data_ptr()
        if key not in self._bound:
            self._bound[key] = self._parameters(flat)
        for piece, parameter in zip(self.pieces, self._bound[key], strict=True):
            piece.owner._parameters[piece.leaf] = parameter

    @torch.inference_mode(False)
    def _parameters(self, flat: Tensor | None) -> list[nn.Parameter]:
        flat = torch.empty(self.numel, dtype=self.dtype, device="meta") if flat is None else flat
        return [nn.Parameter(view, requires_grad=False) for view in self.views(flat)]

    def forget(self) -> None:
        """Leave the device: its buffers may go."""
        self.bind(None)
        home = 0 if self.flat is None else self.flat.data_ptr()
        self._bound = {home: self._bound[home]}

    @torch.inference_mode(False)
    def hold_on_host(self, reader: Reader) -> None:
        """Read the weights into host memory. Raises HostMemoryError and OSError."""
        self._buffer = PinnedBuffer(self.nbytes)
        self.flat = self._buffer.data.view(self.dtype)
        pairs = [pair for piece, view in zip(self.pieces, self.views(self.flat), strict=True)
                 for pair in piece.rows.pairs(view)]  # fmt: skip
        for source, target in pairs:
            if source.device.type != "cpu":
                target.copy_(source)
        pairs = [(source, target) for source, target in pairs if source.device.type == "cpu"]
        reader.copy(zip(located(source for source, _ in pairs), (target for _, target in pairs), strict=True))

    def pin(self, device: torch.device) -> bool:
        """False where the system refuses to pin the memory that holds the weights."""
        return self._buffer.pin(device)

    def leave_in_files(self) -> None:
        """Keep no data on the host, only where it is."""
        self.flat = self._buffer = None
        starts, tensors = [], []
        for piece in self.pieces:
            start = piece.start
            for tensor in piece.rows.tensors():
                starts.append(start)
                tensors.append(tensor.cpu())
                start += tensor.numel()
        self.sources = list(zip(located(tensors), starts, strict=True))


class _Reading:
    """A layer on its way from its files: `wait` has the host wait until its copies are queued, the device the rest."""

    def __init__(self, future: Future[Ready]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result().wait()


class WeightStream:
    """Layers that run in order, over and over: at most two at a time on the device, save those kept there.

    Between `open` and `close`, iterate it, or have the work on each layer stand between `take` and `done`. Outside, the
    parameters of a layer are views of its pinned buffer on the host; of one that is read from its files, on the meta
    device.

    Args:
        layers: modules, and their parameters' data by name.
        pinned: hold the weights in pinned host memory as far as it goes; else every use reads the files.
    """

    def __init__(
        self,
        layers: Sequence[tuple[nn.Module, Mapping[str, Rows]]],
        dtype: torch.dtype,
        device: torch.device,
        copies: Copies,
        *,
        pinned: bool = True,
    ) -> None:
        self._layers = [_Layer(module, rows, dtype) for module, rows in layers]
        self._device, self._copies = device, copies
        self._reader: Reader | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._fetch(pinned)
        self._reset()

    @property
    def nbytes(self) -> list[int]:
        """Of each layer, on the device."""
        return [layer.nbytes for layer in self._layers]

    def __len__(self) -> int:
        return len(self._layers)

    def _reset(self) -> None:
        self._kept: dict[int, Any] = {}  # layers that stay on the device: what to wait for at the next use, or None
        self._passing: list[int] = []  # the others, in order
        self._slots: list[Tensor] = []
        self._arriving: list[Any] = []  # of each slot
        self._uses = 0  # of passing layers that are over

    def open(self, keep: int = 0) -> None:
        """Bring the first layers on their way; `keep` of them, evenly spread, stay till `close`."""
        count = len(self._layers)
        # With no more to pass than there are slots, the slots may as well keep them.
        self._passing = spread(count, count - keep) if count - keep > _SLOTS else []
        dtype = self._layers[0].dtype
        if self._passing:
            largest = max(self._layers[index].numel for index in self._passing)
            self._slots = [self._empty(largest, dtype) for _ in range(_SLOTS)]
        start = self._copies.mark()
        first = dict(zip(self._passing[:_SLOTS], range(_SLOTS), strict=False))
        self._arriving = [None] * len(self._slots)
        for index, layer in enumerate(self._layers):
            if index in first:
                self._send(first[index], start)
            elif index not in self._passing:
                flat = self._empty(layer.numel, dtype)
                self._kept[index] = self._bring(layer, flat, self._copies.mark())
                layer.bind(flat)

    def take(self, index: int) -> None:
        """Have the work that is queued from now on wait until the layer is there."""
        if index in self._kept:
            if self._kept[index] is not None:
                self._kept[index].wait()
                self._kept[index] = None
            return
        if self._passing[self._uses % len(self._passing)] != index:
            self._begin_at(index)
        slot = self._uses % _SLOTS
        self._arriving[slot].wait()
        self._layers[index].bind(self._slots[slot])

    def done(self, index: int) -> None:
        """No work that is queued from now on needs the layer: its slot is for the one after the next."""
        if index in self._kept:
            return
        self._layers[index].bind(None)
        use, self._uses = self._uses, self._uses + 1
        self._send(use + _SLOTS, self._copies.mark())

    def close(self) -> None:
        """Free the device's memory, once what is on its way there has come."""
        for arriving in (*self._arriving, *self._kept.values()):
            if arriving is not None:
                with contextlib.suppress(Exception):  # a failed read was raised where the layer was asked for
                    arriving.wait()
        for layer in self._layers:
            layer.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._reader.close()
            self._thread = self._reader = None
        self._reset()

    def __iter__(self) -> Iterator[nn.Module]:
        """The layers in order, each there while it is the current one."""
        for index, layer in enumerate(self._layers):
            self.take(index)
            yield layer.module
            self.done(index)

    def _begin_at(self, index: int) -> None:
        """The last round was broken off: begin anew with this layer."""
        for arriving in self._arriving:
            arriving.wait()
        self._uses, mark = self._passing.index(index), self._copies.mark()
        for use in range(self._uses, self._uses + _SLOTS):
            self._send(use, mark)

    def _send(self, use: int, after: Any) -> None:
        layer = self._layers[self._passing[use % len(self._passing)]]
        self._arriving[use % _SLOTS] = self._bring(layer, self._slots[use % _SLOTS], after)

    def _bring(self, layer: _Layer, target: Tensor, after: Any) -> Any:
        if layer.flat is not None:
            return self._copies.copy(target[: layer.numel], layer.flat, after)
        if self._thread is None:
            self._reader = Reader(self._device)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="layers")
        pairs = [(source, target[start : start + source.tensor.numel()]) for source, start in layer.sources]
        return _Reading(self._thread.submit(self._reader.copy, pairs, after))

    @torch.inference_mode(False)
    def _empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    def _fetch(self, pinned: bool) -> None:
        """Read what the host has room for; pinning one layer overlaps with reading the next."""
        waiting: list[tuple[_Layer, Future[bool]]] = []
        held = 0
        with Reader("cpu") as reader, ThreadPoolExecutor(_PINNERS) as pinner:
            # In an order that has any number of layers spread evenly, so that those left out are so too.
            for index in _scattered(len(self._layers)) if pinned else ():
                layer = self._layers[index]
                if pinnable_bytes(held) < layer.nbytes:
                    break
                try:
                    layer.hold_on_host(reader)
                except HostMemoryError:
                    break
                held += layer.nbytes
                if self._device.type == "cuda":
                    waiting.append((layer, pinner.submit(layer.pin, self._device)))
            refused = [layer for layer, pin in waiting if not pin.result()]
        left = [layer for layer in self._layers if layer.flat is None or layer in refused]
        for layer in left:
            layer.leave_in_files()
        for layer in self._layers:
            layer.bind(None)
        if pinned and left:
            missing = sum(layer.nbytes for layer in left) / GIB
            logger.warning(
                "host memory has no room to pin %.1f GiB of weights: %d of %d layers are read from their files at "
                "every use", missing, len(left), len(self._layers)
            )  # fmt: skip


def keepable(nbytes: int, layers: Sequence[int]) -> int:
    """How many of the layers, of these sizes in bytes, can stay in `nbytes` of memory beside the slots for the rest."""
    if sum(layers) <= nbytes:
        return len(layers)
    left = nbytes - _SLOTS * max(layers)
    return max(0, min(len(layers) - _SLOTS - 1, left // max(layers)))


def least_bytes(layers: Sequence[int]) -> int:
    """Memory for the layers when none of them is kept."""
    return min(sum(layers), _SLOTS * max(layers))


def spread(count: int, chosen: int) -> list[int]:
    """`chosen` of the numbers below `count`, evenly spread."""
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


def _scattered(count: int) -> list[int]:
    """The numbers below `count` in an order of which every beginning is evenly spread: by their bits, reversed."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2))
