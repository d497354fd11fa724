"""Encoder, decoder and `VAE`. Parameters are named as in `Wan2.1_VAE.pth`.

Every convolution looks only back in time, so a video goes through frame by frame and gives the same numbers as in one
piece. Architecture: Wan 2.1, arXiv:2503.20314, section 4.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, LATENTS_MEAN, LATENTS_STD, VAE_STRIDE
from . import tiles
from .chain import Chain, stages_of
from .layers import (
    CausalConv3d,
    Frames,
    Head,
    ResidualBlock,
    Shape,
    SpatialAttention,
    apply,
    flow,
    pointwise,
)
from .resampling import Downsample, Upsample

WIDTHS = (1, 2, 4, 4)  # channels of each level, in base dims
TIME_SCALED = (False, True, True)  # which of the three downsamplings also halve time


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
        self.head = Head(dims[-1], out_dim)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.conv1, *self.downsamples, *self.middle, self.head]

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.stages, x)


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
        self.head = Head(dims[-1], 3)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.conv1, *self.middle, *self.upsamples, self.head]

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.stages, x)


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

    def lay_out(self) -> VAE:
        """Put the convolutions' weights in memory as `encode` and `decode` read them, channels last. Returns itself."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim in formats and parameter.shape[0] != parameter.numel():
                    parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
        return self

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

    def encode_stream(self, chunks: Iterable[Tensor], shared: Chain | None = None) -> Tensor:
        """As `encode`, of a video that comes in pieces [B, 3, t, H, W] of any length t.

        shared: several processes encode together, all of them called with the same video, of which each holds all
            pieces; all get the latents.
        """
        if shared is None:
            moments = flow(self.encoder.stages, self._frames_of(chunks))
        else:
            chunks = list(chunks)
            stages = stages_of(self.encoder.stages, _shape_of(chunks))
            moments = shared.flow(stages, self._frames_of(chunks), self._dtype)
        moments = _repeatable(moments)
        means = [pointwise(self.conv1, frame.to(self._dtype))[..., :LATENT_CHANNELS].float() for frame in moments]
        return self._normalised(means) if shared is None else shared.first(lambda: self._normalised(means))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 16, F, h, w] → video [B, 3, 4F−3, 8h, 8w] in [−1, 1], float32."""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(
        self, latents: Tensor, budget_bytes: int | None = None, shared: Chain | None = None
    ) -> Iterator[Tensor]:
        """As `decode`, latent frame by latent frame: first 1, then 4 frames [B, 3, 1 or 4, 8h, 8w] at a time.

        Args:
            budget_bytes: memory that the decoder may take beside its weights (see `tiles.decode_bytes`). Where the
                frames do not fit they are decoded in overlapping tiles, one after the other, and blended: nothing comes
                before the last tile, and the video is held on the host. None: always whole.
            shared: several processes decode together, all of them called with the same latents and budget; the frames
                come out in the leader, and the others' iterators end without any once their part is done. Tiles are
                the leader's alone.

        Raises:
            ValueError: not even the smallest tile fits into the budget.
        """
        if budget_bytes is None or tiles.decode_bytes(self, latents.shape) <= budget_bytes:
            return self._decode_whole(latents, shared)
        if shared is not None and not shared.leads:
            return iter(())
        return tiles.decode(self, self._decode_whole, latents, budget_bytes)

    def _decode_whole(self, latents: Tensor, shared: Chain | None = None) -> Iterator[Tensor]:
        mean, std = self._statistics()

        def enter(latent: Tensor) -> Tensor:
            z = latent.to(mean.device).float() * std[:, :, 0] + mean[:, :, 0]
            return pointwise(self.conv2, z.permute(0, 2, 3, 1).to(self._dtype).contiguous())

        frames = map(enter, latents.unbind(2))
        if shared is None:
            frames = flow(self.decoder.stages, frames)
        else:
            shape = tuple(latents.permute(2, 0, 3, 4, 1).shape)
            frames = shared.flow(stages_of(self.decoder.stages, shape), frames, self._dtype)
        frames = _repeatable(frame.permute(0, 3, 1, 2).float().clamp(-1, 1) for frame in frames)
        count = 1
        # Nothing is held by a name while the next frames are made.
        while (chunk := _stacked(islice(frames, count))) is not None:
            yield chunk
            del chunk
            count = VAE_STRIDE[0]

    def _normalised(self, means: list[Tensor]) -> Tensor:
        """Means of the posterior, frames [B, h, w, 16], as latents [B, 16, F, h, w]."""
        mean, std = self._statistics()
        return (torch.stack(means, dim=1).permute(0, 4, 1, 2, 3).contiguous() - mean) / std

    def _frames_of(self, chunks: Iterable[Tensor]) -> Frames:
        """A video in pieces [B, 3, t, H, W] as frames [B, H, W, 3] in the VAE's dtype, on its device."""
        device = self.conv2.weight.device
        for chunk in chunks:
            _check_size(chunk)
            # A copy has the strides of its shape in each dimension, those of one element too, by which convolutions
            # choose their algorithm: frames that are alike have the same bits, wherever they come from.
            channels_last = (frame.to(device, self._dtype).permute(0, 2, 3, 1) for frame in chunk.unbind(2))
            yield from (frame.clone(memory_format=torch.contiguous_format) for frame in channels_last)

    @property
    def _dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def _statistics(self) -> tuple[Tensor, Tensor]:
        values = torch.tensor([self.latents_mean, self.latents_std], device=self.conv2.weight.device)
        mean, std = values.view(2, 1, -1, 1, 1, 1)
        return mean, std


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), SpatialAttention(dim), ResidualBlock(dim, dim)])


def _shape_of(chunks: Sequence[Tensor]) -> Shape:
    """[T, B, H, W, 3] of a video in pieces [B, 3, t, H, W]. Raises ValueError as `_check_size` does."""
    for chunk in chunks:
        _check_size(chunk)
    batch, channels, _, height, width = chunks[0].shape
    return sum(chunk.shape[2] for chunk in chunks), batch, height, width, channels


def _check_size(chunk: Tensor) -> None:
    """Raises ValueError for a height or width of [..., H, W] that is not divisible by 8."""
    if chunk.shape[-2] % VAE_STRIDE[1] or chunk.shape[-1] % VAE_STRIDE[2]:
        raise ValueError(f"the VAE takes heights and widths divisible by 8, got {tuple(chunk.shape[-2:])}")


def _stacked(frames: Frames) -> Tensor | None:
    """Frames [B, 3, H, W] as a chunk [B, 3, t, H, W]; None where there are none."""
    chunk = list(frames)
    return torch.stack(chunk, dim=2) if chunk else None


@contextlib.contextmanager
def _cudnn_by_rule() -> Iterator[None]:
    """cuDNN chooses by rule and not by trial; all else that it was told, of TF32 for one, holds on. (`cudnn.flags` sets
    that too, or fails where it was set by newer names.)"""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _repeatable(frames: Frames) -> Frames:
    """The frames, in the same bits each time: a run that is gone on with must have them."""
    done = object()
    while True:
        with _cudnn_by_rule():
            frame = next(frames, done)
        if frame is done:
            return
        yield frame
        del frame
