"""What the tests of kernels share: the backends of this machine, and how large an error may be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from skyreels_fast.ops import _dispatch


def machine_kernels(offered: tuple[str, ...] = ("cuda", "triton")) -> list:
    """(device, backend) of those kernels that can run; those on a GPU are marked, and skipped where there is none."""
    cases = [(device, name) for device in ("cpu", "cuda") for name in _dispatch.available(device, offered)]
    return [
        pytest.param(device, name, id=f"{device}-{name}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device, name in cases
        if name != "ref"
    ]


@pytest.fixture
def poisoned_memory():
    """Every torch.empty comes back full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_within_twice(actual: Tensor, low: Tensor, exact: Tensor) -> None:
    """`actual` errs at most twice as much as `low`, the formula run in the low dtype, plus a rounding; by token too."""
    assert actual.dtype == low.dtype and actual.shape == low.shape
    rounding, columns = torch.finfo(low.dtype).eps, low.shape[-1] if low.dim() else 1
    actual, low, exact = (tensor.double().cpu().reshape(-1, columns) for tensor in (actual, low, exact))
    error, allowed, slack = (actual - exact).abs(), 2 * (low - exact).abs(), rounding * exact.abs()
    assert error.amax() <= allowed.amax() + slack.amax()
    assert (error.amax(-1) <= allowed.amax(-1) + slack.amax(-1)).all()


def run_in_interpreter(file: str) -> None:
    """Run the tests of `file` that take Triton on the CPU: it reads TRITON_INTERPRET when a kernel is defined."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu-triton", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr
