"""Small diffusers models with random weights, and inputs of each kind that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FRAMES, HEIGHT, WIDTH = 4, 6, 10  # of the latents; patches halve height and width
PER_FRAME = HEIGHT // 2 * WIDTH // 2
HEADS, HEAD_DIM, TEXT_DIM = 3, 32, 40
IMAGE_TOKENS, IMAGE_DIM = 257, 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(name: str, **config: Any) -> nn.Module:
    """diffusers' model of this class name with random weights, norms about one."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 16, "text_dim": TEXT_DIM}
    made = getattr(diffusers, name)(**{**sizes, "freq_dim": 32, "ffn_dim": 224, "num_layers": 3, **config})
    torch.manual_seed(1)
    for key, parameter in made.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in key and "weight" in key), std=0.08)
    return made.eval().requires_grad_(False)


def sky(**config: Any) -> nn.Module:
    return model("SkyReelsV2Transformer3DModel", **config)


def wan(**config: Any) -> nn.Module:
    return model("WanTransformer3DModel", **config)


def causal(made: nn.Module, block: int) -> nn.Module:
    made._set_ar_attention(block)
    return made


def inputs(channels: int = 16, batch: int = 1, **given: Any) -> dict[str, Any]:
    """The arguments of a model's forward."""
    latents, text = draw(batch, channels, FRAMES, HEIGHT, WIDTH), draw(batch, 512, TEXT_DIM, seed=1)
    timestep = torch.tensor([801, 3])[:batch]
    return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, **given}


def image_tokens(batch: int = 1) -> Tensor:
    return draw(batch, IMAGE_TOKENS, IMAGE_DIM, seed=2)


def token_timesteps() -> Tensor:
    """One a token, zero in the first frame: what Wan 2.2 TI2V is given."""
    return torch.tensor([0, 640, 640, 640]).repeat_interleave(PER_FRAME)[None]


I2V = {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": HEADS * HEAD_DIM}
FORCED = {"timestep": torch.tensor([[0, 17, 512, 999]]), "enable_diffusion_forcing": True}

# A model and its inputs, each made when called for.
CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "sky-df": lambda: (sky(), inputs(**FORCED)),
    "sky-df-fps": lambda: (sky(inject_sample_info=True), inputs(**FORCED, fps=[1])),
    "sky-df-causal": lambda: (causal(sky(inject_sample_info=True), 2), inputs(**FORCED, fps=[0])),
    "sky-t2v": lambda: (sky(), inputs(batch=2)),
    "sky-i2v": lambda: (sky(**I2V), inputs(36, encoder_hidden_states_image=image_tokens())),
    "wan-t2v": lambda: (wan(), inputs(batch=2)),
    "wan-i2v": lambda: (wan(**I2V), inputs(36, 2, encoder_hidden_states_image=image_tokens(2))),
    "wan-plain-cross-attention": lambda: (wan(cross_attn_norm=False), inputs()),
    "wan-ti2v": lambda: (wan(), inputs(timestep=token_timesteps())),
    "wan-ti2v-by-token": lambda: (wan(), inputs(timestep=torch.arange(FRAMES * PER_FRAME)[None] * 16)),
}


def sample(made: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return made(**given, return_dict=False)[0]


def cast(given: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Floating tensors in `dtype`, and all of them on `device`."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: one(value) for name, value in given.items()}


def lower(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as from_pretrained loads it in `dtype`: what diffusers keeps in float32 stays so."""
    for name, parameter in made.named_parameters():
        if not any(part in name.split(".") for part in made._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return made
