"""The causal 3D VAE of Wan 2.1: pixels [B, 3, T, H, W] ↔ latents [B, 16, F, H/8, W/8], T = 4(F−1)+1.

Every convolution looks only back in time, so a video goes through in chunks (1, 4, 4, … frames in, one latent frame
at a time out) and gives the same numbers as in one piece: a `Stream` holds the few last frames that each layer needs
of the chunk before. Without a stream the layers see the whole video at once, which is how training runs them.
Parameters are named as in `Wan2.1_VAE.pth`. Architecture: Wan 2.1, arXiv:2503.20314, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LATENT_CHANNELS, LATENTS_MEAN, LATENTS_STD, VAE_STRIDE

WIDTHS = (1, 2, 4, 4)  # channels of each level, in base dims
TIME_SCALED = (False, True, True)  # which of the three downsamplings also halve time


class Stream:
    """What the causal layers keep of a video's earlier chunks; one per video and direction."""

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}

    def started(self, layer: nn.Module) -> bool:
        return layer in self._tails

    def tail(self, layer: nn.Module) -> Tensor | None:
        return self._tails.get(layer)

    def keep(self, layer: nn.Module, x: Tensor, frames: int) -> None:
        """Remember the last `frames` of x [B, C, T, H, W]; copied, so that the chunk itself can go."""
        self._tails[layer] = x[:, :, x.shape[2] - frames :].clone()


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that pads time on the past's side alone."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.past = kernel[0] - 1

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if not self.past:
            return super().forward(x)
        tail = stream.tail(self) if stream else None
        missing = self.past - (0 if tail is None else tail.shape[2])
        if tail is not None:
            x = torch.cat([tail, x], dim=2)
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        if stream:
            stream.keep(self, x, self.past)
        return super().forward(x)


class ChannelNorm(nn.Module):
    """x / ‖x‖ · √C · gamma over the channels (dim 1)."""

    def __init__(self, dim: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.gamma.shape[0] ** 0.5 * self.gamma


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

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return _run(self.residual, x, stream) + self.shortcut(x)


class SpatialAttention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # [B·T, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]  # [B·T, 1, H·W, 3C]
        out = F.scaled_dot_product_attention(*(part.contiguous() for part in qkv.chunk(3, dim=-1)))
        out = self.proj(out[:, 0].transpose(1, 2).reshape(frames.shape))
        return x + out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width; with `in_time` also time, of which the first frame stays as it is."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if in_time:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.in_time = in_time

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = _each_frame(self.resample, x)
        if not self.in_time:
            return x
        tail = stream.tail(self) if stream else None
        if stream:
            stream.keep(self, x, 1)
        if tail is not None:
            return self.time_conv(torch.cat([tail, x], dim=2))
        first = x[:, :, :1]
        return first if x.shape[2] == 1 else torch.cat([first, self.time_conv(x)], dim=2)


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

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if self.in_time:
            x = self._double_time(x, stream)
        return _each_frame(self.resample, x)

    def _double_time(self, x: Tensor, stream: Stream | None) -> Tensor:
        if stream and stream.started(self):
            return self._interleave(x, stream)
        if stream:
            stream.keep(self, x, 0)
        # The first frame is one pixel frame, and the time convolution after it sees zeros in its place.
        first, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat([first, self._interleave(rest, stream)], dim=2) if rest.shape[2] else first

    def _interleave(self, x: Tensor, stream: Stream | None) -> Tensor:
        pairs = self.time_conv(x, stream).unflatten(1, (2, x.shape[1]))  # [B, 2, C, T, H, W]
        return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


class Encoder(nn.Module):
    def __init__(self, base_dim: int, out_dim: int) -> None:
        super().__init__()
        dims = [base_dim * width for width in (1, *WIDTHS)]
        self.conv1 = CausalConv3d(3, dims[0], 3)
        levels: list[nn.Module] = []
        for level, (in_dim, dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            levels += [ResidualBlock(in_dim, dim), ResidualBlock(dim, dim)]
            if level < len(TIME_SCALED):
                levels.append(Downsample(dim, TIME_SCALED[level]))
        self.downsamples = nn.ModuleList(levels)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], out_dim)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return _run([self.conv1, *self.downsamples, *self.middle, *self.head], x, stream)


class Decoder(nn.Module):
    def __init__(self, base_dim: int, in_dim: int) -> None:
        super().__init__()
        dims = [base_dim * width for width in (WIDTHS[-1], *reversed(WIDTHS))]
        self.conv1 = CausalConv3d(in_dim, dims[0], 3)
        self.middle = _middle(dims[0])
        levels: list[nn.Module] = []
        width = dims[0]
        for level, dim in enumerate(dims[1:]):
            levels += [ResidualBlock(width, dim), ResidualBlock(dim, dim), ResidualBlock(dim, dim)]
            width = dim
            if level < len(TIME_SCALED):
                levels.append(Upsample(dim, TIME_SCALED[-1 - level]))
                width = dim // 2
        self.upsamples = nn.ModuleList(levels)
        self.head = _head(dims[-1], 3)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return _run([self.conv1, *self.middle, *self.upsamples, *self.head], x, stream)


class VAE(nn.Module):
    """Encoder, decoder and the latents' statistics.

    Args:
        base_dim: channels of the widest level's base (96 published); `base_dim_of(weights)` reads it off a checkpoint.
        latents_mean, latents_std: 16 values each; latents leave as (mean of the posterior − latents_mean)/latents_std.
    """

    def __init__(
        self,
        base_dim: int = 96,
        latents_mean: Sequence[float] = LATENTS_MEAN,
        latents_std: Sequence[float] = LATENTS_STD,
    ) -> None:
        super().__init__()
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        self.encoder = Encoder(base_dim, 2 * LATENT_CHANNELS)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(base_dim, LATENT_CHANNELS)

    @staticmethod
    def base_dim_of(weights: dict[str, Tensor]) -> int:
        """The base_dim of a checkpoint's tensors. Raises ValueError where they are not a Wan VAE's."""
        name = "encoder.conv1.weight"
        if name not in weights:
            raise ValueError(f"the VAE's file is not a Wan VAE: {name} is missing")
        shape = tuple(weights[name].shape)
        if len(shape) != 5 or 0 in shape:
            raise ValueError(f"the VAE's file is not a Wan VAE: {name} has shape {shape}, not (base_dim, 3, 3, 3, 3)")
        return shape[0]

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, not normalised, of a whole video [B, 3, 4n+1, H, W] in [−1, 1]."""
        return self.conv1(self.encoder(video)).chunk(2, dim=1)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Latents as `encode_moments` gives them [B, 16, F, h, w] → video [B, 3, 4F−3, 8h, 8w], not clamped."""
        return self.decoder(self.conv2(latents))

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] in [−1, 1] → normalised latents [B, 16, (T−1)//4+1, H/8, W/8], float32.

        Frames past the last full group of four are left out. Raises ValueError for a size not divisible by 8.
        """
        return self.encode_stream([video])

    def encode_stream(self, chunks: Iterable[Tensor]) -> Tensor:
        """As `encode`, of a video that comes in pieces [B, 3, t, H, W] of any length t."""
        stream, out = Stream(), []
        mean, std = self._statistics()
        for chunk in _regroup(chunks):
            if chunk.shape[-2] % VAE_STRIDE[1] or chunk.shape[-1] % VAE_STRIDE[2]:
                raise ValueError(f"the VAE takes heights and widths divisible by 8, got {tuple(chunk.shape[-2:])}")
            moments = self.conv1(self.encoder(chunk.to(mean.device, self._dtype), stream))
            out.append((moments.chunk(2, dim=1)[0].float() - mean) / std)
        return torch.cat(out, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 16, F, h, w] → video [B, 3, 4F−3, 8h, 8w] in [−1, 1], float32."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """As `decode`, latent frame by latent frame: first 1, then 4 frames [B, 3, 1 or 4, 8h, 8w] at a time."""
        stream = Stream()
        mean, std = self._statistics()
        for latent in latents.split(1, dim=2):
            z = latent.to(mean.device).float() * std + mean
            yield self.decoder(self.conv2(z.to(self._dtype)), stream).float().clamp(-1, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def _statistics(self) -> tuple[Tensor, Tensor]:
        values = torch.tensor([self.latents_mean, self.latents_std], device=self.conv2.weight.device)
        mean, std = values.view(2, 1, -1, 1, 1, 1)
        return mean, std


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), SpatialAttention(dim), ResidualBlock(dim, dim)])


def _head(in_dim: int, out_dim: int) -> nn.ModuleList:
    return nn.ModuleList([ChannelNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3)])


STATEFUL = (CausalConv3d, ResidualBlock, SpatialAttention, Downsample, Upsample)


def _run(layers: Iterable[nn.Module], x: Tensor, stream: Stream | None) -> Tensor:
    for layer in layers:
        x = layer(x, stream) if isinstance(layer, STATEFUL) else layer(x)
    return x


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of x [B, C, T, H, W]."""
    frames = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _regroup(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Chunks of any length → 1 frame, then groups of 4."""
    wanted, held = 1, None
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk.to(held.device)], dim=2)
        while held.shape[2] >= wanted:
            yield held[:, :, :wanted]
            held, wanted = held[:, :, wanted:], VAE_STRIDE[0]
