"""Decoding in overlapping tiles, for GPUs that do not hold what whole frames need.

A tile is decoded through the whole video before the next one begins, for each keeps frames of its own; where tiles
overlap they fade into each other linearly. What a tile does not see of the frame it cannot take into account, mostly in
the decoder's attention, so the result is close to that of whole frames and not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import LATENT_CHANNELS, VAE_STRIDE
from .layers import CausalConv3d
from .resampling import Upsample

if TYPE_CHECKING:
    from .model import VAE

OVERLAP = 8  # latent pixels that neighbours share, at least
SMALLEST = 2 * OVERLAP  # latent pixels along a side
_WORKING_FRAMES = 8  # of the widest layer: its input, the norm, three joined, two outputs, and what waits below


def decode_bytes(vae: VAE, shape: Sequence[int]) -> int:
    """Device memory, beside the weights, to decode latents of `shape` [B, 16, F, h, w] in whole frames; an estimate.

    The frames that each causal layer keeps, and what the widest layer works on. It does not grow with F.
    """
    pixels = shape[0] * shape[-2] * shape[-1]
    itemsize = vae.conv2.weight.itemsize
    held = widest = 0
    for stage in vae.decoder.stages:
        for conv in (module for module in stage.modules() if isinstance(module, CausalConv3d)):
            held += conv.held_bytes(pixels)
            widest = max(widest, pixels * max(conv.in_channels, conv.out_channels) * itemsize)
        if isinstance(stage, Upsample):
            pixels *= 4
    chunk = 2 * VAE_STRIDE[0] * pixels * 3 * 4  # frames in float32, and stacked
    return held + _WORKING_FRAMES * widest + chunk


def least_bytes(vae: VAE) -> int:
    """As `decode_bytes`, of the smallest tiles that frames of any size are cut into."""
    return decode_bytes(vae, (1, LATENT_CHANNELS, 1, SMALLEST + OVERLAP, SMALLEST + OVERLAP))


def decode(
    vae: VAE, decode_whole: Callable[[Tensor], Iterator[Tensor]], latents: Tensor, budget_bytes: int
) -> Iterator[Tensor]:
    """`VAE.decode_stream` in tiles of which each fits into the budget; float32 on the host, after the last tile.

    Raises ValueError where the smallest tile does not fit.
    """
    rows, columns = _layout(vae, latents.shape, budget_bytes)
    batch, _, frames, height, width = latents.shape
    high, wide = height * VAE_STRIDE[1], width * VAE_STRIDE[2]
    video = torch.zeros(batch, 3, VAE_STRIDE[0] * (frames - 1) + 1, high, wide)
    weights = torch.zeros(high, wide)
    for (top, bottom), (left, right) in product(rows, columns):
        weight = _fade(top, bottom, height)[:, None] * _fade(left, right, width)
        window = (
            ...,
            slice(top * VAE_STRIDE[1], bottom * VAE_STRIDE[1]),
            slice(left * VAE_STRIDE[2], right * VAE_STRIDE[2]),
        )
        weights[window] += weight
        first = 0
        for chunk in decode_whole(latents[..., top:bottom, left:right]):
            video[:, :, first : first + chunk.shape[2]][window] += chunk.cpu() * weight
            first += chunk.shape[2]
    yield from (video / weights).split([1] + [VAE_STRIDE[0]] * (frames - 1), dim=2)


def _layout(vae: VAE, shape: Sequence[int], budget_bytes: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the tiles begin and end, in latent rows and columns: the fewest that fit."""
    batch, channels, frames, height, width = shape
    counts = product(range(1, _most_tiles(height) + 1), range(1, _most_tiles(width) + 1))
    for down, across in sorted(counts, key=lambda count: (count[0] * count[1], abs(count[0] - count[1]))):
        rows, columns = _spans(height, down), _spans(width, across)
        largest = (batch, channels, frames, rows[0][1], columns[0][1])
        needed = decode_bytes(vae, largest)
        if needed <= budget_bytes:
            return rows, columns
    raise ValueError(
        f"budget_bytes={budget_bytes}: decoding needs at least {needed} for the smallest tile; give it that much"
    )


def _most_tiles(size: int) -> int:
    return max(1, (size - OVERLAP) // (SMALLEST - OVERLAP))


def _spans(size: int, count: int) -> list[tuple[int, int]]:
    """`count` equal spans over `size`, evenly spread, that overlap by OVERLAP or more."""
    length = -(-(size + (count - 1) * OVERLAP) // count)
    starts = [(size - length) * index // max(count - 1, 1) for index in range(count)]
    return [(start, start + length) for start in starts]


def _fade(start: int, stop: int, size: int) -> Tensor:
    """The weight of each pixel from latent pixel `start` to `stop`: falls towards edges that are not the frame's."""
    pixels, ramp = (stop - start) * VAE_STRIDE[1], OVERLAP * VAE_STRIDE[1]
    rising = ((torch.arange(pixels) + 0.5) / ramp).clamp(max=1)
    weight = torch.ones(pixels)
    if start > 0:
        weight = weight * rising
    return weight * rising.flip(0) if stop < size else weight
