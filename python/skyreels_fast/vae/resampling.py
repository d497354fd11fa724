"""The layers that change a video's size: halved in the encoder, doubled in the decoder. Forms as in `layers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import causal_conv3d
from ..ops.norm_silu import norm_silu_cost
from .layers import CausalConv3d, Frames, Shape, as_flops, convolution_cost

# Of a frame enlarged twice: which rows of a 3-high kernel fall on source row p − 1, and which on row p, where its
# centre is the second enlarged row of p − 1, and where it is the first of p. Columns likewise.
_ENLARGED = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))


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

    def flow(self, frames: Frames) -> Frames:
        smaller = map(self._frame, frames)
        return self._halve_time(smaller) if self.in_time else smaller

    def out_shape(self, shape: Shape) -> Shape:
        frames, batch, height, width, channels = shape
        return (frames + 1) // 2 if self.in_time else frames, batch, height // 2, width // 2, channels

    def cost(self, shape: Shape) -> int:
        out = self.out_shape(shape)
        smaller = convolution_cost((shape[0], *out[1:]), (*self.resample[1].weight.shape[:2], 1, 3, 3))
        return smaller + (convolution_cost(out, self.time_conv.weight.shape) if self.in_time else 0)

    def _frame(self, x: Tensor) -> Tensor:
        return self.resample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

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

    def flow(self, frames: Frames) -> Frames:
        return map(self._enlarge(), self._double_time(frames) if self.in_time else frames)

    def out_shape(self, shape: Shape) -> Shape:
        frames, batch, height, width, channels = shape
        return max(2 * frames - 1, 0) if self.in_time else frames, batch, 2 * height, 2 * width, channels // 2

    def cost(self, shape: Shape) -> int:
        out = self.out_shape(shape)
        enlarged = convolution_cost((out[0], *shape[1:]), (4 * out[-1], shape[-1], 1, 2, 2))
        put_in_place, _ = norm_silu_cost(out)  # as a norm, it reads and writes what comes out
        return enlarged + as_flops(put_in_place, 0) + (self.time_conv.cost(shape) if self.in_time else 0)

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


def _halves(frame: Tensor) -> Iterator[Tensor]:
    return iter(frame.chunk(2, dim=-1))


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of x [B, C, T, H, W]."""
    frames = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
