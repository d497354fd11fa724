"""Tensors into modules: joined, cast, mapped, and renamed from the diffusers layout."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import loaded, meta_dit, published
from conftest import GOLDEN, load_golden, rel_l2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skyreels_fast.checkpoint import Checkpoint, CheckpointError, check, fill
from skyreels_fast.config import LATENTS_MEAN, LATENTS_STD
from skyreels_fast.vae import VAE


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Whether the tensor's data lies in memory that the kernel maps from `file`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *_, path = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= tensor.data_ptr() < end:
            return path == str(file.resolve())
    return False


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


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel decides")
def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this machine promises no more memory than it has")
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    file, nbytes = published(tmp_path, weights=False) / "model.safetensors", 4 * memory
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(header) + nbytes)  # a hole, which takes no room on the disk
    weight = Checkpoint.open(tmp_path).transformer_weights()["w"]
    assert weight.shape == (nbytes,) and weight[-5:].tolist() == [0] * 5


def test_data_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    """As by tools that do not pad the header."""
    value = torch.arange(5.0)
    entry = {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}
    header = json.dumps({"w": entry, "__metadata__": {"format": "pt"}}).encode()
    header = next(header + b" " * pad for pad in range(4) if (len(header) + pad) % 4 == 3)
    data = len(header).to_bytes(8, "little") + header + value.numpy().tobytes()
    (published(tmp_path, weights=False) / "model.safetensors").write_bytes(data)
    weights = Checkpoint.open(tmp_path).transformer_weights()
    assert list(weights) == ["w"] and torch.equal(weights["w"], value)


def test_types_that_no_model_has_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    file = published(tmp_path, weights=False) / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match="cannot be read.*w is of type U16"):
        Checkpoint.open(tmp_path).transformer_weights()


def test_mapped_weights_may_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    directory = published(tmp_path)
    before = (directory / "model.safetensors").read_bytes()
    weights = Checkpoint.open(directory).transformer_weights()
    for tensor in weights.values():
        tensor.zero_()
    assert (directory / "model.safetensors").read_bytes() == before
