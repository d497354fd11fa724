"""The layers, each in two forms that compute the same.

`forward` takes a whole video [B, C, T, H, W] and is how training runs them. `flow` takes an iterator of frames
[B, H, W, C] and gives one of frames, in order of time: every convolution looks only back, so a layer keeps the one or
two frames it still needs and nothing else. Flows chain; a frame goes through all of them before the next is asked for,
so what lies in memory is those few frames of each layer and no more than two frames on their way. No frame is
padded, joined to its past or copied into it: `ops.causal_conv3d` reads the frames where they are.

`out_shape` and `cost` tell, of a video's frames [T, B, H, W, C], what `flow` makes of them and how much work that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import causal_conv3d, norm_silu
from ..ops.causal_conv3d import causal_conv3d_cost
from ..ops.norm_silu import norm_silu_cost

Frames = Iterator[Tensor]
Shape = tuple[int, int, int, int, int]  # of a video's frames: [T, B, H, W, C]

_FLOPS_PER_BYTE = 150  # of convolutions on an H200, while its memory moves a byte
_COLUMNS = 64  # output channels that kernels compute together


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that pads time on the past's side alone."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.past = kernel[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x)

    def step(self) -> Callable[..., Tensor]:
        """A function (frame, residual=None, gamma=None) → output frame, to be called with a video's frames in turn."""
        if self._is_narrow:
            return self._narrow_step()
        frames: list[Tensor] = []

        def step(frame: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
            frames.append(frame)
            out = causal_conv3d(frames, self.weight, self.bias, residual, gamma)
            if len(frames) > self.past:
                frames.pop(0)
            return out

        return step

    @property
    def _is_narrow(self) -> bool:
        """Whether the sums that a frame adds to are smaller than the frame."""
        return 0 < (self.past + 1) * self.out_channels <= self.in_channels

    def held_bytes(self, pixels: int) -> int:
        """What `step` keeps between frames of so many pixels."""
        if self._is_narrow:
            return self.past * pixels * self.out_channels * 4
        return self.past * pixels * self.in_channels * self.weight.itemsize

    def _narrow_step(self) -> Callable[[Tensor], Tensor]:
        """As `step`, where few channels come of many: it keeps what a frame adds to later outputs, not the frame.

        One convolution in space gives a frame's part of this output and of the next ones. They add up in float32.
        """
        taps = self.past + 1
        weight = self.weight.transpose(0, 2).transpose(1, 2).flatten(0, 1)[:, :, None]  # [KT·O, C, 1, KH, KW]
        # Kernels want whole eights of channels.
        weight = F.pad(weight, (0, 0) * 4 + (0, -len(weight) % 8)).contiguous(memory_format=torch.channels_last_3d)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        pending: list[Tensor] = []  # parts of the next output, of the one after it, …

        def step(frame: Tensor) -> Tensor:
            parts = causal_conv3d([frame], weight)[..., : taps * self.out_channels].to(dtype)
            parts = [*parts.unflatten(-1, (taps, self.out_channels)).unbind(-2)][::-1]
            sums = [part + held for part, held in zip(parts, pending, strict=False)] + parts[len(pending) :]
            pending[:] = sums[1:]
            return sums[0] + self.bias

        return step

    def flow(self, frames: Frames) -> Frames:
        return map(self.step(), frames)

    def out_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.out_channels)

    def cost(self, shape: Shape, *, residual: bool = False) -> int:
        out, channels, *taps = self.weight.shape
        weight_shape = (taps[0] * out, channels, 1, *taps[1:]) if self._is_narrow else (out, channels, *taps)
        return convolution_cost(shape, weight_shape, residual=residual)


class ChannelNorm(nn.Module):
    """x / ‖x‖ · √C · gamma over the channels."""

    def __init__(self, dim: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.gamma.shape[0] ** 0.5 * self.gamma

    def frame(self, x: Tensor, silu: bool) -> Tensor:
        """The norm of a frame [B, H, W, C], and SiLU of it."""
        return norm_silu(x, self.gamma.flatten(), silu=silu)

    @staticmethod
    def cost(shape: Shape) -> int:
        return as_flops(*norm_silu_cost(shape))


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # Positions 1, 4 and 5 hold no weights (SiLU, SiLU, dropout): identities keep the published numbering.
        self.residual = nn.ModuleList(
            [
                ChannelNorm(in_dim),
                nn.SiLU(),
                CausalConv3d(in_dim, out_dim, 3),
                ChannelNorm(out_dim),
                nn.SiLU(),
                nn.Identity(),
                CausalConv3d(out_dim, out_dim, 3),
            ]
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.residual, x) + self.shortcut(x)

    def flow(self, frames: Frames) -> Frames:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        first, second = conv1.step(), conv2.step()

        def step(x: Tensor) -> Tensor:
            shortcut = pointwise(self.shortcut, x) if isinstance(self.shortcut, CausalConv3d) else x
            # Nested, so that each frame on the way is gone when the next is made.
            return second(first(norm1.frame(x, silu=True), gamma=norm2.gamma.flatten()), shortcut)

        return map(step, frames)

    def out_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.residual[-1].out_channels)

    def cost(self, shape: Shape) -> int:
        norm1, _, conv1, *_, conv2 = self.residual  # the second norm is taken with the first convolution
        shortcut = self.shortcut.cost(shape) if isinstance(self.shortcut, CausalConv3d) else 0
        return norm1.cost(shape) + conv1.cost(shape) + conv2.cost(self.out_shape(shape), residual=True) + shortcut


class SpatialAttention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # [B·T, C, H, W]
        q, k, v = self.to_qkv(self.norm(frames)).permute(0, 2, 3, 1).chunk(3, dim=-1)
        out = self.proj(self._attend(q, k, v).permute(0, 3, 1, 2))
        return x + out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def flow(self, frames: Frames) -> Frames:
        return map(self._frame, frames)

    def out_shape(self, shape: Shape) -> Shape:
        return shape

    def cost(self, shape: Shape) -> int:
        frames, batch, height, width, channels = shape
        pixels = height * width
        products = 2 * frames * batch * pixels * channels * (4 * channels + 2 * pixels)
        return self.norm.cost(shape) + products

    def _frame(self, x: Tensor) -> Tensor:
        q, k, v = pointwise(self.to_qkv, self.norm.frame(x, silu=False)).chunk(3, dim=-1)
        return x + pointwise(self.proj, self._attend(q, k, v))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, W, C]: [B, H, W, C]"""
        flat = (part.flatten(1, 2)[:, None].contiguous() for part in (q, k, v))  # [B, 1, H·W, C]
        return F.scaled_dot_product_attention(*flat)[:, 0].unflatten(1, q.shape[1:3])


class Head(nn.ModuleList):
    """Norm, SiLU and the convolution that ends an encoder or a decoder."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__([ChannelNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)

    def flow(self, frames: Frames) -> Frames:
        norm, _, conv = self
        return conv.flow(map(partial(norm.frame, silu=True), frames))

    def out_shape(self, shape: Shape) -> Shape:
        return self[-1].out_shape(shape)

    def cost(self, shape: Shape) -> int:
        norm, _, conv = self
        return norm.cost(shape) + conv.cost(shape)


def apply(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """A whole video through the layers in turn."""
    for layer in layers:
        x = layer(x)
    return x


def flow(layers: Iterable[nn.Module], frames: Frames) -> Frames:
    """Frames through the layers in turn, as they are asked for."""
    for layer in layers:
        frames = layer.flow(frames)
    return frames


def pointwise(conv: nn.Conv2d | nn.Conv3d, frame: Tensor) -> Tensor:
    """A convolution with a kernel of one pixel, of a frame [B, H, W, C]."""
    return F.linear(frame, conv.weight.flatten(1), conv.bias)


def convolution_cost(shape: Shape, weight_shape: tuple[int, ...], *, residual: bool = False) -> int:
    """`as_flops` of a convolution [O, C, KT, KH, KW] of frames [T, B, H, W, C], one output for each."""
    frames, batch, *plane = shape
    columns = -(-weight_shape[0] // _COLUMNS) * _COLUMNS
    return as_flops(*causal_conv3d_cost((frames * batch, *plane), (columns, *weight_shape[1:]), residual=residual))


def as_flops(moved_bytes: int, flops: int) -> int:
    """Work as FLOPs alone: those that take as long as moving the bytes, and those that are done."""
    return flops + _FLOPS_PER_BYTE * moved_bytes
