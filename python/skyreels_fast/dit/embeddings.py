"""What goes into the blocks beside the latents: time, frame rate, text and image conditions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` of x in float32, whatever the dtype of its weights."""
    return functional.linear(x.float(), layer.weight.float(), layer.bias.float())


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[cos | sin] of timestep * 10000^(-i / half), half = dim / 2: [...] to [..., dim] float32 from float64 angles."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double().unsqueeze(-1) * 10000.0**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def mlp_fp32(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, SiLU, Linear in float32."""
    return linear_fp32(layers[2], functional.silu(linear_fp32(layers[0], x)))


def project_fp32(layer: nn.Linear, x: Tensor, parts: int) -> Tensor:
    """`layer` of x in float32, its outputs in `parts`: [..., D] to [..., parts, D'].

    Part by part, for the float32 copy of the whole weight would be 600 MiB in a 14B model.
    """
    weights, biases = layer.weight.chunk(parts), layer.bias.chunk(parts)
    rows = [functional.linear(x, weight.float(), bias.float()) for weight, bias in zip(weights, biases, strict=True)]
    return torch.stack(rows, dim=-2)


class ImageEmbedding(nn.Module):
    """CLIP tokens [B, n, image_dim] to context tokens [B, n, dim]: LayerNorm, Linear, GELU, Linear, LayerNorm."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


def patches(latents: Tensor) -> Tensor:
    """Latents [B, C, F, H, W] cut in 1 x 2 x 2 patches: [B, F * H/2 * W/2, C * 4], tokens in (f, h, w) order."""
    batch, channels, frames, height, width = latents.shape
    cut = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * 4)


def unpatch(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens [B, f * h * w, 4 * C], channels last in a patch, to latents [B, C, f, 2h, 2w]."""
    frames, height, width = grid
    cut = tokens.reshape(tokens.shape[0], frames, height, width, 2, 2, -1)
    return cut.permute(0, 6, 1, 2, 4, 3, 5).reshape(tokens.shape[0], -1, frames, 2 * height, 2 * width)
