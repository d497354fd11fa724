"""What a window starts from: noise, with the latents of what is given in their places."""

from __future__ import annotations

import torch
from torch import Tensor

from .conditions import History
from .config import LATENT_CHANNELS, VAE_STRIDE
from .request import Settings
from .sampling.windows import Window
from .vae import VAE


def starting_latents(
    vae: VAE,
    settings: Settings,
    window: Window,
    pictures: dict[str, Tensor],
    history: History,
    noise: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Latents [1, 16, F, h, w] float32 on the generator's device, those of the end image appended.

    pictures, history: what is given at the start and at the end. dtype: the model's. `vae` is on the device.
    """
    prefix, end = _given(vae, window, pictures, history)
    shape = (window.latents, settings.height // VAE_STRIDE[1], settings.width // VAE_STRIDE[2])
    # Diffusion forcing draws in the model's dtype: the seed's frames depend on it.
    drawn = dtype if settings.mode == "df" else torch.float32
    latents = torch.randn(LATENT_CHANNELS, *shape, generator=noise, dtype=drawn, device=noise.device)[None].float()
    if prefix is not None:
        latents[:, :, : window.prefix] = prefix
    return latents if end is None else torch.cat([latents, end], dim=2)


def _given(
    vae: VAE, window: Window, pictures: dict[str, Tensor], history: History
) -> tuple[Tensor | None, Tensor | None]:
    """Latents held through a window: of earlier frames or the image at its start, of the end image at its end."""
    prefix = end = None
    if window.prefix and history.frames:
        prefix = vae.encode_stream(history.chunks())
    elif window.prefix:
        prefix = vae.encode(pictures["image"])
    if window.end:
        end = vae.encode(pictures["end_image"])
    return prefix, end
