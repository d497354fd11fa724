"""The residual stream of a DiT: sums are left open until a norm, which adds up in the pass it takes anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from skyreels_fast.ops import norm_scale_shift, scale_residual, scale_residual_norm_scale_shift


class Stream:
    """Tokens [B, L, D] on their way through the blocks, `tokens` at first, in the model's dtype.

    Within a block the sum is float32; at a block's end it is rounded to the model's dtype. Two tensors of 16 bits take
    no more memory than their sum in float32 does, so it is written only when a third has joined them. What has been
    added up is let go of at once.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.dtype = tokens.dtype
        self._residual = tokens
        # (x, gate, addend): gate * x + addend is still to be added.
        self._open: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    @property
    def batch(self) -> int:
        return self._residual.shape[0]

    @property
    def _wide(self) -> torch.dtype:
        """What holds a sum that is not rounded."""
        return torch.promote_types(self.dtype, torch.float32)

    def fork(self) -> Stream:
        """Another stream that is at the same point; the two have their tensors in common, which neither writes to."""
        other = Stream(self._residual)
        other.dtype, other._open = self.dtype, self._open
        return other

    def add(self, x: Tensor, gate: Tensor | None = None) -> None:
        """Add gate * x (None: 1) at a later norm: x [B, L, D], gate [B, F', D] float32."""
        if self._open is not None and self._open[2] is None and gate is None:
            self._open = (*self._open[:2], x)
            return
        self._add_up(self._wide)
        self._open = (x, gate, None)

    def norm(
        self,
        scale: Tensor | None,
        shift: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        eps: float,
        rounded: bool = False,
    ) -> Tensor:
        """The norm [B, L, D] of the sum, arguments as in `ops.norm_scale_shift`; the sum itself is kept `rounded`, or
        as precise as float32."""
        affine = (scale, shift, weight, bias)
        if self._open is None:
            return norm_scale_shift(self._residual, *affine, eps=eps, out_dtype=self.dtype)
        x, gate, addend = self._open
        if not rounded and addend is None and self._residual.dtype != self._wide:
            return norm_scale_shift(x, *affine, self._residual, gate, eps=eps, out_dtype=self.dtype)
        kept = self.dtype if rounded else self._wide
        self._residual, y = scale_residual_norm_scale_shift(
            self._residual, x, gate, *affine, addend, eps=eps, residual_dtype=kept, out_dtype=self.dtype
        )
        self._open = None
        return y

    def close(self) -> None:
        """Add up now, rounded to the model's dtype: a stream that waits then holds one tensor."""
        self._add_up(self.dtype)

    def _add_up(self, dtype: torch.dtype) -> None:
        if self._open is not None:
            self._residual = scale_residual(self._residual, *self._open, out_dtype=dtype)
            self._open = None

    def total(self) -> Tensor:
        """The sum [B, L, D] in the model's dtype."""
        self.close()
        return self._residual.to(self.dtype)
