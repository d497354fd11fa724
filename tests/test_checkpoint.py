"""Model directories: both layouts, strictness, mapping, the hub's cache."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skyreels_fast.checkpoint import Checkpoint, CheckpointError, check, fill
from skyreels_fast.config import LATENTS_MEAN, LATENTS_STD
from skyreels_fast.dit.model import DiT
from skyreels_fast.vae import VAE

HUB_ID = "Skywork/SkyReels-V2-DF-1.3B-540P"


def published(directory: Path, *, golden: str = "df", weights: bool = True) -> Path:
    """A golden model as a directory of its own, in the published layout."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / golden / "config.json", directory)
    if weights:
        shutil.copy(GOLDEN / golden / "model.safetensors", directory)
    return directory


def save_shards(directory: Path, weights: dict[str, Tensor], stem: str, count: int, *, index: bool = False) -> None:
    names, placed = sorted(weights), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = names[i::count]
        save_file({name: weights[name] for name in shard}, directory / file)
        placed |= dict.fromkeys(shard, file)
    if index:
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def meta_dit(checkpoint: Checkpoint) -> DiT:
    with torch.device("meta"):
        return DiT(checkpoint.config)


def loaded(directory: Path) -> DiT:
    checkpoint = Checkpoint.open(directory)
    model = meta_dit(checkpoint)
    checkpoint.check_transformer(model)
    checkpoint.load_transformer(model, "cpu", torch.float32)
    return model


@torch.no_grad()
def df_output(model: DiT) -> Tensor:
    golden, text = load_golden("components"), load_golden("text")
    context = model.encode_context(text["cond"][None])
    return model(golden["dit.latent"], golden["dit.timestep_frames"], context, fps=24)


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Whether the tensor's data lies in memory that the kernel maps from `file`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *_, path = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= tensor.data_ptr() < end:
            return path == str(file.resolve())
    return False


# Where the transformer's weights are


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


# What a directory says of itself


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
    assert not (checkpoint.has_vae or checkpoint.has_text_encoder or checkpoint.has_image_encoder)
    shutil.copy(GOLDEN / "Wan2.1_VAE.pth", tmp_path)
    shutil.copy(GOLDEN / "t5_tiny.pth", tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    assert checkpoint.has_vae and not checkpoint.has_text_encoder
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
    assert checkpoint.has_text_encoder and checkpoint.tokenizer_path() == tmp_path / "google" / "umt5-xxl"


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


# Filling


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.scale = nn.Parameter(torch.empty(()))
        self.register_buffer("steps", torch.arange(3, device="cpu"))


FUSED_PARTS = {
    "qkv.weight": ("q.weight", "k.weight", "v.weight"),
    "qkv.bias": ("q.bias", "k.bias", "v.bias"),
    "scale": ("scale",),
}


def fused_sources() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sources = {f"{name}.weight": torch.randn(4, 4, generator=generator) for name in "qkv"}
    return {
        **sources,
        **{f"{name}.bias": torch.randn(4, generator=generator) for name in "qkv"},
        "scale": torch.tensor(2.0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fill_joins_parts_and_casts(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        module = Fused()
    sources = fused_sources()
    fill(module, sources, FUSED_PARTS, device="cpu", dtype=dtype, what="toy")
    assert torch.equal(module.qkv.weight, torch.cat([sources[f"{n}.weight"] for n in "qkv"]).to(dtype))
    assert torch.equal(module.qkv.bias, torch.cat([sources[f"{n}.bias"] for n in "qkv"]).to(dtype))
    assert module.scale.item() == 2 and {p.dtype for p in module.parameters()} == {dtype}


def test_fill_under_inference_mode_gives_weights_that_can_be_trained() -> None:
    with torch.device("meta"):
        module = Fused()
    sources = fused_sources()
    with torch.inference_mode():
        fill(module, sources, FUSED_PARTS, device="cpu", dtype=torch.float32, what="toy")
    module.qkv(torch.ones(1, 4)).sum().backward()
    assert module.qkv.weight.grad is not None


def test_check_reads_shapes_alone_and_weighs_parts_together() -> None:
    with torch.device("meta"):
        module = Fused()
        sources = {name: torch.empty(tensor.shape) for name, tensor in fused_sources().items()}
    check(module, sources, FUSED_PARTS, what="toy")
    sources["v.weight"] = torch.empty(4, 5, device="meta")
    with pytest.raises(CheckpointError, match=r"^toy: misshapen q\.weight \+ k\.weight \+ v\.weight .*\(12, 4\)$"):
        check(module, sources, FUSED_PARTS, what="toy")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_weights_stay_mapped_and_cost_no_memory_of_their_own(tmp_path: Path, name: str) -> None:
    def anonymous_bytes() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    weight, file = torch.zeros(4096, 4096), published(tmp_path, weights=False) / name
    save_file({"weight": weight}, file) if file.suffix == ".safetensors" else torch.save({"weight": weight}, file)
    del weight
    module = nn.Linear(4096, 4096, bias=False, device="meta")
    before = anonymous_bytes()
    fill(module, Checkpoint.open(tmp_path).transformer_weights(), device="cpu", dtype=torch.float32, what="toy")
    assert is_mapped(module.weight, file)
    assert module.weight.sum() == 0  # pages are read in, and still belong to the file
    assert anonymous_bytes() - before < 16 * 2**20 < module.weight.nbytes


# The diffusers layout


def diffusers_transformer(is_i2v: bool):
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    image = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 24} if is_i2v else {"inject_sample_info": True}
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=40, num_layers=2, **image
    )
    for parameter in model.parameters():  # norms and tables as the rest, so that a mixed-up name shows
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("is_i2v", [False, True])
def test_diffusers_transformer_computes_the_same(tmp_path: Path, is_i2v: bool) -> None:
    theirs = diffusers_transformer(is_i2v)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.model_type == ("i2v" if is_i2v else "t2v")
    assert checkpoint.mode_hint() == ("i2v" if is_i2v else "df")
    ours = loaded(tmp_path)
    latents, text = torch.randn(1, 36 if is_i2v else 16, 3, 4, 6), torch.randn(1, 512, 16)
    image, timestep = torch.randn(1, 257, 1280) if is_i2v else None, torch.tensor([600])
    with torch.no_grad():
        fps = {} if is_i2v else {"fps": [1]}
        expected = theirs(latents, timestep, text, encoder_hidden_states_image=image, **fps).sample
        actual = ours(latents, timestep, ours.encode_context(text, image), fps=24)
    assert rel_l2(actual, expected) < 1e-5


def test_unused_norm_of_early_diffusers_conversions_is_passed_over(tmp_path: Path) -> None:
    diffusers_transformer(True).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check_transformer(meta_dit(checkpoint))


def test_diffusers_vae_computes_the_same(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=8, latents_mean=[0.5] * 16, latents_std=[2.0] * 16).eval()
    for name, parameter in theirs.named_parameters():
        if not name.endswith("gamma"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(published(tmp_path) / "vae")
    checkpoint = Checkpoint.open(tmp_path)
    weights, (mean, std) = checkpoint.vae_weights(), checkpoint.vae_statistics()
    assert mean == (0.5,) * 16 and std == (2.0,) * 16
    with torch.device("meta"):
        ours = VAE(VAE.base_dim_of(weights), latents_mean=mean, latents_std=std)
    checkpoint.load_vae(ours, "cpu", torch.float32)
    video, latents = torch.rand(1, 3, 9, 32, 32) * 2 - 1, torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        assert rel_l2(ours.encode(video), (theirs.encode(video).latent_dist.mean - 0.5) / 2) < 1e-5
        assert rel_l2(ours.decode(latents), theirs.decode(latents * 2 + 0.5).sample) < 1e-5


def test_published_vae_and_its_statistics(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "Wan2.1_VAE.pth", published(tmp_path))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.vae_statistics() == (LATENTS_MEAN, LATENTS_STD)
    with torch.device("meta"):
        vae = VAE(VAE.base_dim_of(checkpoint.vae_weights()))
    checkpoint.load_vae(vae, "cpu", torch.float32)
    golden = load_golden("components")
    with torch.no_grad():
        assert rel_l2(vae.decode(golden["vae.z"][None])[0], golden["vae.decoded"]) < 1e-5
    (tmp_path / "vae_config.json").write_text(json.dumps({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}))
    assert checkpoint.vae_statistics() == ((0.0,) * 16, (1.0,) * 16)


# Names of models


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
