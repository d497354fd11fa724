"""What the tests share: where the golden files are and how closeness is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fake_pipeline import fake, picture  # noqa: F401  (fixtures)
from kernels import poisoned_memory  # noqa: F401
from safetensors.torch import load_file

import skyreels_fast as sf

GOLDEN = Path(__file__).parent / "data" / "golden"


def rel_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN where `actual` holds one."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def load_golden(stem: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{stem}.safetensors")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def golden_directory(mode: str, directory: Path) -> Path:
    """A model directory with the golden DiT of `mode` and the golden VAE, made in `directory`."""
    shutil.copytree(GOLDEN / mode, directory, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "Wan2.1_VAE.pth", directory)
    return directory


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, sf.Pipeline]:
    """The golden models by mode, in float32 on the CPU."""
    return {
        mode: sf.Pipeline.from_pretrained(
            golden_directory(mode, tmp_path_factory.mktemp(mode)), device="cpu", dtype=torch.float32, mode=mode
        )
        for mode in ("df", "t2v", "i2v")
    }
