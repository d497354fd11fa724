"""Two GPUs, over NCCL and xfuser's groups, against one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import rel_l2
from parallel_worker import render

import skyreels_fast as sf

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, sf.Result], list[torch.Tensor]]:
    return render("cuda:0", torch.float32, None)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.skipif(importlib.util.find_spec("xfuser") is None, reason="needs xfuser")
@pytest.mark.parametrize("degrees", ["1 1 1", "2 1 0", "1 2 0"], ids=["branches", "ulysses", "ring"])
def test_two_gpus_equal_one(
    degrees: str, alone: tuple[dict[str, sf.Result], list[torch.Tensor]], tmp_path: Path
) -> None:
    """Up to rounding where tokens are shared out, in every bit where the VAE's layers are."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join(sys.path)
    run = subprocess.run(
        [*launcher, str(WORKER), "cuda", *degrees.split(), str(tmp_path / "out.pt")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    expected, coded_alone = alone
    rendered, coded = torch.load(tmp_path / "out.pt")
    for name, (latents, frames) in rendered.items():
        for own, one in zip(latents, expected[name].latents, strict=True):
            assert rel_l2(own, one.cpu()) < 1e-4
        assert (frames.int() - expected[name].frames.int()).abs().max() <= 1
    assert all(torch.equal(*pair) for pair in zip(coded, coded_alone, strict=True))
