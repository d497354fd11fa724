"""Diffusion forcing's training examples: latents noised frame by frame in all the ways the samplers ask for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.latents import Clips

HIGHEST = 0.999
MID_SHARE = 0.15  # of the examples continue a given stretch of a video that may have bounced already
GIVEN_SHARE = 0.12  # of the others start from given frames, half of them from a single image
GIVEN_SHARE_WITH_END = 0.7
LONGEST_PREFIX = 10  # latent frames: an overlap of 37 pixel frames


class Example(NamedTuple):
    """A batch: the model sees `noised` [n,16,F,h,w] at `timestep` [n,F] and should say `velocity`."""

    noised: Tensor
    timestep: Tensor
    velocity: Tensor
    learnt: Tensor  # [n,1,F,1,1] float32: 1 on frames that count in the loss
    prompt: Tensor  # [n] indices into ALL_SCENES


def noise_levels(n: int, frames: int, generator: torch.Generator) -> Tensor:
    """[n, frames] noise levels in 0..HIGHEST: per frame (40 %), one for all (40 %), or staggered in blocks (20 %).

    Uniform levels are warped as the sampler's are, by a shift drawn from 2..8. Staggered rows are what an asynchronous
    schedule shows: finished frames at 0, then a slope, then frames that wait at HIGHEST.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=generator.device)

    block = torch.randint(1, 6, (n, 1), generator=generator, device=generator.device)
    column = torch.arange(frames, device=generator.device) // block
    delay = 0.02 + 0.28 * rand(n, 1)
    moment = rand(n, 1) * (1 + column[:, -1:] * delay)
    staggered = (1 - moment + column * delay).clamp(0, 1)
    kind = rand(n, 1)
    levels = torch.where(kind < 0.4, rand(n, frames), torch.where(kind < 0.8, rand(n, 1), staggered))
    shift = 2 + 6 * rand(n, 1)
    return (shift * levels / (1 + (shift - 1) * levels)).clamp(max=HIGHEST)


def given_frames(mid: Tensor, frames: int, end: bool, generator: torch.Generator) -> Tensor:
    """[n] how many latent frames are given at the start; `mid` [n] tells which clips need two or more."""
    n, device = len(mid), generator.device
    longest = min(LONGEST_PREFIX, frames - 1)
    if longest < 1:
        return torch.zeros(n, dtype=torch.int64, device=device)
    several = torch.randint(min(2, longest), longest + 1, (n,), generator=generator, device=device)
    chance = torch.rand(2, n, generator=generator, device=device)
    given = chance[0] < (GIVEN_SHARE_WITH_END if end else GIVEN_SHARE)
    return torch.where(mid, several, torch.where(chance[1] < 0.5, 1, several) * given)


def make_example(first: Clips, mid: Clips, n: int, frames: int, end: bool, generator: torch.Generator) -> Example:
    """Draw n examples of `frames` latent frames, with `end` (whole clips only) a given end image behind them.

    Clips that start in the middle of a video always come with two given frames or more: their prompt alone would not
    tell where they go.
    """
    device = generator.device
    is_mid = torch.rand(n, generator=generator, device=device) < (MID_SHARE if frames > 2 else 0.0)
    rows = torch.randint(len(first.prompt), (n,), generator=generator, device=device)
    mid_rows = torch.randint(len(mid.prompt), (n,), generator=generator, device=device)

    def pick(name: str) -> Tensor:
        ours, theirs = getattr(first, name)[rows], getattr(mid, name)[mid_rows]
        return torch.where(is_mid.view(-1, *(1,) * (ours.ndim - 1)), theirs, ours)

    clean = pick("latents")[:, :, :frames].float()
    levels = noise_levels(n, frames, generator)
    given = given_frames(is_mid, frames, end, generator)
    levels = torch.where(torch.arange(frames, device=device) < given[:, None], 0.0, levels)
    if end:
        clean = torch.cat([clean, pick("last").float()], dim=2)
        levels = torch.cat([levels, torch.zeros_like(levels[:, :1])], dim=1)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    level = levels[:, None, :, None, None]
    return Example(
        noised=(1 - level) * clean + level * noise,
        timestep=1000 * levels,
        velocity=noise - clean,
        learnt=(level > 0).float(),
        prompt=pick("prompt"),
    )
