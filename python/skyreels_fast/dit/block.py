"""One transformer block: self-attention, attention to the context, feed-forward; modulated frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit.past import Past
from skyreels_fast.dit.stream import Stream
from skyreels_fast.ops import (
    attention,
    attention_weights,
    linear_gelu,
    qk_norm,
    qk_norm_rope3d,
    qk_norm_rope3d_,
    query_rows,
)

# Called as ops.attention: attend(q, k, v, block_tokens=...), and for a context none of whose keys is counted,
# attend(q, k, v). One that sends q and k elsewhere may have begin(q, k, block_tokens=...), which returns what takes v.
Attend = Callable[..., Tensor]
Grid = tuple[int, int, int]


class Pair(NamedTuple):
    """Keys and values [B, n, N, Dh] of a context, and the logarithm [n] of how often each counts; None: once."""

    k: Tensor
    v: Tensor
    log_counts: Tensor | None = None


# One pair for the text and, in an I2V model, one for the image.
KeysValues = tuple[Pair, ...]


class Places(NamedTuple):
    """Where in the video the tokens are that a call holds, and what they may attend to.

    grid: (f, h, w) of the tokens, all shards of them together. block_tokens: None, or the tokens of a causal block.
    token_range: which of the h * w tokens of each frame there are, in a shard. past: of earlier frames, if any.
    """

    grid: Grid
    block_tokens: int | None = None
    token_range: tuple[int, int] | None = None
    past: Past | None = None

    @property
    def frame_offset(self) -> int:
        return 0 if self.past is None else self.past.frames


# At a time: a product of so many rows is no slower than one of 51,000, and its outputs take a third of the memory.
FEED_FORWARD_TOKENS = 17_000


class HeadsNorm(nn.Module):
    """The weight [dim] of an RMSNorm over all heads together; the ops compute it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def _linear_with_room(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`functional.linear` into storage that goes on as far as attention likes it to."""
    if torch.is_grad_enabled() or not x.is_cuda or x.shape[0] != 1:
        return functional.linear(x, weight, bias)
    tokens = x.shape[1]
    rows = x.new_empty(query_rows(tokens), weight.shape[0])
    torch.addmm(bias, x[0], weight.t(), out=rows[:tokens])
    return rows[:tokens].unsqueeze(0)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _begun(attend: Attend, q: Tensor, k: Tensor, block_tokens: int | None) -> Callable[[Tensor], Tensor]:
    """The call of `attend` as far as it goes without v, which what is returned takes."""
    if hasattr(attend, "begin"):
        return attend.begin(q, k, block_tokens=block_tokens)
    return partial(attend, q, k, block_tokens=block_tokens)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.eps = config.num_heads, config.eps
        self.qkv = nn.Linear(dim, 3 * dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = HeadsNorm(dim)
        self.norm_k = HeadsNorm(dim)

    def forward(self, x: Tensor, places: Places, index: int, attend: Attend) -> Tensor:
        """x [B, L, D] of block `index` to [B, L, D]."""
        return self.o(self._attended(x, places, index, attend).flatten(2))

    def _attended(self, x: Tensor, places: Places, index: int, attend: Attend) -> Tensor:
        """[B, L, N, Dh]; queries, keys and values are gone before the output's projection takes its memory."""
        # Three products: attention is faster on values of their own, and q and k can be rotated where they lie.
        q_part, k_part, v_part = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        q = _by_head(_linear_with_room(x, *q_part), self.heads)
        k = _by_head(functional.linear(x, *k_part), self.heads)
        rotate = qk_norm_rope3d if torch.is_grad_enabled() else qk_norm_rope3d_
        q, k = rotate(
            q, k, self.norm_q.weight, self.norm_k.weight, places.grid,
            eps=self.eps, token_range=places.token_range, frame_offset=places.frame_offset,
        )  # fmt: skip
        if places.past is not None:
            k = places.past.keys(index, k, places.grid[0])
        end = _begun(attend, q, k, places.block_tokens)
        del q, k
        v = _by_head(functional.linear(x, *v_part), self.heads)
        if places.past is not None:
            v = places.past.values(index, v, places.grid[0])
        return end(v)


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

    def keys_values(self, text: Tensor, image: Tensor | None = None, log_counts: Tensor | None = None) -> KeysValues:
        """Keys and values of the context: text [B, n, D], with its log_counts, and for I2V image [B, m, D]."""
        pairs = [Pair(*self._project(text, self.kv, self.norm_k), log_counts)]
        if image is not None:
            pairs.append(Pair(*self._project(image, self.kv_img, self.norm_k_img)))
        return tuple(pairs)

    def _project(self, tokens: Tensor, layer: nn.Linear, norm: HeadsNorm) -> tuple[Tensor, Tensor]:
        k, v = layer(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)
        # The values are kept for many calls: a view would keep the keys' raw half with them.
        return qk_norm(k, norm.weight, eps=self.eps), v.contiguous()

    def forward(self, x: Tensor, keys_values: KeysValues, attend: Attend) -> Tensor:
        text, *image = keys_values
        if image or text.log_counts is None:
            return self.o(self._attended(x, keys_values, attend).flatten(2))
        weights = attention_weights(
            self._query(x), text.k, text.log_counts, norm_weight=self.norm_q.weight, eps=self.eps
        )
        return self._sum_projected(weights, text.v)

    def _query(self, x: Tensor) -> Tensor:
        """[B, L, N, Dh], without its norm."""
        return _by_head(self.q(x), self.heads)

    def _sum_projected(self, weights: Tensor, v: Tensor) -> Tensor:
        """`o` of what weights [B, L, N, n] sum up of v [B, n, N, Dh]: w (v W^T) has n / Dh of the work of (w v) W^T.

        It reads the weight of `o` and does not call it: an adapter's must be merged into it.
        """
        by_head = self.o.weight.unflatten(1, (self.heads, -1))
        projected = torch.einsum("bnhd,ehd->bhne", v, by_head).flatten(1, 2)
        rows = weights.flatten(2)
        if len(rows) == 1:  # the bias of one product is added where it is made, that of a batch is written first
            return torch.addmm(self.o.bias, rows[0], projected[0]).unsqueeze(0)
        return torch.baddbmm(self.o.bias, rows, projected)

    def _attended(self, x: Tensor, keys_values: KeysValues, attend: Attend) -> Tensor:
        q, out = qk_norm(self._query(x), self.norm_q.weight, eps=self.eps), None
        for k, v, log_counts in keys_values:
            if log_counts is None:
                seen = attend(q, k, v)
            else:
                seen = torch.einsum("blhn,bnhd->blhd", attention_weights(q, k, log_counts), v)
            # In the order of attention's result, heads of a token side by side; the text comes first.
            out = seen if out is None else seen + out
        return out


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear: [B, L, D] to [B, L, D]; the first two in one product."""

    def __init__(self, config: TransformerConfig) -> None:
        hidden = nn.Linear(config.dim, config.ffn_dim)
        super().__init__(hidden, nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not x.is_cuda:
            return self[2](linear_gelu(x, self[0].weight, self[0].bias))
        out = torch.empty_like(x)
        parts = -(-x[..., 0].numel() // FEED_FORWARD_TOKENS)
        for tokens, into in zip(*(tensor.flatten(0, -2).chunk(parts) for tensor in (x, out)), strict=True):
            # Under no name, so that it is gone before the next one is made.
            torch.addmm(self[2].bias, linear_gelu(tokens, self[0].weight, self[0].bias), self[2].weight.t(), out=into)
        return out


class Block(nn.Module):
    """Takes streams of tokens one block on, with e0 [B, F', 6, D] float32: F' = 1, or a row for each latent frame."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    def forward(
        self,
        streams: Sequence[Stream],
        e0: Tensor,
        keys_values: Sequence[KeysValues],
        places: Sequence[Places],
        index: int = 0,
        *,
        attend: Attend = attention,
        attend_context: Attend = attention,
    ) -> list[Stream]:
        """The streams of all branches, or one for them all: then they part at the attention to their contexts.

        keys_values: of each branch's context. places: of each branch; they differ in `past` alone, which keeps its own
        under `index`, this block's in the model. A stream that waits for others to pass is closed, and every other
        block takes them in the other order, so the last of one block is the first of the next and stays open.
        """
        modulation = (self.modulation.float() + e0).unbind(2)
        together = len(streams) < len(keys_values)
        if together:
            self._attend_to_itself(streams[0], modulation, places[0], index, attend)
            streams = [streams[0], *(streams[0].fork() for _ in keys_values[1:])]
        # A single stream has no order, so that compiled blocks do not differ by their index.
        order = range(len(streams))[:: -1 if len(streams) > 1 and index % 2 else 1]
        for branch in order:
            if not together:
                self._attend_to_itself(streams[branch], modulation, places[branch], index, attend)
            self._finish(streams[branch], modulation, keys_values[branch], attend_context)
            if branch != order[-1]:
                streams[branch].close()
        return list(streams)

    def _attend_to_itself(
        self, stream: Stream, modulation: Sequence[Tensor], places: Places, index: int, attend: Attend
    ) -> None:
        shift, scale, gate = modulation[:3]
        y = stream.norm(scale, shift, eps=self.eps, rounded=True)
        stream.add(self.self_attn(y, places, index, attend), gate)

    def _finish(
        self, stream: Stream, modulation: Sequence[Tensor], keys_values: KeysValues, attend_context: Attend
    ) -> None:
        """Attention to the context, and the feed-forward."""
        shift, scale, gate = modulation[3:]
        y = stream.norm(None, None, self.norm3.weight, self.norm3.bias, eps=self.eps)
        stream.add(self.cross_attn(y, keys_values, attend_context))
        del y
        stream.add(self.ffn(stream.norm(scale, shift, eps=self.eps)), gate)
