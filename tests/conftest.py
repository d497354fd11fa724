"""What the tests share: where the golden files are and how closeness is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
