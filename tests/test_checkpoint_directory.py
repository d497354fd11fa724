"""What a model directory says of itself, and how it is found: by path, by hub id, by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from checkpoints import meta_dit, published, save_shards
from conftest import GOLDEN
from safetensors.torch import load_file

from skyreels_fast.checkpoint import Checkpoint, CheckpointError

HUB_ID = "Skywork/SkyReels-V2-DF-1.3B-540P"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json .* is missing"),
        ("{", "config.json is not readable JSON"),
        ("[1]", "config.json holds no JSON object"),
        ('{"model_type": "t2v"}', "config.json lacks in_dim, dim"),
        ('{"num_attention_heads": 2, "num_layers": 1}', "config.json lacks ffn_dim"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(tmp_path)


def test_a_directory_without_weights_is_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks model.safetensors"):
        Checkpoint.open(published(tmp_path, weights=False)).transformer_weights()


def test_parts_present_and_required(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(published(tmp_path))
    for part in ("vae", "text_encoder", "image_encoder"):
        with pytest.raises(CheckpointError, match="lacks"):
            checkpoint.require(part)
    shutil.copy(GOLDEN / "Wan2.1_VAE.pth", tmp_path)
    shutil.copy(GOLDEN / "t5_tiny.pth", tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    checkpoint.require("vae")
    with pytest.raises(
        CheckpointError, match=r"lacks google/umt5-xxl/tokenizer\.json .*, models_clip_open-clip"
    ) as error:
        checkpoint.require("vae", "text_encoder", "image_encoder")
    assert "models_t5" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        checkpoint.tokenizer_path()
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    checkpoint.require("vae", "text_encoder")
    assert checkpoint.tokenizer_path() == tmp_path / "google" / "umt5-xxl"


def test_resolution_hint(tmp_path: Path) -> None:
    assert Checkpoint.open(published(tmp_path / "SkyReels-V2-T2V-14B-720P")).resolution_hint() == "720P"
    assert Checkpoint.open(published(tmp_path / "model")).resolution_hint() == "540P"
    sharded = published(tmp_path / "sharded", weights=False)
    save_shards(sharded, load_file(GOLDEN / "df" / "model.safetensors"), "diffusion_pytorch_model", 2)
    assert Checkpoint.open(sharded).resolution_hint() == "720P"


@pytest.mark.parametrize(
    ("golden", "name", "extra", "hint"),
    [
        ("i2v", "SkyReels-V2-DF-14B", {}, "i2v"),
        ("df", "anything", {}, "df"),
        ("t2v", "SkyReels-V2-DF-14B-540P", {}, "df"),
        ("t2v", "my_df_model", {}, "df"),
        ("t2v", "SkyReels-V2-T2V-14B-540P", {}, "t2v"),
        ("t2v", "pdf-models", {}, None),
        ("t2v", "anything", {"generation_config.json": {"mode": "df"}}, "df"),
        ("t2v", "anything", {"model_index.json": {"_class_name": "SkyReelsV2DiffusionForcingPipeline"}}, "df"),
        ("t2v", "anything", {"model_index.json": {"_class_name": "SkyReelsV2Pipeline"}}, "t2v"),
    ],
)
def test_mode_hint(tmp_path: Path, golden: str, name: str, extra: dict, hint: str | None) -> None:
    directory = published(tmp_path / name, golden=golden)
    for file, values in extra.items():
        (directory / file).write_text(json.dumps(values))
    assert Checkpoint.open(directory).mode_hint() == hint


def test_generation_config(tmp_path: Path) -> None:
    (published(tmp_path) / "generation_config.json").write_text('{"height": 96, "mode": "soon"}')
    assert Checkpoint.open(tmp_path).generation_config["height"] == 96
    shutil.copy(GOLDEN / "t2v" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="mode 'soon' is not one of"):
        Checkpoint.open(tmp_path).mode_hint()


@pytest.mark.parametrize("name", ["nonsense", "./a/b", "a/b/c", "/no/such/directory", "Skywork/", ""])
def test_names_that_are_neither_directory_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no such model directory: {re.escape(name)}.*hub id such as.*'tiny'"):
        Checkpoint.open(name)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no way out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_unknown_hub_id_offline_is_one_clear_line(offline: Path) -> None:
    with pytest.raises(ValueError, match=f"^{HUB_ID} .*HF_HUB_OFFLINE.* or give a directory") as error:
        Checkpoint.open(HUB_ID)
    assert "\n" not in str(error.value)


def test_a_cached_hub_model_opens_offline(offline: Path) -> None:
    repository = offline / "models--Skywork--SkyReels-V2-DF-1.3B-540P"
    snapshot = published(repository / "snapshots" / ("0" * 40), golden="t2v")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    checkpoint = Checkpoint.open(HUB_ID)
    assert checkpoint.name == HUB_ID and checkpoint.root.samefile(snapshot) and checkpoint.mode_hint() == "df"
    assert Checkpoint.open(snapshot).name == HUB_ID


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(hub_id: str, **options) -> str:
        asked.update(options)
        return str(published(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Checkpoint.open(HUB_ID)
    needed = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "google/umt5-xxl/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/tokenizer.json",
        "model_index.json",
    ]
    rest = ["README.md", "assets/logo.png", "xlm-roberta-large/tokenizer.json", "google/umt5-xxl/spiece.model"]
    assert list(filter_repo_objects(needed + rest, **asked)) == needed


def test_the_bundled_model_opens() -> None:
    checkpoint = Checkpoint.open("tiny")
    assert checkpoint.name == "tiny"
    checkpoint.check_transformer(meta_dit(checkpoint))
