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


@pytest.mark.parametrize("file", ["README.md", "docs/speed.md"])
def test_the_tables_are_those_of_the_results(file: str, capsys: pytest.CaptureFixture) -> None:
    root = KERNELS.parents[1]
    if not (root / ".git").exists():
        pytest.skip("only committed results count, and this is no repository")
    assert report.main(["--readme", str(root / file), "--check"]) == 0, capsys.readouterr()
