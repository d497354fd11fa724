"""A block of diffusers' SkyReels-V2 and Wan transformers on our ops: both are built alike, of modules named alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skyreels_fast.integrations._forwards import Replacement
from skyreels_fast.ops import (
    attention,
    linear_gelu,
    norm_scale_shift,
    qk_norm,
    qk_norm_rope3d,
    scale_residual,
    scale_residual_norm_scale_shift,
)

Grid = tuple[int, int, int]


class Context(NamedTuple):
    """Embedded text [B, n, D] and, for image-to-video, image tokens [B, m, D]."""

    text: Tensor
    image: Tensor | None


class NormWeights(Replacement):
    """(weight, bias) of a norm, which the fused ops apply; called as a module, so that offloading brings them."""

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        norm = self.module
        weights = norm.weight, getattr(norm, "bias", None)
        if norm.forward is self:
            return weights
        # Hooks take the weights away again when this returns.
        return tuple(None if weight is None else weight.clone() for weight in weights)


def _is_plain(linear: nn.Module) -> bool:
    """Whether its weight and bias say all that it does: no LoRA, no quantised weight, no hook."""
    watched = "forward" in linear.__dict__ or linear._forward_hooks or linear._forward_pre_hooks
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.bias is not None
    return plain and not watched


class LinearGelu(Replacement):
    """What opens the feed-forward, [..., D] to [..., H]; in one product where its linear layer is a plain one."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        linear = self.module.proj
        cast = torch.is_autocast_enabled(hidden_states.device.type)  # then in autocast's dtype, as diffusers does
        if _is_plain(linear) and hidden_states.dtype == linear.weight.dtype and not cast:
            return linear_gelu(hidden_states, linear.weight, linear.bias)
        return self.module.gelu(linear(hidden_states))


def check_processor(attn: nn.Module, name: str) -> None:
    """Raises ValueError for an attention `name` whose processor is not the model's own: it would be passed by."""
    processor = type(attn.processor)
    if processor is not type(attn)._default_processor_cls:
        raise ValueError(f"{name} has a {processor.__name__}, which would be passed by: take it out, or restore(model)")


class _Attention(Replacement):
    def __init__(self, module: nn.Module, backend: str | None) -> None:
        super().__init__(module)
        self.backend = backend

    def _begin(self) -> nn.Module:
        """The module, whose processor may have been set since."""
        check_processor(self.module, type(self.module).__name__)
        return self.module

    def _heads(self, *parts: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (self.module.heads, -1)) for part in parts]

    def _fused(self) -> bool:
        """Whether fuse_qkv_projections made one layer of those that share their input."""
        return getattr(self.module, "fused_projections", False)

    def _project(self, x: Tensor) -> Tensor:
        linear, dropout = self.module.to_out
        return dropout(linear(x.flatten(2)))


class SelfAttention(_Attention):
    """x [B, L, D] to [B, L, D]: called as diffusers' attention, with the same stand-ins as `Block`."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: int | None = None,
        rotary_emb: Grid | None = None,
    ) -> Tensor:
        attn, x = self._begin(), hidden_states
        q, k, v = self._heads(
            *(attn.to_qkv(x).chunk(3, dim=-1) if self._fused() else (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        )
        q, k = qk_norm_rope3d(q, k, attn.norm_q()[0], attn.norm_k()[0], rotary_emb, eps=attn.norm_q.eps)
        return self._project(attention(q, k, v, block_tokens=attention_mask, backend=self.backend))


class CrossAttention(_Attention):
    """x [B, L, D] to [B, L, D]: called as diffusers' attention, with a Context in place of its concatenation."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        attn, (text, image) = self._begin(), encoder_hidden_states
        (q,) = self._heads(attn.to_q(hidden_states))
        q = qk_norm(q, attn.norm_q()[0], eps=attn.norm_q.eps)
        parts = attn.to_kv(text).chunk(2, dim=-1) if self._fused() else (attn.to_k(text), attn.to_v(text))
        out = self._attend(q, *parts, attn.norm_k)
        if image is not None and attn.add_k_proj is not None:
            fused = self._fused()
            parts = (
                attn.to_added_kv(image).chunk(2, dim=-1) if fused else (attn.add_k_proj(image), attn.add_v_proj(image))
            )
            out = out + self._attend(q, *parts, attn.norm_added_k)
        return self._project(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, norm: nn.Module) -> Tensor:
        k, v = self._heads(k, v)
        return attention(q, qk_norm(k, norm()[0], eps=norm.eps), v, backend=self.backend)


class Block(Replacement):
    """A transformer block: x [B, L, D] to x.

    Called as diffusers' block, with temb [B, F, 6, D] (F rows, each for L / F tokens), a Context, the grid in place of
    rotary tables, and the tokens of a causal block (or None) in place of a mask.
    """

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context,
        temb: Tensor,
        rotary_emb: Grid,
        attention_mask: int | None = None,
    ) -> Tensor:
        block, x = self.module, hidden_states
        rows = (block.scale_shift_table.float() + temb.float()).unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        dtypes = {"residual_dtype": torch.promote_types(x.dtype, torch.float32), "out_dtype": x.dtype}
        y = norm_scale_shift(x, scale1, shift1, eps=block.norm1.eps)
        seen = block.attn1(y, None, attention_mask, rotary_emb)
        # x + gate1 * seen is added up again with attn2's output: cheaper than a float32 sum, written and read.
        if isinstance(block.norm2, nn.Identity):
            y = scale_residual(x, seen, gate1)
        else:
            affine, eps = block.norm2(), block.norm2.eps
            y = norm_scale_shift(seen, None, None, *affine, x, gate1, eps=eps, out_dtype=x.dtype)
        y = block.attn2(y, encoder_hidden_states, None, None)
        total, y = scale_residual_norm_scale_shift(
            x, seen, gate1, scale2, shift2, addend=y, eps=block.norm3.eps, **dtypes
        )
        del seen
        return scale_residual(total, block.ffn(y), gate2, out_dtype=x.dtype)


def replacements(block: nn.Module, backend: str | None) -> Iterator[Replacement]:
    """All that stands in for a block's forwards; `backend` is that of `ops.attention`."""
    self_attention, cross_attention = block.attn1, block.attn2
    yield Block(block)
    yield SelfAttention(self_attention, backend)
    yield CrossAttention(cross_attention, backend)
    opening = block.ffn.net[0]
    if getattr(opening, "approximate", None) == "tanh":
        yield LinearGelu(opening)
    norms = [attn_norm for attn in (self_attention, cross_attention) for attn_norm in (attn.norm_q, attn.norm_k)]
    norms += [block.norm2, getattr(cross_attention, "norm_added_k", None)]
    yield from (NormWeights(norm) for norm in norms if norm is not None and not isinstance(norm, nn.Identity))
