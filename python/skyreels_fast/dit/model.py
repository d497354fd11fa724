"""The video DiT: embed, run the blocks, head. It keeps no state from one call to the next.

Parameters carry the published names, save that the projections of one input are one: self_attn.qkv, cross_attn.kv,
cross_attn.kv_img. `DiT.key_parts` says which published tensors make which of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit.block import Attend, Block, Grid, Places
from skyreels_fast.dit.context import Context, counted_padding, log_counts_of
from skyreels_fast.dit.embeddings import (
    ImageEmbedding,
    linear_fp32,
    mlp_fp32,
    patches,
    project_fp32,
    sinusoid,
    unpatch,
)
from skyreels_fast.dit.past import Past
from skyreels_fast.dit.stream import Stream
from skyreels_fast.ops import attention, norm_scale_shift
from skyreels_fast.ops.attention_weights import MAX_CHANNELS

IMAGE_DIM = 1280  # CLIP ViT-H/14 tokens

FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "kv_img": ("k_img", "v_img")}
_FUSED_KEY = re.compile(r"(.*_attn\.)(qkv|kv|kv_img)(\.\w+)")


class Embedded(NamedTuple):
    """What `DiT.embed` returns: the tokens, their modulation (F' = 1 or a row a latent frame) and their grid."""

    x: Tensor  # [B, L, D] in the weights' dtype
    e: Tensor  # [B, F', D] float32
    e0: Tensor  # [B, F', 6, D] float32
    grid: Grid  # (f, h, w) with L = f * h * w


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.out_dim * 4)

    def forward(self, x: Tensor, e: Tensor, grid: Grid) -> Tensor:
        """Tokens x [B, L, D] with e [B, F', D] to latents [B, out_dim, F, H, W], all in float32."""
        shift, scale = (self.modulation.float() + e.unsqueeze(2)).unbind(2)
        y = norm_scale_shift(x, scale, shift, eps=self.eps, out_dtype=torch.float32)
        return unpatch(linear_fp32(self.head, y), grid)


class DiT(nn.Module):
    """The transformer of a SkyReels-V2 checkpoint; build it under `torch.device("meta")` to load weights into it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.inject_sample_info:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.model_type == "i2v":
            self.img_emb = ImageEmbedding(IMAGE_DIM, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def key_parts(self) -> dict[str, tuple[str, ...]]:
        """Every parameter's name with the published tensors that are it, concatenated on dimension 0."""
        parts: dict[str, tuple[str, ...]] = {}
        for name, _ in self.named_parameters():
            fused = _FUSED_KEY.fullmatch(name)
            parts[name] = tuple(f"{fused[1]}{part}{fused[3]}" for part in FUSED[fused[2]]) if fused else (name,)
        return parts

    def encode_context(self, text: Tensor, image: Tensor | None = None) -> Context:
        """The Context of text embeddings [B, n <= text_len, text_dim] and, for I2V, CLIP tokens [B, 257, 1280].

        All of text_len tokens are attended to, zeros behind the text: some that count for all of these.
        Raises ValueError for shapes that do not fit, and for an image too many or too few.
        """
        config = self.config
        if text.dim() != 3 or text.shape[2] != config.text_dim:
            raise ValueError(f"text embeddings must be [B, n, {config.text_dim}], not {list(text.shape)}")
        if text.shape[1] > config.text_len:
            raise ValueError(f"{text.shape[1]} text tokens are too many, the model takes {config.text_len}")
        if (image is None) == (config.model_type == "i2v"):
            needs = "needs CLIP image tokens" if image is None else "takes no image tokens"
            raise ValueError(f"a {config.model_type} model {needs}")
        if image is not None and (image.dim() != 3 or image.shape[::2] != (text.shape[0], IMAGE_DIM)):
            raise ValueError(f"image tokens must be [{text.shape[0]}, n, {IMAGE_DIM}], not {list(image.shape)}")
        weight, length = self.text_embedding[0].weight, text.shape[1]
        padding = config.text_len - length
        # As many keys as a head has channels: their weights are then no larger than what they sum up.
        kept = counted_padding(length, padding, most=config.head_dim if config.head_dim <= MAX_CHANNELS else 0)
        tokens = self.text_embedding(functional.pad(text, (0, 0, 0, kept)).to(weight))
        logs = log_counts_of(length, kept, padding, weight.device)
        return Context(tokens, None if image is None else self.img_emb(image.to(weight)), logs)

    def time_embedding_of(self, timestep: Tensor, fps: int | None = None) -> tuple[Tensor, Tensor]:
        """e [B, F', D] and e0 [B, F', 6, D], float32, of timestep [B] (F' = 1) or [B, F] (F' = F).

        Models with inject_sample_info tell 16 fps from any other; the rest ignore `fps`. Raises ValueError where such
        a model gets none.
        """
        rows = timestep.to(self.time_embedding[0].weight.device).reshape(timestep.shape[0], -1)
        e = mlp_fp32(self.time_embedding, sinusoid(rows, self.config.freq_dim))
        e0 = project_fp32(self.time_projection[1], functional.silu(e), 6)
        if not self.config.inject_sample_info:
            return e, e0
        if fps is None:
            raise ValueError("this model is conditioned on the frame rate: give fps, got None")
        row = self.fps_embedding.weight[0 if fps == 16 else 1]
        hidden = functional.silu(linear_fp32(self.fps_projection[0], row))
        return e, e0 + project_fp32(self.fps_projection[2], hidden, 6)

    def embed(self, latents: Tensor, timestep: Tensor, fps: int | None = None) -> Embedded:
        """Tokens and modulation of latents [B, in_dim, F, H, W] at timestep [B], or [B, F] for one a latent frame.

        Raises ValueError for shapes that do not fit.
        """
        if latents.dim() != 5 or latents.shape[1] != self.config.in_dim:
            raise ValueError(f"latents must be [B, {self.config.in_dim}, F, H, W], not {list(latents.shape)}")
        batch, _, frames, height, width = latents.shape
        if height % 2 or width % 2:
            raise ValueError(f"latents of {height} x {width} do not split into 2 x 2 patches, both must be even")
        if timestep.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"timestep must be [{batch}] or [{batch}, {frames}], not {list(timestep.shape)}")
        e, e0 = self.time_embedding_of(timestep, fps)
        weight = self.patch_embedding.weight
        x = functional.linear(patches(latents.to(weight)), weight.flatten(1), self.patch_embedding.bias)
        return Embedded(x, e, e0, (frames, height // 2, width // 2))

    def run_blocks(
        self,
        x: Tensor,
        e0: Tensor,
        context: Context,
        grid: Grid,
        **options: Any,
    ) -> Tensor:
        """x [B, L, D] through all blocks, with one context; `options` as of `run_branches`."""
        return self.run_branches(Stream(x), e0, [context], grid, **options)[0]

    def run_branches(
        self,
        stream: Stream,
        e0: Tensor,
        contexts: Sequence[Context],
        grid: Grid,
        *,
        causal_block_size: int | None = None,
        blocks: Iterable[Block] | None = None,
        attend: Attend | None = None,
        attend_context: Attend | None = None,
        token_range: tuple[int, int] | None = None,
        pasts: Sequence[Past | None] | None = None,
    ) -> list[Tensor]:
        """The stream's tokens [B, L, D] through all blocks, once with each context: as many times [B, L, D].

        Every block takes all branches before the next block comes, so that weights which pass through the device do so
        once. Until the first attention to a context the branches are the same, and so much is computed once.

        stream: used up; what it holds goes as it goes.
        causal_block_size: None, or the latent frames of a block that sees itself and the earlier ones only.
        blocks: the model's blocks in order, where not `self.blocks`; each is used before the next is asked for.
        attend, attend_context: self-attention and that to the context, called as `ops.attention`; the first may have
        begin(q, k, block_tokens=…), to which q and k are given before v is computed, and which returns what takes v. A
        text whose padding is counted has `ops.attention_weights`.
        token_range: x holds these of the h * w tokens of each frame, a shard; `grid` and the blocks that `attend` is
        asked for are the whole's. pasts: of each branch, of the frames before those in x, or None where there are none.

        Raises ValueError for values that do not fit.
        """
        if causal_block_size is not None and causal_block_size < 1:
            raise ValueError(f"causal_block_size must be at least 1, not {causal_block_size}")
        pasts = pasts or [None] * len(contexts)
        for context in contexts:
            if context.text.shape[0] != stream.batch:
                raise ValueError(f"the context is for {context.text.shape[0]} videos, the latents are {stream.batch}")
        block_tokens = None if causal_block_size is None else causal_block_size * grid[1] * grid[2]
        if causal_block_size is None and any(past is not None for past in pasts):
            raise ValueError("keys and values are kept for causal attention alone: give causal_block_size")
        places = [Places(grid, block_tokens, token_range, past) for past in pasts]
        options = {"attend": attend or attention, "attend_context": attend_context or attention}
        streams = [stream]
        for index, block in enumerate(self.blocks if blocks is None else blocks):
            keys_values = [context.keys_values(index, block) for context in contexts]
            streams = block(streams, e0, keys_values, places, index, **options)
        return [stream.total() for stream in streams]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        fps: int | None = None,
        causal_block_size: int | None = None,
    ) -> Tensor:
        """Velocity [B, out_dim, F, H, W] float32 of latents [B, in_dim, F, H, W]; arguments as in `embed`."""
        x, e, e0, grid = self.embed(latents, timestep, fps)
        x = self.run_blocks(x, e0, context, grid, causal_block_size=causal_block_size)
        return self.head(x, e, grid)
