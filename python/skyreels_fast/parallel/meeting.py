"""How the processes that torchrun has started meet, agree on whether to begin, and notice that one is gone."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A process that dies is noticed by torchrun or by its closed connection. These are for one that hangs: in a step all
# work in step, give or take what a device has queued; outside of steps, and while frames are decoded, which somebody
# may read slowly, all wait for the leader, however long it takes.
STEP_TIMEOUT = timedelta(minutes=10)
LEADER_TIMEOUT = timedelta(days=7)


class RefusedError(ValueError):
    """Some process has something against going on; `reasons` has all that any has, each once."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


_LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|timed? ?out|likely closed|ncclRemoteError|remote process exit",
    re.IGNORECASE,
)
# The group of all processes, by torch's default group, which those that leave take down with them.
_meeting: tuple[Any, dist.ProcessGroup] | None = None


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exchange has failed because another process is gone."""
    # Gloo's errors have no type of their own, but name its files.
    of_exchange = isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())
    return of_exchange and bool(_LOST.search(str(error)))


def _check_started() -> None:
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        raise ValueError("--use_usp: start the command with torchrun --nproc_per_node=N, a process for each GPU")


def meet() -> dist.ProcessGroup:
    """Meet all processes that torchrun has started, once: a group over gloo, in which one may wait for long.

    Before anything that a single process may fail at, lest the others wait for it in vain. Raises ValueError where
    torchrun has started none, or some have not come.
    """
    global _meeting
    _check_started()
    if not dist.is_initialized():
        # Else a product, which fills the device, may let no exchange beside it begin before its end.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=STEP_TIMEOUT)
        except dist.DistError as error:
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise ValueError(
                f"--use_usp: {os.environ['WORLD_SIZE']} processes have not met at {place}: start the command on every "
                f"host, each of which must reach that address ({str(error).splitlines()[0]})"
            ) from None
    if _meeting is None or _meeting[0] is not dist.group.WORLD:
        _meeting = dist.group.WORLD, dist.new_group(backend="gloo", timeout=LEADER_TIMEOUT)
    return _meeting[1]


def settled(reason: str | None) -> list[str]:
    """What any process has against going on, each reason once; this one `reason`, or nothing. All call it together.

    A reason that not all hosts have says which have it.
    """
    group, host = meet(), platform.node()
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (reason, host), group=group)
    hosts = {said: dict.fromkeys(where for what, where in answers if what == said) for said, _ in answers if said}
    everywhere = {where for _, where in answers}
    return [said if where.keys() == everywhere else f"{said} (on {', '.join(where)})" for said, where in hosts.items()]


def require(device: torch.device) -> None:
    """Raises ValueError, in one line, where several processes cannot work together on devices like this one."""
    _check_started()
    if device.type == "cuda" and importlib.util.find_spec("xfuser") is None:
        raise ValueError("--use_usp: several GPUs need xfuser; pip install 'skyreels-fast[parallel]'")
