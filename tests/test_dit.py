"""The DiT against golden outputs, and against an independent implementation with other sizes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2
from torch import Tensor

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import DiT


def load_published(dit: DiT, published: dict[str, Tensor]) -> DiT:
    """Assemble the fused parameters; every published tensor must be used, and once."""
    left = dict(published)
    state = {name: torch.cat([left.pop(part) for part in parts]) for name, parts in dit.key_parts().items()}
    assert not left
    dit.load_state_dict(state, strict=True, assign=True)
    return dit.requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {**load_golden("components"), **load_golden("text")}


def golden_model(name: str) -> DiT:
    config = TransformerConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()))
    with torch.device("meta"):
        dit = DiT(config)
    return load_published(dit, {key: value.float() for key, value in load_golden(f"{name}/model").items()})


@pytest.fixture(scope="module")
def df() -> DiT:
    return golden_model("df")


@pytest.mark.parametrize(
    ("name", "latents", "timestep", "fps", "block"),
    [
        ("fps16", "dit.latent", "dit.timestep_frames", 16, None),
        ("fps24", "dit.latent", "dit.timestep_frames", 24, None),
        ("causal1", "dit.latent", "dit.timestep_frames", 24, 1),
        ("causal2", "dit.latent6", "dit.timestep6", 24, 2),
    ],
)
@torch.inference_mode()
def test_golden_df(
    df: DiT, golden: dict[str, Tensor], name: str, latents: str, timestep: str, fps: int, block: int | None
) -> None:
    context = df.encode_context(golden["cond"][None])
    out = df(golden[latents], golden[timestep], context, fps, block)
    assert out.dtype == torch.float32
    assert rel_l2(out, golden[f"dit.df.{name}.out"]) < 1e-5


@torch.inference_mode()
def test_golden_t2v(golden: dict[str, Tensor]) -> None:
    dit = golden_model("t2v")
    context = dit.encode_context(golden["cond"][None])
    for timestep in (torch.tensor([600]), torch.full((1, 5), 600.0)):
        assert rel_l2(dit(golden["dit.latent"], timestep, context), golden["dit.t2v.out"]) < 1e-5


@torch.inference_mode()
def test_golden_i2v(golden: dict[str, Tensor]) -> None:
    dit = golden_model("i2v")
    context = dit.encode_context(golden["cond"][None], golden["dit.i2v.clip"])
    latents = torch.cat((golden["dit.latent"], golden["dit.i2v.y"]), dim=1)
    assert rel_l2(dit(latents, torch.tensor([600]), context), golden["dit.i2v.out"]) < 1e-5


def test_key_parts_are_the_published_keys() -> None:
    for name in ("df", "t2v", "i2v"):
        dit = golden_model(name)
        parts = dit.key_parts()
        assert list(parts) == [key for key, _ in dit.named_parameters()]
        assert sorted(part for names in parts.values() for part in names) == sorted(load_golden(f"{name}/model"))
    assert parts["blocks.1.self_attn.qkv.bias"] == tuple(f"blocks.1.self_attn.{part}.bias" for part in "qkv")
    assert parts["blocks.0.cross_attn.kv_img.weight"][1] == "blocks.0.cross_attn.v_img.weight"
    assert parts["head.head.weight"] == ("head.head.weight",)


def test_14b_builds_on_meta() -> None:
    config = TransformerConfig(model_type="t2v", in_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    with torch.device("meta"):
        dit = DiT(config)
    assert sum(parameter.numel() for parameter in dit.parameters()) == 14_288_491_584
    assert all(parameter.is_meta for parameter in dit.parameters())
    assert not list(dit.buffers())


# Against diffusers ---------------------------------------------------------------------------------------------------

RENAMES = [
    (r"^head\.modulation", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"^text_embedding\.", "condition_embedder.text_embedder."),
    (r"^time_embedding\.", "condition_embedder.time_embedder."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"(embedder)\.0\.", r"\1.linear_1."),
    (r"(embedder)\.2\.", r"\1.linear_2."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"(ffn|fps_projection)\.0\.", r"\1.net.0.proj."),
    (r"(ffn|fps_projection)\.2\.", r"\1.net.2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.norm_k_img\.", ".norm_added_k."),
    (r"\.([kv])_img\.", r".add_\1_proj."),
    (r"(attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(attn\d)\.o\.", r"\1.to_out.0."),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
]


def diffusers_name(published: str) -> str:
    for pattern, replacement in RENAMES:
        published = re.sub(pattern, replacement, published)
    return published


def diffusers_pair(model_type: str, *, fps: bool = False) -> tuple[torch.nn.Module, DiT]:
    """A random diffusers model of sizes unlike the goldens', and ours with its weights."""
    transformers = pytest.importorskip("diffusers.models.transformers.transformer_skyreels_v2")
    image = model_type == "i2v"
    torch.manual_seed(1)
    theirs = transformers.SkyReelsV2Transformer3DModel(
        num_attention_heads=3, attention_head_dim=64, in_channels=36 if image else 16, text_dim=40, freq_dim=32,
        ffn_dim=224, num_layers=3, image_dim=1280 if image else None, added_kv_proj_dim=192 if image else None,
        inject_sample_info=fps,
    )  # fmt: skip
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.08)
    config = TransformerConfig(
        model_type=model_type, in_dim=36 if image else 16, dim=192, ffn_dim=224, num_heads=3, num_layers=3,
        freq_dim=32, text_dim=40, inject_sample_info=fps,
    )  # fmt: skip
    with torch.device("meta"):
        dit = DiT(config)
    state = theirs.state_dict()
    published = {part: state.pop(diffusers_name(part)) for parts in dit.key_parts().values() for part in parts}
    assert not state
    return theirs.eval().requires_grad_(False), load_published(dit, published)


def padded(text: Tensor) -> Tensor:
    return torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


@pytest.mark.parametrize("fps", [16, 30])
@pytest.mark.parametrize("block", [None, 2])
@torch.inference_mode()
def test_diffusers_df(fps: int, block: int | None) -> None:
    theirs, dit = diffusers_pair("t2v", fps=True)
    if block:
        theirs._set_ar_attention(block)
    latents, text = torch.randn(1, 16, 4, 6, 10), torch.randn(1, 33, 40)
    timestep = torch.tensor([[0, 17, 512, 999]])
    extra = {"enable_diffusion_forcing": True, "fps": [0 if fps == 16 else 1], "return_dict": False}
    expected = theirs(latents, timestep, padded(text), **extra)[0]
    out = dit(latents, timestep, dit.encode_context(text), fps, block)
    assert rel_l2(out, expected) < 1e-5


@torch.inference_mode()
def test_diffusers_t2v_batch() -> None:
    theirs, dit = diffusers_pair("t2v")
    latents, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 512, 40)
    timestep = torch.tensor([3, 801])
    expected = theirs(latents, timestep, text, return_dict=False)[0]
    assert rel_l2(dit(latents, timestep, dit.encode_context(text)), expected) < 1e-5


@torch.inference_mode()
def test_diffusers_i2v() -> None:
    theirs, dit = diffusers_pair("i2v")
    latents, text, image = torch.randn(1, 36, 1, 8, 2), torch.randn(1, 5, 40), torch.randn(1, 257, 1280)
    timestep = torch.tensor([250])
    expected = theirs(latents, timestep, padded(text), image, return_dict=False)[0]
    assert rel_l2(dit(latents, timestep, dit.encode_context(text, image)), expected) < 1e-5


@torch.inference_mode()
def test_bfloat16_error_is_below_diffusers() -> None:
    """Their residual is rounded after every sublayer, ours once a block; both against float32 on the same weights."""
    theirs, dit = diffusers_pair("t2v")
    theirs, dit = theirs.bfloat16(), dit.bfloat16()
    text = torch.randn(1, 50, 40).bfloat16()
    latents = torch.randn(1, 16, 3, 8, 8).bfloat16().float()
    timestep = torch.tensor([640])
    out = dit(latents, timestep, dit.encode_context(text))
    low = theirs(latents.bfloat16(), timestep, padded(text), return_dict=False)[0]
    dit = dit.float()
    exact = dit(latents, timestep, dit.encode_context(text.float()))
    assert out.dtype == torch.float32
    assert 0 < rel_l2(out, exact) < 1e-2
    assert rel_l2(out, exact) < rel_l2(low, exact)
