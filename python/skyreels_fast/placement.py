"""Which weights are on the device when: resident, or there only while they are in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


class Placement:
    """Where a pipeline's modules live.

    Resident modules come to the device at their first use and stay. Offloaded ones are there inside `use` alone;
    their host copy is kept, so leaving costs no copy back.
    """

    def __init__(self, device: torch.device | str, *, offload: bool = False) -> None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.offload = offload

    @property
    def home(self) -> torch.device:
        """The device to load weights on: the device itself, or the host when offloading."""
        return torch.device("cpu") if self.offload else self.device

    @contextmanager
    def use(self, module: nn.Module, *, stay: bool | None = None) -> Iterator[nn.Module]:
        """Have `module` on the device inside the `with`.

        Args:
            stay: whether it remains there afterwards; None: it does unless offloading. What was on the device
                before stays in any case. Changes made to offloaded weights inside are lost.
        """
        leaves = self.offload if stay is None else not stay
        hosts: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            self._bring(module, hosts)
            yield module
        finally:
            if leaves:
                for tensor, host in hosts:
                    tensor.data = host

    def blocks(self, dit: nn.Module) -> Iterable[nn.Module]:
        """The DiT's blocks in order, each on the device while it is the current one."""
        return dit.blocks

    @torch.inference_mode(False)
    def _bring(self, module: nn.Module, hosts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.device != self.device:
                hosts.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device)
