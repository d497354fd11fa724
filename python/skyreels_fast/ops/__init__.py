"""The fused operations of a video DiT, usable on their own: this package imports torch, triton and nothing of ours."""

from __future__ import annotations

from skyreels_fast.ops._attention_backends import query_rows
from skyreels_fast.ops.adaln import norm_scale_shift, scale_residual, scale_residual_norm_scale_shift
from skyreels_fast.ops.attention import attention, attention_with_lse, choose_attention
from skyreels_fast.ops.attention_weights import attention_weights
from skyreels_fast.ops.causal_conv3d import causal_conv3d
from skyreels_fast.ops.linear_gelu import linear_gelu
from skyreels_fast.ops.merge_attention import merge_attention
from skyreels_fast.ops.norm_silu import norm_silu
from skyreels_fast.ops.qk_norm_rope3d import qk_norm, qk_norm_rope3d, qk_norm_rope3d_
from skyreels_fast.ops.residual_reuse import relative_l1, residual_add, residual_save

__all__ = [
    "attention",
    "attention_weights",
    "attention_with_lse",
    "causal_conv3d",
    "choose_attention",
    "linear_gelu",
    "merge_attention",
    "norm_scale_shift",
    "norm_silu",
    "qk_norm",
    "qk_norm_rope3d",
    "qk_norm_rope3d_",
    "query_rows",
    "relative_l1",
    "residual_add",
    "residual_save",
    "scale_residual",
    "scale_residual_norm_scale_shift",
]
