"""CLIP's image tower: the golden output, both naming schemes, what is done to the image first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2
from torch import Tensor
from torch.nn import functional

from skyreels_fast.checkpoint import Checkpoint, CheckpointError, fill
from skyreels_fast.encoders.image import IMAGE_MEAN, IMAGE_STD, ImageEncoder


def golden_weights() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "clip_tiny.pth", weights_only=True, mmap=True)


def made(weights: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    weights = weights or golden_weights()
    encoder = ImageEncoder(weights, num_heads=4)
    fill(encoder, encoder.renamed(weights), device="cpu", dtype=dtype, what="image encoder")
    return encoder


def unnormalised(pixels: Tensor) -> Tensor:
    """The image in [−1, 1] that normalisation turns into `pixels`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels * std + mean) * 2 - 1


# The golden image is what the network itself takes: normalised, 56 x 56.


def test_golden_output() -> None:
    golden, encoder = load_golden("components"), made()
    assert encoder.image_size == 56
    assert rel_l2(encoder.encode(unnormalised(golden["clip.image"])), golden["clip.out"]) < 1e-5


def test_bfloat16() -> None:
    golden, encoder = load_golden("components"), made(dtype=torch.bfloat16)
    out = encoder.encode(unnormalised(golden["clip.image"]))
    assert out.dtype == torch.bfloat16 and rel_l2(out, golden["clip.out"]) < 0.02


def test_images_are_resized_bicubic_to_the_towers_size() -> None:
    encoder, image = made(), torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = functional.interpolate(image, size=(56, 56), mode="bicubic", align_corners=False)
    out = encoder.encode(image)
    assert out.shape == (2, 17, 64)
    assert rel_l2(out, encoder.encode(small)) < 1e-5
    assert rel_l2(out[:1], encoder.encode(image[:1])) < 1e-5


def test_a_flat_image_of_the_mean_colour_reaches_the_network_as_zeros() -> None:
    encoder = made()
    colour = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1).expand(1, 3, 30, 30) * 2 - 1
    with torch.no_grad():
        expected = encoder.model(pixel_values=torch.zeros(1, 3, 56, 56)).last_hidden_state
    assert rel_l2(encoder.encode(colour), expected) < 1e-5


def test_the_last_block_is_neither_built_nor_needed() -> None:
    weights = {name: tensor for name, tensor in golden_weights().items() if "transformer.3." not in name}
    weights["visual.transformer.3.norm1.weight"] = torch.ones(64)  # that there is a fourth block is all that counts
    del weights["visual.head"], weights["visual.post_norm.weight"], weights["visual.post_norm.bias"]
    golden = load_golden("components")
    assert rel_l2(made(weights).encode(unnormalised(golden["clip.image"])), golden["clip.out"]) < 1e-5


def test_the_text_side_is_passed_over_and_nothing_else() -> None:
    weights = golden_weights() | {"textual.token_embedding.weight": torch.ones(2), "log_scale": torch.ones(())}
    made(weights)
    with pytest.raises(CheckpointError, match=r"unknown visual\.adapter"):
        made(weights | {"visual.adapter": torch.ones(2)})
    del weights["visual.transformer.1.mlp.0.bias"]
    with pytest.raises(CheckpointError, match=r"missing .*layers\.1\.mlp\.fc1\.bias"):
        made(weights)


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="not the weights of a CLIP image tower"):
        ImageEncoder(torch.load(GOLDEN / "t5_tiny.pth", weights_only=True))


def test_the_number_of_heads_is_given_or_that_of_vit_h() -> None:
    with pytest.raises(ValueError, match="dim 64 .* give num_attention_heads"):
        ImageEncoder(golden_weights())
    published = {name: tensor.to("meta") for name, tensor in golden_weights().items()}
    for name, shape in {
        "patch_embedding.weight": (1280, 3, 14, 14),
        "pos_embedding": (1, 257, 1280),
        "transformer.0.mlp.0.weight": (5120, 1280),
    }.items():
        published[f"visual.{name}"] = torch.empty(shape, device="meta")
    encoder = ImageEncoder(published)
    assert encoder.model.config.num_attention_heads == 16 and encoder.image_size == 224


def test_published_layout(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "i2v" / "config.json", tmp_path)
    shutil.copy(GOLDEN / "clip_tiny.pth", tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    (tmp_path / "image_encoder_config.json").write_text(json.dumps({"num_attention_heads": 4}))
    encoder = ImageEncoder.load(Checkpoint.open(tmp_path), torch.float32)
    golden = load_golden("components")
    assert rel_l2(encoder.encode(unnormalised(golden["clip.image"])), golden["clip.out"]) < 1e-5


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_diffusers_layout_computes_the_same(tmp_path: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    theirs = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=7, hidden_act="gelu")).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "image_encoder")
    file = tmp_path / "image_encoder" / "model.safetensors"
    weights = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in load_file(file).items()}
    save_file(weights | {f"{prefix}embeddings.position_ids": torch.arange(17)}, file)
    shutil.copy(GOLDEN / "i2v" / "config.json", tmp_path)
    encoder = ImageEncoder.load(Checkpoint.open(tmp_path), torch.float32)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert rel_l2(encoder.encode(unnormalised(pixels)), expected) < 1e-5


def vit_h(directory: Path, *, patches: int = 256) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A directory for a tower as wide as ViT-H/14 but of two blocks, and its tensors, to be saved by `checked`."""
    dim, ffn = 1280, 8
    shapes = {"cls_embedding": (1, 1, dim), "pos_embedding": (1, 1 + patches, dim)}
    shapes |= {"patch_embedding.weight": (dim, 3, 14, 14), "pre_norm.weight": (dim,), "pre_norm.bias": (dim,)}
    for name, rows, columns in (("attn.to_qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.0", ffn, dim)):
        shapes |= {f"transformer.0.{name}.weight": (rows, columns), f"transformer.0.{name}.bias": (rows,)}
    shapes |= {"transformer.0.mlp.2.weight": (dim, ffn), "transformer.0.mlp.2.bias": (dim,)}
    shapes |= {f"transformer.0.norm{i}.{leaf}": (dim,) for i in (1, 2) for leaf in ("weight", "bias")}
    shapes["transformer.1.norm1.weight"] = (dim,)
    shutil.copy(GOLDEN / "i2v" / "config.json", directory)
    return Checkpoint.open(directory), {f"visual.{name}": torch.zeros(1).expand(s) for name, s in shapes.items()}


def checked(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    torch.save(weights, checkpoint.root / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    ImageEncoder.check(checkpoint)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("visual.transformer.0.norm1.bias", None, r"missing visual\.transformer\.0\.norm1\.bias$"),
        ("visual.transformer.0.attn.to_qkv.bias", None, r"missing visual\.transformer\.0\.attn\.to_qkv\.bias$"),
        ("visual.cls_embedding", None, r"missing visual\.cls_embedding$"),
        ("visual.patch_embedding.weight", None, r"visual\.patch_embedding\.weight is missing$"),
        ("visual.patch_embedding.weight", torch.ones(4), r"visual\.patch_embedding\.weight has shape \(4,\)$"),
        ("visual.pre_norm.bias", torch.ones(3), r"misshapen visual\.pre_norm\.bias \(3,\) in place of \(1280,\)$"),
        ("visual.adapter", torch.ones(3), r"unknown visual\.adapter$"),
    ],
)
def test_check_finds_damage_without_loading(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    checkpoint, weights = vit_h(tmp_path)
    checked(checkpoint, weights)
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    with pytest.raises(CheckpointError, match=f"^image encoder of .*{message}"):
        checked(checkpoint, weights)


def test_check_refuses_a_tower_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it gives 145 tokens of 1280, the transformer takes 257 tokens of 1280"):
        checked(*vit_h(tmp_path, patches=144))
    (tmp_path / "image_encoder_config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(CheckpointError, match="it gives 17 tokens of 64"):
        checked(Checkpoint.open(tmp_path), golden_weights())
