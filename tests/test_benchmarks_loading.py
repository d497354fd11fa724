"""The loading benchmark on a toy model: its file, its rows, its floors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import harness, loading, models
from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.dit.model import DiT

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="drops pages as Linux does")


def test_the_model_it_writes_is_a_model(tmp_path: Path) -> None:
    file = loading.write_model(tmp_path, "toy", CPU)
    expected = models.RandomCheckpoint.of("toy", "t2v", CPU, torch.bfloat16, text=False).transformer_weights()
    written = load_file(file)
    assert written.keys() == set(expected) and all(torch.equal(written[name], expected[name]) for name in expected)
    checkpoint = Checkpoint.open(tmp_path)
    with torch.device("meta"):
        checkpoint.check_transformer(DiT(checkpoint.config))
    changed = file.stat().st_mtime_ns
    assert loading.write_model(tmp_path, "toy", CPU).stat().st_mtime_ns == changed


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("foreign", ["model.safetensors", "config.json", "Wan2.1_VAE.pth"])
def test_what_it_did_not_write_stays(foreign: str, marked: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if marked:
        loading.write_model(tmp_path, "toy", CPU)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()} | {foreign: b"a trained model's"}
    (tmp_path / foreign).write_bytes(before[foreign])
    words = ["--model", "tiny", "--directory", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        loading.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: --directory {tmp_path}: holds " in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_was_not_finished_is_written_anew(tmp_path: Path) -> None:
    whole = loading.write_model(tmp_path / "whole", "toy", CPU).read_bytes()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / loading.MARKER).write_text("toy")
    (begun / "model.part").write_bytes(whole[:1000])
    assert loading.write_model(begun, "toy", CPU).read_bytes() == whole
    assert {path.name for path in begun.iterdir()} == {loading.MARKER, "config.json", "model.safetensors"}


def test_rows_of_every_way_cold_and_warm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "loading.jsonl"
    options = ["--model", "toy", "--directory", str(tmp_path / "model"), "--device", "cpu", "--out", str(out)]
    assert loading.main(options) == 0
    rows = harness.read(out)
    assert [(row["way"], row["cache"]) for row in rows] == [(w, c) for w in loading.WAYS for c in ("cold", "warm")]
    reads = {row["cache"]: row["seconds"] for row in rows if row["way"] == "read"}
    for row in rows:
        assert row["bench"] == "loading" and row["bytes"] == (tmp_path / "model" / "model.safetensors").stat().st_size
        assert row["floor_s"] == pytest.approx(reads[row["cache"]], rel=1e-4)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9, rel=1e-4)
        assert (row["stayed_cached"] is None) == (row["cache"] == "warm")
    assert "offload" in capsys.readouterr().out
