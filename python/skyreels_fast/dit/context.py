"""What a DiT is told about a video: embedded text and image, with every block's keys and values of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyreels_fast.dit.block import Block, KeysValues

_PARTS = 3
_ALIGNED = 8  # keys: torch's kernels copy a mask of any other number


class Context:
    """A condition: embedded text [B, n, D] and image [B, m, D] or None, with every block's keys and values.

    They depend on nothing else, so each block's are computed when first asked for and kept; with gradients enabled
    nothing is kept. log_counts: [n], the logarithm of how often each token of the text counts, or None for once.
    """

    def __init__(self, text: Tensor, image: Tensor | None = None, log_counts: Tensor | None = None) -> None:
        self.text, self.image, self.log_counts = text, image, log_counts
        self._kept: dict[int, KeysValues] = {}

    def keys_values(self, index: int, block: Block) -> KeysValues:
        """The keys and values of `block`, which is the model's block number `index`."""
        if torch.is_grad_enabled():
            return block.cross_attn.keys_values(self.text, self.image, self.log_counts)
        if index not in self._kept:
            self._kept[index] = block.cross_attn.keys_values(self.text, self.image, self.log_counts)
        return self._kept[index]


def padding_log_counts(text_tokens: int, padding: int, dtype: torch.dtype) -> list[float] | None:
    """Logarithms, as `dtype` has them, of how often some equal tokens count that stand for `padding` of them.

    Behind `text_tokens` they make a number of keys that attention likes. A half-precision logarithm of 412 is half a
    percent off, so three tokens share the count, each counting what the ones before left over. None: too few to bother.
    """
    count = _PARTS + -(text_tokens + _PARTS) % _ALIGNED
    if padding <= count:
        return None
    ones, left, logs = count - _PARTS, float(padding - count + _PARTS), []
    for _ in range(_PARTS):
        exact = math.log(left) if left > 0 else -math.inf
        logs.append(_rounded_down(exact, dtype))
        left -= math.exp(logs[-1])
    return [0.0] * ones + logs


def _rounded_down(value: float, dtype: torch.dtype) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(value)))
    return math.floor(value / spacing) * spacing
