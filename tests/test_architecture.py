"""The modules import only what they may; the light ones stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    """The names of all modules that a fresh interpreter holds after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_import_contracts(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "module",
    ["skyreels_fast", "skyreels_fast.config", "skyreels_fast.sampling.windows", "skyreels_fast.sampling.timesteps"],
)
def test_imports_without_torch(module):
    assert not modules_after(f"import {module}") & {"torch", "numpy", "transformers"}


def test_ops_import_alone():
    loaded = modules_after("import skyreels_fast.ops, skyreels_fast.ops.residual_reuse")
    assert not loaded & {"transformers", "diffusers", "safetensors", "huggingface_hub", "imageio"}
    modules = {name.split(".")[1] for name in loaded if name.startswith("skyreels_fast.")}
    assert modules <= {"ops", "_C"}


def test_integrations_bring_the_ops_alone():
    loaded = modules_after("import skyreels_fast.integrations.diffusers")
    assert not loaded & {"transformers", "diffusers", "accelerate", "safetensors"}
    assert {name.split(".")[1] for name in loaded if name.startswith("skyreels_fast.")} <= {"integrations", "ops", "_C"}


def test_commands_are_as_in_the_reference():
    """The scripts at the root hand over to the package and hold nothing of their own."""
    for command, line in (
        ("generate_video.py", "from skyreels_fast.cli import generate_video"),
        ("generate_video_df.py", "from skyreels_fast.cli import generate_video_df"),
        ("prompt_enhancer.py", "from skyreels_fast.enhance import main"),
    ):
        text = (ROOT / command).read_text()
        assert text.startswith(line) and len(text.splitlines()) <= 5
