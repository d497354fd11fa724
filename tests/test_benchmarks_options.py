"""What the benchmarks' commands refuse: one line and exit code 2, before anything is measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

from benchmarks import (
    adherence,
    algorithms,
    breakdown,
    fidelity,
    harness,
    hostmemory,
    loading,
    ops,
    options,
    products,
    vae_layers,
    video,
)

CPU = torch.device("cpu")
# Each command with what it cannot do without.
COMMANDS = {
    adherence: [], algorithms: [], breakdown: [], fidelity: [], hostmemory: [], loading: ["--directory", "none"],
    ops: [], products: [], vae_layers: [], video: ["--model", "toy"],
}  # fmt: skip
ON_ITS_DEVICE = [command for command in COMMANDS if command not in (algorithms, breakdown, hostmemory)]


def refused(command: ModuleType, words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The line on stderr."""
    with pytest.raises(SystemExit) as left:
        command.main([*COMMANDS[command], *words])
    said = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    return said[0]


def name(value: object) -> str:
    return value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else ""


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_rows_that_cannot_be_written_are_refused_at_the_start(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert f"--out {tmp_path}: cannot be written" in refused(command, ["--out", str(tmp_path)], capsys)
    below = tmp_path / "file" / "rows.jsonl"
    below.parent.write_text("no directory")
    assert f"--out {below}: cannot be written" in refused(command, ["--out", str(below)], capsys)


@pytest.mark.parametrize("command", ON_ITS_DEVICE, ids=name)
def test_devices_that_are_not_there_are_refused(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--device 'foo': must be cuda, cuda:N or cpu" in refused(command, ["--device", "foo"], capsys)
    assert "--device 'cuda': PyTorch finds 0 CUDA" in refused(command, ["--device", "cuda"], capsys)


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (adherence, ["--n", "0"], "--n: 0 is no whole number of at least 1"),
        (adherence, ["--model_id", "/nope"], "no such model directory: /nope"),
        (hostmemory, ["--frames", "146"], "146 frames are not 4k + 1; nearest: 145 or 149"),
        (loading, ["--model", "toy", "--directory", "/dev/null/nope"], "--directory /dev/null/nope: Not a directory"),
        (ops, ["--head_dim", "0"], "--head_dim: 0 is no whole number of at least 1"),
        (products, ["--tokens", "0"], "--tokens: 0 is no whole number of at least 1"),
    ],
    ids=name,
)
def test_values_that_make_no_sense_are_refused(
    command: ModuleType, words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(command, words, capsys)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert options.checked_device("cuda") == options.checked_device(None) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert options.checked_device("cuda") == torch.device("cuda", 1)
    assert options.checked_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="'cuda:2': PyTorch finds 2"):
        options.checked_device("cuda")


def test_a_cpu_writes_only_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    assert options.output_file(None, "ops", CPU) is None
    assert options.output_file(None, "ops", torch.device("cuda")) == harness.RESULTS / "ops.jsonl"
    words = ["--device", "cpu", "--out", str(out)]
    assert options.Parser("", "ops").parse_args(words).out == out and out.read_text() == ""
    monkeypatch.setenv("RANK", "1")
    assert options.Parser("", "ops").parse_args(words).out is None


@pytest.mark.parametrize(("status", "code", "said"), [(2, 2, ""), (-9, 9, "error: signal 9 ended the command for 145")])
def test_host_memory_of_a_command_that_fails(
    status: int, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A command that is refused has said why itself."""
    monkeypatch.setattr(hostmemory, "run", Mock(side_effect=subprocess.CalledProcessError(status, "the command")))
    assert hostmemory.main(["--frames", "145"]) == code
    said_here = capsys.readouterr().err
    assert said_here.startswith(said) and bool(said_here) == bool(said)
