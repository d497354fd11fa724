"""Rendered clips as latents on the device: what the diffusion model trains on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from skyreels_fast.vae import VAE
from training.data import attribute_table, draw_scenes, draw_start, render, trajectory
from training.prompts import BACKGROUNDS, MOTIONS, SHAPES, TRAIN_SCENES


@dataclass(frozen=True)
class Clips:
    """n clips with prompts that are trained on.

    latents: [n,16,F,h,w], normalised. last: [n,16,1,h,w], each clip's last pixel frame encoded alone, as an end image.
    prompt: [n] int64, indices into ALL_SCENES.
    """

    latents: Tensor
    last: Tensor
    prompt: Tensor


def scene_index(attributes: Tensor) -> Tensor:
    """[n] indices into ALL_SCENES of attribute rows [n,4]."""
    colour, shape, motion, background = attributes.unbind(1)
    return ((colour * len(SHAPES) + shape) * len(MOTIONS) + motion) * len(BACKGROUNDS) + background


@torch.no_grad()
def encode_clips(
    vae: VAE,
    count: int,
    seconds: float,
    start: str,
    generator: torch.Generator,
    *,
    frames: int,
    canvas: tuple[int, int],
    batch: int,
) -> Clips:
    """Render and encode up to `count` clips of "first" or "mid" kind in about `seconds`, a batch at least."""
    table = attribute_table(TRAIN_SCENES).to(generator.device)
    parts, began = [], time.perf_counter()
    while not parts or (batch * len(parts) < count and time.perf_counter() - began < seconds):
        scenes = draw_scenes(batch, generator, table=table, canvas=canvas)
        position = trajectory(scenes, frames, draw_start(batch, generator, start), canvas)
        video = render(scenes, position, canvas)[0].to(vae.conv2.weight.dtype)
        parts.append((_normalised(vae, video), _normalised(vae, video[:, :, -1:]), scene_index(scenes.attributes)))
        if video.is_cuda:
            torch.cuda.synchronize()
    return Clips(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _normalised(vae: VAE, video: Tensor) -> Tensor:
    """What `vae.encode` gives, for a whole batch of short clips at once."""
    mean, _ = vae.encode_moments(video)
    shape = (1, -1, 1, 1, 1)
    centre = torch.tensor(vae.latents_mean, device=video.device).view(shape)
    scale = torch.tensor(vae.latents_std, device=video.device).view(shape)
    return ((mean.float() - centre) / scale).to(video.dtype)
