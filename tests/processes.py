"""Several processes that work together on the CPU, for the tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist


def together(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """What `function(rank, *args)` returns in each of `size` forked processes that share a gloo group.

    Raises RuntimeError with the first traceback where one fails, and ends all that are left.
    """
    context = multiprocessing.get_context("fork")
    with TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            start = (theirs, Path(directory) / "store", rank, size, function, args)
            processes.append(context.Process(target=_work, args=start, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"{len(waiting)} of {len(pipes)} processes have not come to an end")
        for pipe in ready:
            good, value = pickle.loads(pipe.recv_bytes())
            if not good:
                raise RuntimeError(value)
            results[pipes.index(pipe)] = value
    return [results[rank] for rank in range(len(pipes))]


def _work(pipe: Connection, store: Path, rank: int, size: int, function: Callable[..., Any], args: tuple) -> None:
    # The parent's pool of threads is not there after a fork.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        pipe.send_bytes(pickle.dumps((True, function(rank, *args))))  # tensors by value, not by shared memory
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        os._exit(0)
