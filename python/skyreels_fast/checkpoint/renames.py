"""The diffusers layout's names and settings → the published ones. A name that is not known stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from ..config import require_size

_TRANSFORMER = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "fps_projection.net.0.proj": "fps_projection.0",
    "fps_projection.net.2": "fps_projection.2",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
_TRANSFORMER_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
# Saved by early conversions of the I2V models; no model has a use for it.
_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\..*")

_VAE = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_VAE_HALF = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_VAE_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def publish(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """`weights` under their published names, without those known to be of no use."""
    return {rename(name): tensor for name, tensor in weights.items() if not _UNUSED.fullmatch(name)}


def transformer_name(name: str) -> str:
    """The published name of a parameter of diffusers' SkyReelsV2Transformer3DModel."""
    if block := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        return block[1] + _moved(block[2], _TRANSFORMER_BLOCK)
    return _moved(name, _TRANSFORMER)


def vae_name(name: str) -> str:
    """The published name of a parameter of diffusers' AutoencoderKLWan."""
    half = re.fullmatch(r"((?:en|de)coder\.)(.+)", name)
    if not half:
        return _moved(name, _VAE)
    block = re.fullmatch(
        r"((?:down|up|mid)_blocks?\.(?:\d+\.)?(?:(?:resnets|attentions|upsamplers)\.\d+\.)?)(.+)", half[2]
    )
    if not block:
        return half[1] + _moved(half[2], _VAE_HALF)
    return half[1] + _vae_block(block[1]) + _moved(block[2], _VAE_BLOCK)


def _vae_block(path: str) -> str:
    """Levels of blocks, counted through as one list: a decoder level is three residual blocks and an upsampler."""
    if found := re.fullmatch(r"down_blocks\.(\d+)\.", path):
        return f"downsamples.{found[1]}."
    if found := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", path):
        return f"upsamples.{4 * int(found[1]) + int(found[3]) + 3 * (found[2] == 'upsamplers')}."
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.", path):
        return f"middle.{2 * int(found[2]) + (found[1] == 'attentions')}."
    return path  # of another VAE


def _moved(name: str, table: Mapping[str, str]) -> str:
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else name


def transformer_settings(values: Mapping) -> dict:
    """diffusers' transformer/config.json as the published config.json has it; values not renamed stay as they are."""
    is_i2v = values.get("image_dim") is not None or values.get("added_kv_proj_dim") is not None
    in_dim = values.get("in_channels", 16)
    heads, head_dim = values["num_attention_heads"], values.get("attention_head_dim", 128)
    require_size("num_attention_heads", heads)
    require_size("attention_head_dim", head_dim)
    return {
        **values,
        "model_type": "i2v" if is_i2v else "t2v",
        "dim": heads * head_dim,
        "num_heads": heads,
        "in_dim": in_dim,
        "out_dim": values.get("out_channels") or in_dim,
        "qk_norm": values.get("qk_norm", True) in (True, "rms_norm_across_heads"),
    }
