"""Files that hold something else than they should: each is refused in one line, and nothing else is printed."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import published
from conftest import GOLDEN

from skyreels_fast.checkpoint import Checkpoint, CheckpointError
from skyreels_fast.config import TransformerConfig
from skyreels_fast.vae import VAE

VALUES = json.loads((GOLDEN / "df" / "config.json").read_text())


class Call:
    """Pickles to a call that weights may not make."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello, this is text", b"\x80\x02.", b"<html>", *(pickle.dumps({"a": Call()}, protocol=p) for p in (2, 4))],
)
def test_a_pth_file_of_anything_is_refused_in_one_quiet_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, data: bytes
) -> None:
    (published(tmp_path) / "Wan2.1_VAE.pth").write_bytes(data)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth cannot be read") as error:
        warnings.simplefilter("error")
        Checkpoint.open(tmp_path).vae_weights()
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_pth_file_whose_names_are_no_strings_is_refused(tmp_path: Path) -> None:
    torch.save({1: torch.ones(1)}, published(tmp_path) / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        Checkpoint.open(tmp_path).vae_weights()


def test_another_models_weights_are_no_vae() -> None:
    with pytest.raises(ValueError, match=r"is not a Wan VAE: encoder\.conv1\.weight is missing$"):
        VAE.base_dim_of({"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"is not a Wan VAE: encoder\.conv1\.weight has shape \(\)"):
        VAE.base_dim_of({"encoder.conv1.weight": torch.ones(())})
    assert VAE.base_dim_of({"encoder.conv1.weight": torch.ones(96, 3, 3, 3, 3)}) == 96


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("values", [None, "0" * 16, 1, [1.0] * 15, [[1]] * 16, ["1"] * 16, [float("nan")] * 16])
def test_statistics_of_the_latents_are_16_numbers(tmp_path: Path, name: str, values: object) -> None:
    (published(tmp_path) / "Wan2.1_VAE.pth").touch()
    (tmp_path / "vae_config.json").write_text(json.dumps({name: values}))
    with pytest.raises(CheckpointError, match=rf"vae_config\.json: {name} is not a list of 16 finite numbers"):
        Checkpoint.open(tmp_path).vae_statistics()


def test_deviations_of_the_latents_are_above_zero(tmp_path: Path) -> None:
    (published(tmp_path) / "Wan2.1_VAE.pth").touch()
    (tmp_path / "vae_config.json").write_text(json.dumps({"latents_mean": [0] * 16, "latents_std": [0] * 16}))
    with pytest.raises(CheckpointError, match="latents_std is not a list of 16 finite numbers above 0"):
        Checkpoint.open(tmp_path).vae_statistics()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", 128.0), ("dim", "128"), ("dim", -128), ("dim", None), ("num_heads", 0), ("num_layers", 2.5),
        ("ffn_dim", True), ("text_len", 0), ("freq_dim", 63), ("eps", "x"), ("eps", None), ("eps", float("nan")),
        ("patch_size", 2), ("patch_size", None), ("window_size", 1),
    ],
)  # fmt: skip
def test_a_config_with_a_value_of_the_wrong_kind_names_it(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: {key} {value!r} is not"):
        TransformerConfig.from_dict(VALUES | {key: value})
    (tmp_path / "config.json").write_text(json.dumps(VALUES | {key: value}))
    with pytest.raises(CheckpointError, match=rf"/config\.json: {key} {value!r} is not"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("heads", ["2", 0, None])
def test_a_diffusers_config_names_its_own_key(tmp_path: Path, heads: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads, "num_layers": 1, "ffn_dim": 8}))
    with pytest.raises(CheckpointError, match=f"num_attention_heads {heads!r} is not a whole number"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shards", [{"a": 5}, {"a": None}, {"a": ["b"]}, {"a": "../b.safetensors"}, ["a"], "a", {}])
def test_an_index_of_anything_but_file_names_is_refused(tmp_path: Path, shards: object) -> None:
    index = published(tmp_path, weights=False) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=r"index\.json(: weight_map: a: .* is not the name| holds no weight_map)"):
        Checkpoint.open(tmp_path).transformer_weights()
