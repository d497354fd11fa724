"""The processes that torchrun has started, and the groups they talk in."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout
from .meeting import LEADER_TIMEOUT, STEP_TIMEOUT, RefusedError, meet, require, settled

T = TypeVar("T")

# Multiprocessors that an exchange between neighbours holds, also while it waits for the other: all else computes.
_LINK_CTAS = 4


class LeaderError(RuntimeError):
    """Rank 0 has failed, and says itself why."""


# Newer torch calls it so.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Groups(NamedTuple):
    """This process's groups, as in `Layout`; None: it is alone in it."""

    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None


class World:
    """All processes of the run. Rank 0, the leader, encodes texts and given frames and writes the files.

    neighbours: how many of them, the first ones, are on the leader's host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        self.leads = self.rank == 0
        self._control = meet()
        self._groups: dict[Layout, Groups] = {}
        # Frames of the VAE do not go over the network between hosts: decoding would wait for it.
        self.neighbours = min(self.size, self.agree(int(os.environ.get("LOCAL_WORLD_SIZE", self.size))))
        self._links = self._link()

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Work with the others; `device` is this process's own.

        Raises ValueError as `require` does, and RefusedError where another process has called `settled` with a reason.
        """
        require(device)
        if reasons := settled(None):
            raise RefusedError(reasons)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(device)

    def groups(self, layout: Layout) -> Groups:
        """The groups of a layout of all processes. They are kept: torch cannot take apart those that xfuser makes."""
        if layout not in self._groups:
            make = partial(_xfuser_groups, self) if self.device.type == "cuda" else _torch_groups
            self._groups[layout] = make(layout)
        return self._groups[layout]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the leader, which alone calls it: a tensor, or a tuple or list of such things.

        What is on the leader's device comes to each process's own, what is on the host stays there.

        Raises what `make` raises, on the others LeaderError.
        """
        if not self.leads:
            return _unpacked(self._told(None), self.device)
        try:
            made = make()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # of those who are gone already
                self._told(_Failure(type(error).__name__))
            raise
        self._told(_packed(made))
        return made

    def agree(self, value: T) -> T:
        """The leader's value."""
        return self._told(value)

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self._control)
        return int(number)

    def send(self, tensor: Tensor, rank: int) -> dist.Work:
        """Begin to send a contiguous tensor, on the device, to the rank before or after this one.

        Work queued after `wait` of what is returned may write to the tensor.
        """
        return _exchange(dist.isend, tensor, rank, self._links[rank])

    def receive(self, buffer: Tensor, rank: int) -> dist.Work:
        """Begin to receive what the rank before or after this one sends, of the shape and dtype of `buffer`.

        Work queued after `wait` of what is returned may read it.
        """
        return _exchange(dist.irecv, buffer, rank, self._links[rank])

    def each(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def wait(self) -> None:
        """Until all are here."""
        dist.barrier(group=self._control)

    def close(self) -> None:
        """Leave, all together and in good order."""
        self.wait()
        dist.destroy_process_group()

    def _link(self) -> dict[int, dist.ProcessGroup]:
        """A group with each neighbour on the leader's host, by its rank: exchanges with one wait for none with others.

        NCCL takes a second to connect two processes, which is spent here.
        """
        pairs = [_pair(low, self.device) for low in range(self.neighbours - 1)]
        links = {}
        for peer in (self.rank ^ 1, (self.rank + 1 ^ 1) - 1):  # pairs (0, 1), (2, 3), …, then (1, 2), (3, 4), …
            if peer >= 0 and max(peer, self.rank) < self.neighbours:
                links[peer] = pairs[min(self.rank, peer)]
                token = torch.zeros(1, device=self.device)
                _exchange(dist.isend if peer < self.rank else dist.irecv, token, peer, links[peer]).wait()
        return links

    def _told(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        if isinstance(box[0], _Failure) and not self.leads:
            raise LeaderError(f"rank 0 failed: {box[0].name}")
        return box[0]


class _Failure(NamedTuple):
    name: str


class _OnDevice(NamedTuple):
    data: Tensor


def _packed(value: Any) -> Any:
    """`value` with the tensors that are not on the host there, and marked."""
    if isinstance(value, Tensor):
        return value if value.device.type == "cpu" else _OnDevice(value.cpu())
    return _each(_packed, value)


def _unpacked(value: Any, device: torch.device) -> Any:
    if isinstance(value, _OnDevice):
        return value.data.to(device)
    return _each(partial(_unpacked, device=device), value)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of each part of a tuple or list, of one of ours by its own kind; anything else as it is."""
    if not isinstance(value, (list, tuple)):
        return value
    parts = [function(part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _pair(low: int, device: torch.device) -> dist.ProcessGroup:
    """A group of the ranks `low` and `low + 1`, for exchanges beside computation. Every process must make it."""
    options = None
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = _LINK_CTAS
        options._timeout = LEADER_TIMEOUT
    backend = "nccl" if device.type == "cuda" else "gloo"
    return dist.new_group([low, low + 1], timeout=LEADER_TIMEOUT, backend=backend, pg_options=options)


def _exchange(begin: Callable[..., Any], tensor: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work:
    """A single `dist.isend` or `dist.irecv`. As a batch NCCL does it in the group itself, and connects no new one."""
    return dist.batch_isend_irecv([dist.P2POp(begin, tensor, rank, group)])[0]


def _torch_groups(layout: Layout) -> Groups:
    """Every process must make every group."""
    ulysses, _ = dist.new_subgroups_by_enumeration(layout.ulysses_ranks(), timeout=STEP_TIMEOUT)
    ring, _ = dist.new_subgroups_by_enumeration(layout.ring_ranks(), timeout=STEP_TIMEOUT)
    return Groups(ulysses if layout.ulysses > 1 else None, ring if layout.ring > 1 else None)


def _xfuser_groups(world: World, layout: Layout) -> Groups:
    """Those that xfuser makes, in the same places as `_torch_groups`."""
    if layout.sequence == 1:
        return Groups(None, None)
    from xfuser.core.distributed import get_sp_group, init_distributed_environment, initialize_model_parallel
    from xfuser.core.distributed.parallel_state import destroy_model_parallel, model_parallel_is_initialized

    logging.getLogger("xfuser").setLevel(logging.WARNING)
    if model_parallel_is_initialized():
        destroy_model_parallel()
    init_distributed_environment(world_size=world.size, rank=world.rank, local_rank=world.device.index or 0)
    initialize_model_parallel(
        classifier_free_guidance_degree=layout.branches,
        sequence_parallel_degree=layout.sequence,
        ulysses_degree=layout.ulysses,
        ring_degree=layout.ring,
    )
    found = get_sp_group()
    if not hasattr(found, "ulysses_group"):
        raise RuntimeError("xfuser makes no Ulysses and ring groups without yunchang: pip install yunchang")
    return Groups(found.ulysses_group if layout.ulysses > 1 else None, found.ring_group if layout.ring > 1 else None)
