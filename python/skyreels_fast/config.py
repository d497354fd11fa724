"""What the published models are: their configuration, sizes, prompts and constants.

A leaf: nothing here imports torch or another module of the package.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

# Pixel frames and latents of the causal VAE: 4 frames and 8x8 pixels a latent.
VAE_STRIDE = (4, 8, 8)
LATENT_CHANNELS = 16
# The DiT patches 2x2 latents, so frames come in multiples of 16 pixels.
PIXEL_MULTIPLE = 16

DTYPES = ("bfloat16", "float16", "float32")  # that a model can be had in

# Diffusion forcing, text to video, image to video.
MODES = ("df", "t2v", "i2v")

RESOLUTIONS = {"540P": (544, 960), "720P": (720, 1280)}  # height, width

LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

NEGATIVE_PROMPT_DF = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, "
    "messy background, three legs, many people in the background, walking backwards"
)

# TeaCache's published polynomials (relative L1 change of the time embedding → of the output), highest power first,
# by model, whether `use_ret_steps` is on, and the model's size (T2V, DF) or resolution (I2V).
TEACACHE_COEFFICIENTS = {
    ("i2v", True, "540P"): (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    ("i2v", True, "720P"): (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
    ("i2v", False, "540P"): (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    ("i2v", False, "720P"): (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    ("t2v", True, "1.3B"): (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    ("t2v", True, "14B"): (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    ("t2v", False, "1.3B"): (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    ("t2v", False, "14B"): (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
}
MODEL_SIZES = {1536: "1.3B", 5120: "14B"}  # by dim


_SIZES = ("in_dim", "dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "out_dim", "text_len")


@dataclass(frozen=True)
class TransformerConfig:
    """A checkpoint's `config.json`: the shape of its DiT."""

    model_type: str  # "t2v" (also diffusion forcing) or "i2v"
    in_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    out_dim: int = 16
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    window_size: tuple[int, int] = (-1, -1)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    inject_sample_info: bool = False  # the model takes the frame rate (16, or anything else)

    def __post_init__(self) -> None:
        if self.model_type not in ("t2v", "i2v"):
            raise ValueError(f"config.json: model_type {self.model_type!r} is not one of 't2v', 'i2v'")
        for name in _SIZES:
            require_size(name, getattr(self, name))
        if self.freq_dim % 2:
            raise ValueError(f"config.json: freq_dim {self.freq_dim} is not even")
        is_number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if not is_number or not 0 < self.eps < math.inf:
            raise ValueError(f"config.json: eps {self.eps!r:.80} is not a number above 0")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"config.json: dim {self.dim} does not split into {self.num_heads} heads of even size")
        if self.patch_size != (1, 2, 2):
            raise ValueError(f"config.json: patch_size {self.patch_size} is not supported, only (1, 2, 2)")
        if self.window_size != (-1, -1):
            raise ValueError(f"config.json: window_size {self.window_size} is not supported, only (-1, -1)")
        if not self.qk_norm or not self.cross_attn_norm:
            raise ValueError("config.json: models without qk_norm or cross_attn_norm are not supported")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_dict(cls, values: dict) -> TransformerConfig:
        """Read the published keys; those of other tools (leading underscore) are passed over.

        Raises ValueError naming a missing key or a value that no SkyReels-V2 model has.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        kept = {name: values[name] for name in known if name in values}
        for name in ("patch_size", "window_size"):
            if isinstance(kept.get(name), list):
                kept[name] = tuple(kept[name])
        return cls(**kept)

    def teacache_coefficients(self, use_ret_steps: bool, height: int, width: int) -> tuple[float, ...] | None:
        """The published polynomial for this model and frame size, or None where none was published."""
        key = MODEL_SIZES.get(self.dim)
        if key and self.model_type == "i2v":
            key = min(RESOLUTIONS, key=lambda name: abs(math.prod(RESOLUTIONS[name]) - height * width))
        return TEACACHE_COEFFICIENTS.get((self.model_type, use_ret_steps, key))


def require_size(name: str, value: object) -> None:
    """Raises ValueError where a size in config.json is not a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name} {value!r:.80} is not a whole number from 1")
