"""What the tests share: where the golden files are and how closeness is measured."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from fake_pipeline import fake, picture  # noqa: F401  (fixtures)
from kernels import poisoned_memory  # noqa: F401
from safetensors.torch import load_file

import skyreels_fast as sf
from training.prompts import save_tokenizer

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


def _random_clip() -> dict[str, torch.Tensor]:
    """A CLIP tower of the width and token count that I2V takes, two blocks deep."""
    golden = torch.load(GOLDEN / "clip_tiny.pth", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    sizes = {64: 1280, 192: 3840, 256: 320, 17: 257}
    weights = {}
    for name, tensor in golden.items():
        if ".transformer.2." in name or ".transformer.3." in name:
            continue
        shape = [sizes.get(size, size) for size in tensor.shape]
        weights[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    return weights


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden models as whole directories: text encoder, tokenizer and, for I2V, an image encoder beside them."""
    made = {}
    for mode in ("df", "t2v", "i2v"):
        directory = golden_directory(mode, tmp_path_factory.mktemp("models") / mode)
        (directory / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes((GOLDEN / "t5_tiny.pth").read_bytes())
        save_tokenizer(directory / "google" / "umt5-xxl")
        made[mode] = directory
    torch.save(_random_clip(), made["i2v"] / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    return made
