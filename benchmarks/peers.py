"""The peers' forward on the same work: diffusers' SkyReels-V2 transformer, as it comes, compiled, and on our ops.

diffusers-compiled: with its blocks compiled. diffusers-accelerated: with our ops under it, eager.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.floor import IMAGE_TOKENS
from benchmarks.models import Work, random_tensor
from skyreels_fast.dit.model import IMAGE_DIM
from skyreels_fast.ops import choose_attention
from skyreels_fast.sampling.timesteps import timestep_matrix, timestep_schedule

PEERS = ("diffusers", "diffusers-compiled", "diffusers-accelerated")
_CUDNN = "_native_cudnn"


def missing(peer: str, work: Work) -> str | None:
    """Why a peer cannot do this work here, or None."""
    if work.teacache is not None:
        return f"{peer}: has no TeaCache, so there is no row of it"
    if work.causal and work.block == 1:
        return f"{peer}: has no causal attention in blocks of one latent frame, so there is no row of it"
    if importlib.util.find_spec("diffusers") is None:
        return f"{peer}: diffusers is not installed here (pip install diffusers accelerate), so there is no row of it"
    return None


def measure(peer: str, work: Work, device: torch.device, *, shift: float = 8.0) -> dict[str, Any]:
    """Row values of one peer's forward: of its transformer alone, with random weights of the same sizes.

    Raises whatever diffusers raises.
    """
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    compiled = peer == "diffusers-compiled"
    torch._dynamo.reset()
    model = transformer(work, device)
    accelerated = peer == "diffusers-accelerated"
    attention = _accelerate(model, device, work.dtype) if accelerated else _set_attention(model, device)
    if compiled:
        model.compile_repeated_blocks(dynamic=False)
    forward = forward_of(model, work, device, shift)
    with torch.inference_mode():
        if not forward().isfinite().all():
            raise RuntimeError(f"{peer} gave values that are not finite: its time means nothing")
        harness.reset_peaks(device)
        timing = harness.measure(forward, device, budget_s=10, repeats=(3, 10), warm_up=1, flush=False)
    allocated, reserved = harness.peaks_gib(device)
    return {
        "attention": attention,
        "ms_per_forward": timing.median * 1e3,
        "ms_per_forward_p20": timing.p20 * 1e3,
        "ms_per_forward_p80": timing.p80 * 1e3,
        "s_per_step": timing.median * work.branches,
        "peak_allocated_gib": allocated,
        "peak_reserved_gib": reserved,
        "weights_gib": sum(parameter.nbytes for parameter in model.parameters()) / harness.GIB,
    }


def transformer(work: Work, device: torch.device) -> nn.Module:
    """diffusers' model of the work's size in its dtype, save for what diffusers itself keeps in float32."""
    from diffusers import SkyReelsV2Transformer3DModel
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2RotaryPosEmbed

    config = work.config
    image = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": config.dim} if config.model_type == "i2v" else {}
    with torch.device("meta"):
        model = SkyReelsV2Transformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            inject_sample_info=config.inject_sample_info,
            **image,
        )
    model.rope = SkyReelsV2RotaryPosEmbed(config.head_dim, config.patch_size, 1024).to(device)
    exact = model._keep_in_fp32_modules
    for name, parameter in list(model.named_parameters()):
        dtype = torch.float32 if any(part in name.split(".") for part in exact) else work.dtype
        value = random_tensor(name, tuple(parameter.shape), device, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if work.causal:
        model._set_ar_attention(work.block)
    return model.eval()


def forward_of(model: nn.Module, work: Work, device: torch.device, shift: float) -> Callable[[], Tensor]:
    """One forward on random inputs: a timestep for each latent frame in diffusion forcing, else a single one."""
    config, (frames, height, width) = work.config, work.grid
    draw = {"device": device, "dtype": work.dtype}
    latents = torch.randn(1, config.in_dim, frames, 2 * height, 2 * width, **draw)
    text = torch.randn(1, config.text_len, config.text_dim, **draw)
    options: dict[str, Any] = {"return_dict": False}
    timestep = torch.tensor([500], device=device)
    if work.kind == "df":
        options["enable_diffusion_forcing"] = True
        rows = timestep_matrix(
            frames, timestep_schedule(work.steps, shift), ar_step=work.ar_step, block=work.block or 1
        ).timesteps
        timestep = torch.tensor([rows[len(rows) // 2]], device=device)
    if config.inject_sample_info:
        options["fps"] = [0 if work.fps == 16 else 1]
    if config.model_type == "i2v":
        options["encoder_hidden_states_image"] = torch.randn(1, IMAGE_TOKENS, IMAGE_DIM, **draw)
    return lambda: model(latents, timestep, text, **options)[0]


def _set_attention(model: nn.Module, device: torch.device) -> str:
    """cuDNN where diffusers lets it be chosen and the device is a GPU, which is the fastest that it has by itself."""
    if device.type != "cuda" or not hasattr(model, "set_attention_backend"):
        return "sdpa"
    model.set_attention_backend(_CUDNN)
    return "cudnn"


def _accelerate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Our ops under it, and the backend of attention that they take here."""
    from skyreels_fast.integrations.diffusers import accelerate

    accelerate(model)
    return choose_attention(None, device, dtype)
