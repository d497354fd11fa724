"""What a benchmark renders, and models of the published sizes to render it with.

Weights are random and made where they are asked for, on the GPU, without any file.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import skyreels_fast
from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.config import PIXEL_MULTIPLE, TransformerConfig
from skyreels_fast.dit.model import DiT
from skyreels_fast.sampling.windows import latent_frames
from skyreels_fast.vae import VAE

MODES = ("sync", "async", "causal", "t2v", "i2v")
_SIZES = {
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "tiny": {"dim": 256, "ffn_dim": 1024, "num_heads": 4, "num_layers": 8, "text_dim": 128, "text_len": 32},  # bundled
    "toy": {"dim": 128, "ffn_dim": 384, "num_heads": 2, "num_layers": 2, "text_dim": 64, "freq_dim": 64},
}
_TAKES_FPS = ("1.3B", "toy")  # those for diffusion forcing
MODELS = tuple(_SIZES)
GRID = (25, 34, 60)  # of tokens, at 540P and 97 frames
_VAE_BASE_DIM = {"tiny": 16, "toy": 8}  # 96 in the published models
_TEXT = {"vocab": 256384, "dim": 4096, "ffn": 10240, "buckets": 32, "heads": 64, "layers": 24}  # UMT5-XXL
_TEXT_SMALL = {"vocab": 512, "ffn": 128, "buckets": 32, "heads": 4, "layers": 2}
_TOKENIZER = Path(skyreels_fast.__file__).parent / "assets" / "tiny" / "google" / "umt5-xxl"


def pipeline_mode(mode: str) -> str:
    """The pipeline's name of a benchmark's mode: "df", "t2v" or "i2v"."""
    return mode if mode in ("t2v", "i2v") else "df"


def config(model: str, mode: str) -> TransformerConfig:
    """A model's shape: for diffusion forcing, T2V or I2V, as `mode` has it."""
    kind = pipeline_mode(mode)
    return TransformerConfig(
        model_type="i2v" if kind == "i2v" else "t2v",
        in_dim=36 if kind == "i2v" else 16,
        inject_sample_info=kind == "df" and model in _TAKES_FPS,
        **_SIZES[model],
    )


@dataclass(frozen=True)
class Work:
    """One video to render, the same for us and for the peers.

    mode: "sync" (diffusion forcing, all frames in step), "async" (block after block, `ar_step` rows apart), "causal"
    (block-causal attention; in step unless `ar_step`), "t2v" or "i2v". steps: of the solver, for each frame. block:
    latent frames of a block, None without any. teacache: its threshold. base_frames, overlap: of a long video.
    """

    model: str
    mode: str
    resolution: str
    height: int
    width: int
    frames: int
    steps: int
    ar_step: int
    block: int | None
    dtype: torch.dtype
    guidance: float = 6.0
    fps: int = 24
    teacache: float | None = None
    use_ret_steps: bool = False
    base_frames: int | None = None
    overlap: int | None = None

    @property
    def kind(self) -> str:
        return pipeline_mode(self.mode)

    @property
    def causal(self) -> bool:
        return self.mode == "causal"

    @property
    def branches(self) -> int:
        """Forwards a row of the schedule takes."""
        guided = self.guidance > 1 if self.kind == "df" else self.guidance != 1
        return 1 + guided

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of one window, as (f, h, w)."""
        frames = min(self.frames, self.base_frames or self.frames)
        return latent_frames(frames), self.height // PIXEL_MULTIPLE, self.width // PIXEL_MULTIPLE

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def config(self) -> TransformerConfig:
        return config(self.model, self.mode)

    @property
    def uniform(self) -> bool:
        """Whether every row of the schedule does the same work."""
        return self.teacache is None and not (self.causal and self.ar_step) and not self.overlap

    def keys(self) -> dict[str, Any]:
        """What a row says of the work."""
        return {
            "model": self.model,
            "resolution": self.resolution,
            "frames": self.frames,
            "mode": self.mode,
            "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype],
            "steps": self.steps,
            "guidance": self.guidance,
            "ar_step": self.ar_step,
            "causal_block_size": self.block,
            "teacache": self.teacache,
            "use_ret_steps": None if self.teacache is None else self.use_ret_steps,
            "base_frames": self.base_frames,
            "overlap": self.overlap,
            "tokens": self.tokens,
            "uniform": self.uniform,
        }


@torch.inference_mode(False)
def random_tensor(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of the size that a trained model's have, so that nothing overflows; never zeros. `name` is the seed.

    Norms' weights lie about 1, biases are small, matrices keep the variance of what they multiply.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
        value.mul_(0.02).add_(1)
    elif len(shape) == 1:
        value.mul_(0.02)
    else:
        value.mul_(math.prod(shape[1:]) ** -0.5)
    return value.to(dtype)


@dataclass(frozen=True)
class RandomWeights(Mapping[str, Tensor]):
    """Tensors by name, each made when it is read."""

    shapes: dict[str, tuple[int, ...]]
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        return random_tensor(name, self.shapes[name], self.device, self.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # making the tensor to find out would do too, and take longer

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint that no directory holds; its text encoder, when there is one, lies in host memory like a file's."""

    size: str = "toy"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.bfloat16
    with_text: bool = False

    @classmethod
    def of(cls, model: str, mode: str, device: torch.device, dtype: torch.dtype, *, text: bool) -> RandomCheckpoint:
        root = Path("random") / model
        return cls(root, f"random {model}", config(model, mode), {}, model, device, dtype, text)

    def transformer_weights(self) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            dit = DiT(self.config)
        parameters, shapes = dict(dit.named_parameters()), {}
        for name, parts in dit.key_parts().items():
            rows, *rest = parameters[name].shape
            shapes |= dict.fromkeys(parts, (rows // len(parts), *rest))
        return RandomWeights(shapes, self.device, self.dtype)

    def vae_weights(self) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            vae = VAE(_VAE_BASE_DIM.get(self.size, 96))
        shapes = {name: tuple(parameter.shape) for name, parameter in vae.named_parameters()}
        return RandomWeights(shapes, self.device, torch.float32)

    def _part(self, part: str) -> tuple[dict[str, Tensor], dict]:
        self.require(part)  # no other than the text encoder is ever there
        return self._text, {}

    @cached_property
    def _text(self) -> dict[str, Tensor]:
        dim = self.config.text_dim
        size = _TEXT if dim == _TEXT["dim"] else _TEXT_SMALL | {"dim": dim}
        weights = RandomWeights(_text_shapes(size), self.device, self.dtype)
        return {name: weights[name].cpu() for name in weights}

    def tokenizer_path(self) -> Path:
        """The bundled model's: its few ids are all within the vocabulary."""
        return _TOKENIZER

    def _lacking(self, part: str) -> list[str]:
        there = part == "vae" or (part == "text_encoder" and self.with_text)
        return [] if there else [f"a random {part}"]


def _text_shapes(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    dim, ffn = size["dim"], size["ffn"]
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (size["vocab"], dim), "norm.weight": (dim,)}
    for layer in range(size["layers"]):
        block = {f"attn.{name}.weight": (dim, dim) for name in "qkvo"}
        block |= {"norm1.weight": (dim,), "norm2.weight": (dim,), "ffn.fc2.weight": (dim, ffn)}
        block |= {"ffn.gate.0.weight": (ffn, dim), "ffn.fc1.weight": (ffn, dim)}
        block["pos_embedding.embedding.weight"] = (size["buckets"], size["heads"])
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes
