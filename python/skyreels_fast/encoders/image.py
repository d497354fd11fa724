"""CLIP's image tower: an image → tokens [1 + patches, dim], those after its last block but one.

The ViT-H/14 of open-clip xlm-roberta-large-vit-huge-14 (pre-norm, exact GELU, no bias in the patch embedding).
Its sizes are read off the weights, so that a small one works the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from .._meta import without_weights

# The images' mean and standard deviation in CLIP's training data, RGB in [0, 1] (arXiv:2103.00020).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_HEAD_DIM = 80  # of ViT-H/14: 1280 in 16 heads. Weights do not tell the number of heads.
_TOKENS, _WIDTH = 257, 1280  # what the image-to-video transformers take
_PUBLISHED = {
    "visual.patch_embedding": "model.embeddings.patch_embedding",
    "visual.pre_norm": "model.pre_layrnorm",
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_OWN = {ours.removeprefix("model."): published for published, ours in _PUBLISHED.items()} | {
    f"self_attn.{part}_proj": "attn.to_qkv" for part in "qkv"
}
_EMBEDDINGS = {
    "model.embeddings.class_embedding": "visual.cls_embedding",
    "model.embeddings.position_embedding.weight": "visual.pos_embedding",
}
# What a checkpoint may hold and no image token needs: CLIP's text side, and all that follows the tokens taken.
_UNUSED = re.compile(
    r"textual\..*|log_scale|visual\.head|visual\.post_norm\..*|"
    r"(vision_model\.)?(post_layernorm\..*|embeddings\.position_ids)|visual_projection\.weight"
)


class Checkpoint(Protocol):
    """What `ImageEncoder.load` and `ImageEncoder.check` need of a checkpoint."""

    def image_weights(self) -> tuple[dict[str, Tensor], dict]: ...

    def load_image_encoder(self, encoder: ImageEncoder, device: Any, dtype: torch.dtype) -> None: ...

    def check_encoder(self, part: str, make: Callable[[dict[str, Tensor], dict], ImageEncoder]) -> ImageEncoder: ...


class ImageEncoder(nn.Module):
    """CLIP's image tower up to its last block but one, made on the meta device: fill it with `renamed(weights)`.

    Args:
        weights: the checkpoint's tensors, with the published names (`visual.*`) or those of transformers'
            CLIPVisionModel; only their shapes are looked at.
        settings: values of a transformers config.json that shapes do not tell.
        num_heads: attention heads; None takes the settings' num_attention_heads, else heads of 80 as in ViT-H/14.

    Raises:
        ValueError: the weights are not a CLIP image tower's, or the number of heads is unknown.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], settings: Mapping | None = None, *, num_heads: int | None = None
    ) -> None:
        super().__init__()
        self._is_published = _is_published(weights)
        config = _config(self.renamed(weights), settings or {}, num_heads, self.name_in_checkpoint)
        with without_weights():
            model = CLIPVisionModel(config).eval()
        self.model = getattr(model, "vision_model", model)  # transformers 4 wraps the tower
        self.model.post_layernorm = nn.Identity()
        positions = self.model.embeddings.position_embedding.num_embeddings
        self.model.embeddings.position_ids = torch.arange(positions).unsqueeze(0)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, which run one after the other."""
        return self.model.encoder.layers

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: Any = "cpu") -> ImageEncoder:
        """The image encoder of a checkpoint, filled; on the CPU with the checkpoint's own dtype it stays mapped.

        device: or a home for weights, as `checkpoint.fill` takes.
        """
        encoder = cls(*checkpoint.image_weights())
        checkpoint.load_image_encoder(encoder, device, dtype)
        return encoder

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> None:
        """Find what is wrong with a checkpoint's image encoder from headers alone, loading nothing.

        Raises ValueError, in one line, where tensors are missing, unknown or misshapen, or where it does not give the
        257 tokens of 1280 that the transformers take.
        """

        def make(weights: dict[str, Tensor], settings: dict) -> ImageEncoder:
            encoder = cls(weights, settings)
            tokens, width = encoder.model.embeddings.position_embedding.weight.shape
            if (tokens, width) != (_TOKENS, _WIDTH):
                raise ValueError(
                    f"it gives {tokens} tokens of {width}, the transformer takes {_TOKENS} tokens of {_WIDTH}"
                )
            return encoder

        checkpoint.check_encoder("image_encoder", make)

    def name_in_checkpoint(self, name: str) -> str:
        """A name as `renamed` gives it → the name in the checkpoint; of q, k, v in one tensor, that of the whole."""
        if not self._is_published:
            return name.removeprefix("model.")
        if name in _EMBEDDINGS:
            return _EMBEDDINGS[name]
        block = re.fullmatch(r"model\.encoder\.layers\.(\d+)\.(.+)", name)
        prefix, rest = (f"visual.transformer.{block[1]}.", block[2]) if block else ("", name.removeprefix("model."))
        module, _, leaf = rest.rpartition(".")
        return f"{prefix}{_OWN[module]}.{leaf}" if module in _OWN else name

    @property
    def image_size(self) -> int:
        """Height and width of what the tower sees, in pixels."""
        return self.model.config.image_size

    @staticmethod
    def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under this module's parameter names, as views; what is not known keeps its own name.

        Left out are those of no use: CLIP's text side, the last block, what follows it.
        """
        is_published = _is_published(weights)
        renamed: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if not _UNUSED.fullmatch(name):
                renamed.update(_from_published(name, tensor) if is_published else {_from_transformers(name): tensor})
        last = f"model.encoder.layers.{_blocks(renamed) - 1}."
        return {name: tensor for name, tensor in renamed.items() if not name.startswith(last)}

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """RGB images [B, 3, H, W] in [−1, 1] → tokens [B, 1 + patches, dim], in the weights' dtype and device.

        They are resized (bicubic, not keeping the aspect ratio) and normalised in float32.
        """
        weight = self.model.embeddings.patch_embedding.weight
        pixels = image.to(weight.device, torch.float32)
        pixels = F.interpolate(pixels, size=(self.image_size,) * 2, mode="bicubic", align_corners=False)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        pixels = ((pixels + 1) / 2 - mean) / std
        return self.model(pixel_values=pixels.to(weight.dtype)).last_hidden_state


def _is_published(weights: Mapping[str, Tensor]) -> bool:
    theirs = "embeddings.patch_embedding.weight"
    return not any(name in weights for name in (theirs, f"vision_model.{theirs}"))


def _from_published(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One published tensor as the tower's: the fused q, k, v apart, embeddings without their dimensions of one."""
    if name == "visual.cls_embedding":
        return {"model.embeddings.class_embedding": tensor.reshape(-1)}
    if name == "visual.pos_embedding":
        return {"model.embeddings.position_embedding.weight": tensor.flatten(0, -2)}
    block = re.fullmatch(r"visual\.transformer\.(\d+)\.(.+)", name)
    prefix, rest = (f"model.encoder.layers.{block[1]}.", block[2]) if block else ("", name)
    module, _, leaf = rest.rpartition(".")
    if block and module == "attn.to_qkv":
        return {
            f"{prefix}self_attn.{part}_proj.{leaf}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)
        }
    return {f"{prefix}{_PUBLISHED[module]}.{leaf}" if module in _PUBLISHED else name: tensor}


def _from_transformers(name: str) -> str:
    return "model." + name.removeprefix("vision_model.")


def _blocks(weights: Mapping[str, Tensor]) -> int:
    found = (re.match(r"model\.encoder\.layers\.(\d+)\.", name) for name in weights)
    return 1 + max((int(block[1]) for block in found if block), default=-1)


def _config(
    weights: Mapping[str, Tensor], settings: Mapping, num_heads: int | None, shown: Callable[[str], str]
) -> CLIPVisionConfig:
    def sizes(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"these are not the weights of a CLIP image tower: {shown(name)} is missing")
        shape = tuple(weights[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"these are not the weights of a CLIP image tower: {shown(name)} has shape {shape}")
        return shape

    dim, _, patch, _ = sizes("model.embeddings.patch_embedding.weight", 4)
    positions, _ = sizes("model.embeddings.position_embedding.weight", 2)
    ffn_dim, _ = sizes("model.encoder.layers.0.mlp.fc1.weight", 2)
    heads = num_heads or settings.get("num_attention_heads")
    if heads is None and dim % _HEAD_DIM:
        raise ValueError(f"how many heads an image encoder of dim {dim} has is unknown: give num_attention_heads")
    return CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=ffn_dim,
        num_hidden_layers=_blocks(weights),
        num_attention_heads=heads or dim // _HEAD_DIM,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act=settings.get("hidden_act", "gelu"),
        layer_norm_eps=settings.get("layer_norm_eps", 1e-5),
    )
