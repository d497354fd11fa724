"""The documentation's examples run as they stand, and it leaves out no public op."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import report
from skyreels_fast import ops

KERNELS = Path(__file__).parents[1] / "docs" / "kernels.md"
TEXT = KERNELS.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def imported(example: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(re.findall(r"^from skyreels_fast\S* import (.*)$", example, re.MULTILINE))))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: "-".join(sorted(imported(example))))
def test_examples_run(example: str) -> None:
    if "from diffusers" in example:
        pytest.importorskip("diffusers")
    assert "assert" in example
    torch.manual_seed(0)
    exec(compile(example, str(KERNELS), "exec"), {"__name__": "example"})


def test_every_op_has_an_example_and_its_signature() -> None:
    shown = set().union(*map(imported, EXAMPLES))
    assert set(ops.__all__) <= shown
    for name in ops.__all__:
        assert re.search(rf"`{name}\(", TEXT) or f"    {name}(" in TEXT


def test_every_module_of_references_and_costs_is_named() -> None:
    modules = {path.stem for path in Path(ops.__file__).parent.glob("[a-z]*.py")}
    named = re.search(r"in the module of its family: (.*?)\. ", TEXT, re.DOTALL)
    assert named is not None and modules == set(re.findall(r"`ops\.(\w+)`", named[1]))


def test_extras_are_installed_from_the_checkout() -> None:
    """The package is on no index."""
    assert "skyreels-fast[" not in TEXT


def test_the_table_can_be_renewed() -> None:
    text = (KERNELS.parents[1] / "README.md").read_text()
    renewed = report.filled(text, dict.fromkeys(report.TABLES, "| a table |"))
    assert "<!-- benchmarks:ops -->\n| a table |\n<!-- /benchmarks:ops -->" in renewed
