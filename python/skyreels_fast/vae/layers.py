"""The layers, each in two forms that compute the same.

`forward` takes a whole video [B, C, T, H, W] and is how training runs them. `flow` takes an iterator of frames
[B, H, W, C] and gives one of frames, in order of time: every convolution looks only back, so a layer keeps the one or
two frames it still needs and nothing else. Flows chain; a frame goes through all of them before the next is asked for,
so what lies in memory is those few frames of each layer and no more than two frames on their way. No frame is
padded, joined to its past or copied into it: `ops.causal_conv3d` reads the frames where they are.

Several processes may each have some rows of every frame: where a layer looks beyond them, `rows` gets it the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import causal_conv3d, norm_silu

Frames = Iterator[Tensor]


class Rows(Protocol):
    """This process's rows of each frame, of several processes that share the frames out by height."""

    def widen(self, frame: Tensor) -> Tensor:
        """[B, h, W, C] with the row above and the row below: [B, h + 2, W, C]; zeros beyond the frame's edges."""

    def whole(self, frame: Tensor) -> Tensor:
        """[B, h, W, C] and all other rows: [B, H, W, C]."""


# Of a frame enlarged twice: which rows of a 3-high kernel fall on source row p − 1, and which on row p, where its
# centre is the second enlarged row of p − 1, and where it is the first of p. Columns likewise.
_ENLARGED = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that pads time on the past's side alone."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.past = kernel[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x)

    def step(self, rows: Rows | None = None) -> Callable[..., Tensor]:
        """A function (frame, residual=None, gamma=None) → output frame, to be called with a video's frames in turn."""
        rows = rows if self.kernel_size[1] > 1 else None
        if self._is_narrow:
            return self._narrow_step(rows)
        frames: list[Tensor] = []

        def step(frame: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
            frames.append(frame if rows is None else rows.widen(frame))
            if rows is not None and residual is not None:
                residual = F.pad(residual, (0, 0, 0, 0, 1, 1))
            out = causal_conv3d(frames, self.weight, self.bias, residual, gamma)
            if len(frames) > self.past:
                frames.pop(0)
            return out if rows is None else _inner(out, 1)

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

    def _narrow_step(self, rows: Rows | None) -> Callable[[Tensor], Tensor]:
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
            wide = causal_conv3d([frame if rows is None else rows.widen(frame)], weight)
            parts = (wide if rows is None else _inner(wide, 1))[..., : taps * self.out_channels].to(dtype)
            parts = [*parts.unflatten(-1, (taps, self.out_channels)).unbind(-2)][::-1]
            sums = [part + held for part, held in zip(parts, pending, strict=False)] + parts[len(pending) :]
            pending[:] = sums[1:]
            return sums[0] + self.bias

        return step

    def flow(self, frames: Frames, rows: Rows | None = None) -> Frames:
        return map(self.step(rows), frames)


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

    def flow(self, frames: Frames, rows: Rows | None = None) -> Frames:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        first, second = conv1.step(rows), conv2.step(rows)

        def step(x: Tensor) -> Tensor:
            shortcut = pointwise(self.shortcut, x) if isinstance(self.shortcut, CausalConv3d) else x
            # Nested, so that each frame on the way is gone when the next is made.
            return second(first(norm1.frame(x, silu=True), gamma=norm2.gamma.flatten()), shortcut)

        return map(step, frames)


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

    def flow(self, frames: Frames, rows: Rows | None = None) -> Frames:
        return map(partial(self._frame, rows=rows), frames)

    def _frame(self, x: Tensor, rows: Rows | None) -> Tensor:
        q, k, v = pointwise(self.to_qkv, self.norm.frame(x, silu=False)).chunk(3, dim=-1)
        if rows is not None:
            k, v = rows.whole(k), rows.whole(v)
        return x + pointwise(self.proj, self._attend(q, k, v))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, h, W, C] to k, v [B, H, W, C]: [B, h, W, C]"""
        flat = (part.flatten(1, 2)[:, None].contiguous() for part in (q, k, v))  # [B, 1, H·W, C]
        return F.scaled_dot_product_attention(*flat)[:, 0].unflatten(1, q.shape[1:3])


class Downsample(nn.Module):
    """Halves height and width; with `in_time` also time, of which the first frame stays as it is."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if in_time:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.in_time = in_time

    def forward(self, x: Tensor) -> Tensor:
        x = _each_frame(self.resample, x)
        if not self.in_time or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)

    def flow(self, frames: Frames, rows: Rows | None = None) -> Frames:
        smaller = map(partial(self._frame, rows=rows), frames)
        return self._halve_time(smaller) if self.in_time else smaller

    def _frame(self, x: Tensor, rows: Rows | None) -> Tensor:
        if rows is None:
            return self.resample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.pad(rows.widen(x)[:, 1:], (0, 0, 0, 1))  # of the rows beyond its own it sees the one below alone
        return self.resample[1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _halve_time(self, frames: Frames) -> Frames:
        held = list(islice(frames, 1))
        yield from held
        for frame in frames:
            held.append(frame)
            if len(held) == 3:
                yield causal_conv3d(held, self.time_conv.weight, self.time_conv.bias)
                del held[:2]


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; with `in_time` doubles every frame but the first."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        # The first position is the parameterless enlargement.
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        if in_time:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        self.in_time = in_time

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time:
            # The first frame is one pixel frame, and the time convolution after it sees zeros in its place.
            first, rest = x[:, :, :1], x[:, :, 1:]
            x = torch.cat([first, self._interleave(rest)], dim=2) if rest.shape[2] else first
        return _each_frame(self.resample, x)

    def _interleave(self, x: Tensor) -> Tensor:
        pairs = self.time_conv(x).unflatten(1, (2, x.shape[1]))  # [B, 2, C, T, H, W]
        return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)

    def flow(self, frames: Frames, rows: Rows | None = None) -> Frames:
        enlarge = self._enlarge()
        frames = self._double_time(frames) if self.in_time else frames
        return map(enlarge, frames) if rows is None else (_inner(enlarge(rows.widen(frame)), 2) for frame in frames)

    def _double_time(self, frames: Frames) -> Frames:
        yield from islice(frames, 1)
        yield from chain.from_iterable(map(_halves, map(self.time_conv.step(), frames)))

    def _enlarge(self) -> Callable[[Tensor], Tensor]:
        """A function that enlarges a frame twice and convolves it, without ever holding the enlarged one.

        Of the 3×3 enlarged pixels that an output sees, several are the same source pixel, so a 2×2 convolution with
        their weights summed gives it. Between the source pixels (p−1, p) × (q−1, q) lie four outputs: one convolution
        with 4 times the channels makes them all, at 4/9 of the cost. They are put in their places as the bias is added.
        """
        conv = self.resample[1]
        sums = torch.tensor(_ENLARGED, device=conv.weight.device, dtype=torch.float32)
        weight = torch.einsum("aip,bjq,ocpq->aboicj", sums, sums, conv.weight.float())
        weight = weight.flatten(0, 2).permute(0, 2, 1, 3).to(conv.weight.dtype)  # [4·O, C, 2, 2]
        weight = weight.contiguous(memory_format=torch.channels_last)

        def enlarge(x: Tensor) -> Tensor:
            batch, height, width, _ = x.shape
            four = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
            four = four.unflatten(-1, (2, 2, conv.out_channels))
            out = x.new_empty(batch, 2 * height, 2 * width, conv.out_channels)
            for down in (0, 1):
                for right in (0, 1):
                    part = four[:, 1 - down : height + 1 - down, 1 - right : width + 1 - right, down, right]
                    place = out[:, 1 - down :: 2, 1 - right :: 2]
                    torch.add(part, conv.bias, out=place) if not part.requires_grad else place.copy_(part + conv.bias)
            return out

        return enlarge


def apply(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """A whole video through the layers in turn."""
    for layer in layers:
        x = layer(x)
    return x


def flow(layers: Iterable[nn.Module], frames: Frames, rows: Rows | None = None) -> Frames:
    """Frames, or of each those `rows` of this process, through the layers in turn, as they are asked for."""
    for layer in layers:
        frames = layer.flow(frames, rows)
    return frames


def pointwise(conv: nn.Conv2d | nn.Conv3d, frame: Tensor) -> Tensor:
    """A convolution with a kernel of one pixel, of a frame [B, H, W, C]."""
    return F.linear(frame, conv.weight.flatten(1), conv.bias)


def _inner(frame: Tensor, edge: int) -> Tensor:
    """A frame [B, H, W, C] without so many rows at its top and at its bottom."""
    return frame[:, edge:-edge].contiguous()


def _halves(frame: Tensor) -> Iterator[Tensor]:
    return iter(frame.chunk(2, dim=-1))


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of x [B, C, T, H, W]."""
    frames = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
