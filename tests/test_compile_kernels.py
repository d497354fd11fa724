"""The Triton kernels compile for GPUs, whether or not there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
# Those that are launched, of all that are defined.
DEFINED = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sources = (ROOT / "python" / "skyreels_fast" / "ops").glob("*.py")
    kernels = {
        f"{source.stem}.{name}" for source in sources for name in DEFINED.findall(source.read_text(encoding="utf-8"))
    }
    assert set(done.stdout.split()) == kernels and len(kernels) > 8
