"""What a DiT is told about a video: embedded text and image, with every block's keys and values of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyreels_fast.dit.block import Block, KeysValues

_ALIGNED = 8  # of 16 bits: a row of weights then begins where a matrix product reads it at once


class Context:
    """A condition: embedded text [B, n, D] and image [B, m, D] or None, with every block's keys and values.

    They depend on nothing else, so each block's are computed when first asked for and kept; with gradients enabled
    nothing is kept. log_counts: [n] float32, the logarithm of how often each token of the text counts; None: once.
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


def counted_padding(tokens: int, padding: int, most: int) -> int:
    """How many tokens of padding are to stand for all `padding` of them behind a text of `tokens` tokens.

    They are equal, so one that counts for many does; a few more make the number of keys one that matrix products like.
    All of them where no fewer do, or where there would be more than `most` keys.
    """
    count = 1 + -(tokens + 1) % _ALIGNED
    return count if count < padding and tokens + count <= most else padding


def log_counts_of(tokens: int, kept: int, padding: int, device: torch.device) -> Tensor | None:
    """How often each key counts, the last of those `kept` for all that are not: see `Context`."""
    if kept == padding:
        return None
    logs = torch.zeros(tokens + kept, device=device)
    logs[-1] = math.log(padding - kept + 1)
    return logs
