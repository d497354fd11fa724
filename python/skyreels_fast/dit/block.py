"""One transformer block: self-attention, attention to the context, feed-forward; modulated frame by frame."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from skyreels_fast.config import TransformerConfig
from skyreels_fast.ops import (
    attention,
    norm_scale_shift,
    qk_norm,
    qk_norm_rope3d,
    scale_residual,
    scale_residual_norm_scale_shift,
)

# Called as ops.attention: attend(q, k, v, block_tokens=...).
Attend = Callable[..., Tensor]
Grid = tuple[int, int, int]
# One pair for the text and, in an I2V model, one for the image; each [B, n, N, Dh].
KeysValues = tuple[tuple[Tensor, Tensor], ...]


class HeadsNorm(nn.Module):
    """The weight [dim] of an RMSNorm over all heads together; the ops compute it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(dim, 3 * dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = HeadsNorm(dim)
        self.norm_k = HeadsNorm(dim)

    def forward(
        self, x: Tensor, grid: Grid, block_tokens: int | None, attend: Attend, token_range: tuple[int, int] | None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = qk_norm_rope3d(q, k, self.norm_q.weight, self.norm_k.weight, grid, eps=self.eps, token_range=token_range)
        return self.o(attend(q, k, v, block_tokens=block_tokens).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.eps = config.num_heads, config.eps
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = HeadsNorm(dim)
        self.norm_k = HeadsNorm(dim)
        if config.model_type == "i2v":
            self.kv_img = nn.Linear(dim, 2 * dim)
            self.norm_k_img = HeadsNorm(dim)

    def keys_values(self, text: Tensor, image: Tensor | None) -> KeysValues:
        """Keys and values of the context: text [B, n, D] and, for I2V, image [B, m, D]."""
        pairs = [self._pair(text, self.kv, self.norm_k)]
        if image is not None:
            pairs.append(self._pair(image, self.kv_img, self.norm_k_img))
        return tuple(pairs)

    def _pair(self, tokens: Tensor, layer: nn.Linear, norm: HeadsNorm) -> tuple[Tensor, Tensor]:
        k, v = layer(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)
        # The values are kept for many calls: a view would keep the keys' raw half with them.
        return qk_norm(k, norm.weight, eps=self.eps), v.contiguous()

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        q = qk_norm(self.q(x).unflatten(-1, (self.heads, -1)), self.norm_q.weight, eps=self.eps)
        out = attention(q, *keys_values[0])
        for k, v in keys_values[1:]:
            out = out + attention(q, k, v)
        return self.o(out.flatten(2))


class Block(nn.Module):
    """x [B, L, D] to x, with e0 [B, F', 6, D] float32: F' = 1, or a row for each latent frame.

    Between the sublayers the residual is float32; it is rounded to x's dtype once, at the end.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        e0: Tensor,
        keys_values: KeysValues,
        grid: Grid,
        *,
        block_tokens: int | None = None,
        attend: Attend = attention,
        token_range: tuple[int, int] | None = None,
    ) -> Tensor:
        """grid: the (f, h, w) of all tokens; block_tokens: the causal blocks that `attend` is asked for;
        token_range: which of the h * w tokens of each frame x holds, when it is a shard."""
        rows = (self.modulation.float() + e0).unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        dtypes = {"residual_dtype": torch.promote_types(x.dtype, torch.float32), "out_dtype": x.dtype}
        y = norm_scale_shift(x, scale1, shift1, eps=self.eps)
        y = self.self_attn(y, grid, block_tokens, attend, token_range)
        affine = (self.norm3.weight, self.norm3.bias)
        total, y = scale_residual_norm_scale_shift(x, y, gate1, None, None, *affine, eps=self.eps, **dtypes)
        y = self.cross_attn(y, keys_values)
        total, y = scale_residual_norm_scale_shift(total, y, None, scale2, shift2, eps=self.eps, **dtypes)
        return scale_residual(total, self.ffn(y), gate2, out_dtype=x.dtype)
