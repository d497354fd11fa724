"""Which weights are on the device when: resident, there while they are in use, or layer by layer while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .host_memory import pinnable_bytes
from .streaming import Copies, CudaCopies, WeightStream, keepable
from .transfer import Rows, load, put


class _Streamed(NamedTuple):
    """A module's blocks, which pass through the device."""

    stream: WeightStream
    is_called: bool  # the module's own code calls them, not what iterates `Placement.blocks`


class _Home(NamedTuple):
    """Where to load weights to that are on the device only while in use."""

    placement: Placement
    is_called: bool

    def hold(self, module: nn.Module, rows: Mapping[str, Rows], dtype: torch.dtype) -> None:
        self.placement.hold(module, rows, dtype, is_called=self.is_called)


class Placement:
    """Where a pipeline's modules live.

    Resident modules come to the device at their first use and stay. Others are there inside `use` alone; their host
    copy is kept, so leaving costs no copy back. Of those, a module that names the layers it runs in turn, `blocks`, has
    each there only while it runs: see `streaming`.

    Args:
        offload: keep modules on the host between uses.
        vram_bytes: the same, but as many blocks stay through a use as fit into so many bytes with all else in it.
        copies: how blocks are copied; None: as the device does it, on the CPU not at all.

    Raises ValueError where $SKYREELS_FAST_PINNED_GIB would be needed and is no number.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        offload: bool = False,
        vram_bytes: int | None = None,
        copies: Copies | None = None,
    ) -> None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.offload = offload or vram_bytes is not None
        if self.offload:
            pinnable_bytes()  # what the environment says of it is refused now or never
        self._vram_bytes = vram_bytes
        self._copies = CudaCopies(device) if copies is None and device.type == "cuda" else copies
        self._streamed: WeakKeyDictionary[nn.Module, _Streamed] = WeakKeyDictionary()

    @property
    def home(self) -> torch.device | _Home:
        """Where to load weights to: the device itself, or the host when offloading."""
        if not self.offload:
            return self.device
        return torch.device("cpu") if self._copies is None else _Home(self, is_called=False)

    @property
    def encoder_home(self) -> torch.device | _Home:
        """Where to load a module to that runs once and goes: its layers come from its files as they run."""
        return self.device if self._copies is None else _Home(self, is_called=True)

    @contextmanager
    def use(self, module: nn.Module, *, stay: bool | None = None, beside: int = 0) -> Iterator[nn.Module]:
        """Have `module` on the device inside the `with`.

        Args:
            stay: whether it remains there afterwards; None: it does unless offloading. What was on the device
                before stays in any case. Changes made to offloaded weights inside are lost. Blocks never stay.
            beside: bytes that the work inside needs beside the weights.
        """
        leaves = self.offload if stay is None else not stay
        hosts: list[tuple[Tensor, Tensor]] = []
        streamed = self._streamed.get(module)
        hooks: list[Any] = []
        try:
            self._bring(_throughout(module, streamed), hosts)
            if streamed is not None:
                streamed.stream.open(self._kept(streamed, beside + sum(host.nbytes for _, host in hosts)))
                hooks = _hooks(module, streamed.stream) if streamed.is_called else []
            yield module
        finally:
            for hook in hooks:
                hook.remove()
            if streamed is not None:
                streamed.stream.close()
            if leaves:
                for tensor, host in hosts:
                    tensor.data = host

    def blocks(self, dit: nn.Module) -> Iterable[nn.Module]:
        """The DiT's blocks in order, each on the device while it is the current one; to iterate in every forward."""
        streamed = self._streamed.get(dit)
        return dit.blocks if streamed is None else streamed.stream

    def hold(self, module: nn.Module, rows: Mapping[str, Rows], dtype: torch.dtype, *, is_called: bool) -> None:
        """Give `module`, on the meta device, its weights on the host.

        Args:
            rows: every parameter's data by name.
            is_called: the module calls its `blocks` itself, and runs but a few times: they are read from their files.
        """
        rest = dict(rows)
        for name in getattr(module, "host_parameters", ()):
            put(module, name, next(rest.pop(name).tensors()))  # mapped as it is
        blocks = _blocks(module)
        layers = [(block, {name: rest.pop(prefix + name) for name, _ in block.named_parameters()})
                  for prefix, block in blocks.items()]  # fmt: skip
        load(module, rest, "cpu", dtype)
        if layers:
            stream = WeightStream(layers, dtype, self.device, self._copies, pinned=not is_called)
            self._streamed[module] = _Streamed(stream, is_called)

    def _kept(self, streamed: _Streamed, beside: int) -> int:
        """How many blocks to keep through a use that needs `beside` bytes for all else."""
        if self._vram_bytes is None or streamed.is_called:
            return 0
        return keepable(self._vram_bytes - beside, streamed.stream.nbytes)

    @torch.inference_mode(False)
    def _bring(self, tensors: list[Tensor], hosts: list[tuple[Tensor, Tensor]]) -> None:
        for tensor in tensors:
            if tensor.device != self.device:
                hosts.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device)


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that `module` runs one after the other, by what their parameters' names begin with."""
    layers = set(getattr(module, "blocks", ()))
    return {f"{name}.": layer for name, layer in module.named_modules() if layer in layers}


def _throughout(module: nn.Module, streamed: _Streamed | None) -> list[Tensor]:
    """What has to be on the device from the beginning of a use to its end."""
    if streamed is None:
        return [*module.parameters(), *module.buffers()]
    passing = {*getattr(module, "host_parameters", ())}
    passing |= {prefix + name for prefix, block in _blocks(module).items() for name, _ in block.named_parameters()}
    named = chain(module.named_parameters(), module.named_buffers())
    return [tensor for name, tensor in named if name not in passing]


def _hooks(module: nn.Module, stream: WeightStream) -> list[Any]:
    """Have every block's call wait for its weights and give them up."""
    hooks = []
    for index, block in enumerate(module.blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: stream.take(index)))
        hooks.append(block.register_forward_hook(lambda *_, index=index: stream.done(index)))
    return hooks
