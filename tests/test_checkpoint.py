"""The transformer's weights: the files they come in, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import loaded, meta_dit, published, save_shards
from conftest import GOLDEN, load_golden, rel_l2
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyreels_fast.checkpoint import Checkpoint, CheckpointError
from skyreels_fast.dit.model import DiT


@torch.no_grad()
def df_output(model: DiT) -> Tensor:
    golden, text = load_golden("components"), load_golden("text")
    context = model.encode_context(text["cond"][None])
    return model(golden["dit.latent"], golden["dit.timestep_frames"], context, fps=24)


def test_golden_model_opens_and_computes_what_the_golden_file_holds(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(published(tmp_path / "df"))
    assert (checkpoint.config.dim, checkpoint.config.num_heads, checkpoint.config.text_dim) == (128, 2, 64)
    assert checkpoint.name == "df" and checkpoint.root == tmp_path / "df" and checkpoint.generation_config == {}
    assert rel_l2(df_output(loaded(tmp_path / "df")), load_golden("components")["dit.df.fps24.out"]) < 1e-5


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("index", [False, True])
def test_shards_hold_the_same_model_as_one_file(tmp_path: Path, stem: str, index: bool) -> None:
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    save_shards(published(tmp_path, weights=False), weights, stem, 3, index=index)
    found = Checkpoint.open(tmp_path).transformer_weights()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["model.pth", "diffusion_pytorch_model.pth", "my_finetune.pth"])
def test_pth_weights_hold_the_same_model(tmp_path: Path, name: str) -> None:
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    torch.save(weights, published(tmp_path, weights=False) / name)
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    found = Checkpoint.open(tmp_path).transformer_weights()
    assert found.keys() == weights.keys()
    assert torch.equal(found["head.head.weight"], weights["head.head.weight"])


def test_a_pth_file_older_than_the_zip_format_loads(tmp_path: Path) -> None:
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    torch.save(weights, published(tmp_path, weights=False) / "model.pth", _use_new_zipfile_serialization=False)
    found = Checkpoint.open(tmp_path).transformer_weights()
    assert torch.equal(found["head.head.weight"], weights["head.head.weight"])


@pytest.mark.parametrize("index", [False, True])
def test_missing_shards_are_named(tmp_path: Path, index: bool) -> None:
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    save_shards(published(tmp_path, weights=False), weights, "model", 4, index=index)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00004.*, model-00004-of-00004.* of its 4"):
        Checkpoint.open(tmp_path).transformer_weights()


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    save_shards(published(tmp_path, weights=False), weights, "model", 2)
    save_file(weights, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="which another weight file beside it holds too"):
        Checkpoint.open(tmp_path).transformer_weights()


def test_several_unknown_weight_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, published(tmp_path, weights=False) / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="weights named one, two: name those to use model.safetensors"):
        Checkpoint.open(tmp_path).transformer_weights()


# Strictness


def damaged(tmp_path: Path, change) -> Checkpoint:
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    change(weights)
    save_file(weights, published(tmp_path, weights=False) / "model.safetensors")
    return Checkpoint.open(tmp_path)


def test_missing_tensors_are_named_then_counted(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.startswith("blocks.1.self_attn.")]:
            del weights[name]

    checkpoint = damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.self_attn\.k\.bias, .* and 6 more$") as error:
        checkpoint.check_transformer(meta_dit(checkpoint))
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.load_transformer(meta_dit(checkpoint), "cpu", torch.float32)


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    checkpoint = damaged(tmp_path, lambda weights: weights.update({"blocks.0.lora.down": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"unknown blocks\.0\.lora\.down"):
        checkpoint.check_transformer(meta_dit(checkpoint))


@pytest.mark.parametrize("name", ["head.head.bias", "blocks.0.self_attn.k.weight"])
def test_misshapen_tensors_are_refused(tmp_path: Path, name: str) -> None:
    checkpoint = damaged(tmp_path, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=f"misshapen .*{re.escape(name)}"):
        checkpoint.check_transformer(meta_dit(checkpoint))


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "i2v" / "model.safetensors", published(tmp_path))
    with pytest.raises(CheckpointError, match=r"missing fps_embedding\.weight.*unknown .*k_img.*misshapen patch_embed"):
        Checkpoint.open(tmp_path).check_transformer(meta_dit(Checkpoint.open(tmp_path)))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("keep", [0, 5, 100_000])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, name: str, keep: int) -> None:
    file = published(tmp_path, weights=False) / name
    weights = load_file(GOLDEN / "df" / "model.safetensors")
    save_file(weights, file) if file.suffix == ".safetensors" else torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read, download it again") as error:
        Checkpoint.open(tmp_path).transformer_weights()
    assert "\n" not in str(error.value)


def test_a_pth_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}}, published(tmp_path, weights=False) / "model.pth")
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        Checkpoint.open(tmp_path).transformer_weights()


class Touch:
    """Pickles to a call that would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_pth_file_runs_no_code(tmp_path: Path) -> None:
    torch.save({"a": Touch(tmp_path / "ran")}, published(tmp_path, weights=False) / "model.pth")
    with pytest.raises(CheckpointError, match="model.pth cannot be read"):
        Checkpoint.open(tmp_path).transformer_weights()
    assert not (tmp_path / "ran").exists()
