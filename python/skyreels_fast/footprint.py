"""What a video's denoising needs of GPU memory, before any weight is loaded: an estimate, in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .config import TransformerConfig
from .dit.block import FEED_FORWARD_TOKENS
from .host_memory import GIB
from .streaming import least_bytes

# The CUDA context, the libraries' workspaces, and what the allocator cannot use of what it holds.
OVERHEAD_BYTES = GIB
_IMAGE_TOKENS = 257
_FLOAT32 = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes on the GPU while denoising.

    blocks: weights of each block. rest: all other weights of the DiT. activations: all that is no weight.
    """

    blocks: tuple[int, ...]
    rest: int
    activations: int

    @classmethod
    def of(
        cls,
        dit: nn.Module,
        dtype: torch.dtype,
        tokens: int,
        branches: int,
        *,
        shards: int = 1,
        teacache: bool = False,
    ) -> Footprint:
        """Of windows of `tokens` tokens, with `branches` contexts; `dit` may be on the meta device.

        shards: GPUs that share out the tokens. Beside its own q, k, v each then holds what it exchanges them for.
        """
        blocks = tuple(_nbytes(block.parameters(), dtype) for block in dit.blocks)
        rest = _nbytes(dit.parameters(), dtype) - sum(blocks)
        own = -(-tokens // shards)
        exchanged = 4 * own * dit.config.dim * dtype.itemsize if shards > 1 else 0
        activations = activation_bytes(dit.config, dtype, own, branches, teacache=teacache)
        return cls(blocks, rest, activations + exchanged)

    @property
    def beside(self) -> int:
        """All but the weights."""
        return self.activations + OVERHEAD_BYTES

    @property
    def total(self) -> int:
        """With all weights on the GPU."""
        return sum(self.blocks) + self.rest + self.beside

    @property
    def least(self) -> int:
        """With every block streamed through two slots, as --offload has it."""
        return least_bytes(self.blocks) + self.rest + self.beside

    def check(self, vram: float) -> None:
        """Raises ValueError where the GPU memory budget, in GiB, is too small for any number of blocks."""
        if self.least > vram * GIB:
            raise ValueError(
                f"--vram {vram:g}: this video needs at least {math.ceil(self.least / GIB * 10) / 10:.1f} GiB of GPU "
                "memory; give as much, a smaller size or fewer frames"
            )

    def needed(self, *, offload: bool, vram: float | None) -> int:
        """What a run takes that streams all blocks, or as many as a budget of `vram` GiB asks for, or none."""
        if offload:
            return self.least
        return self.total if vram is None else min(self.total, max(self.least, int(vram * GIB)))

    def advice(self, *, offload: bool, vram: float | None, total: int, free: int, frames_flag: str) -> str:
        """One line: what is needed, what the GPU has in all and free, in bytes, and which flags need less."""
        options = []
        fitting = int(total / GIB - 1)
        if not offload and vram is None:
            if self.least < fitting * GIB:
                options.append(f"--vram {fitting} (as many blocks stay on the GPU as fit)")
            options.append(f"--offload (about {self.least / GIB:.1f} GiB)")
        elif vram is not None and self.least < vram * GIB:
            options.append(f"a smaller --vram ({self.least / GIB:.1f} GiB or more)")
        options += ["a smaller size", f"fewer {frames_flag}"]
        return (
            f"denoising needs about {self.needed(offload=offload, vram=vram) / GIB:.1f} GiB of GPU memory, the GPU has "
            f"{total / GIB:.1f} GiB ({free / GIB:.1f} free): try {', '.join(options[:-1])} or {options[-1]}"
        )


def activation_bytes(
    config: TransformerConfig, dtype: torch.dtype, tokens: int, branches: int, *, teacache: bool = False
) -> int:
    """The peak of all tensors but weights in one step of the denoising loop at batch 1.

    In a block it is the most that one of its parts holds at a time, of tensors [L, D]. Self-attention: the residual and
    its norm, q, k, v and the output. Attention to the context: the residual in float32, its norm, q and the output, and
    two more for an image. The norm after that: the float32 residual before and after, what is added, and the norm.
    Feed-forward: the float32 residual, its norm, the output, and the hidden layer of so many tokens as it takes at a
    time, in float32 before its activation, too. Beside it: of each branch that waits what the first block had of it,
    each context's keys and values in every block, the velocities, and with TeaCache the embedded tokens and a residual
    for each branch; and a float32 copy of one part of the largest modulation weight. What is kept for speed where
    memory is left (causal attention's past) does not count.
    """
    size, dim = dtype.itemsize, config.dim
    attention = 6 * tokens * dim * size
    to_context = tokens * dim * (_FLOAT32 + (5 if config.model_type == "i2v" else 3) * size)
    norm = tokens * dim * (2 * _FLOAT32 + 2 * size)
    hidden = min(tokens, FEED_FORWARD_TOKENS) * config.ffn_dim * size * (1 if size < _FLOAT32 else 2)
    feed_forward = tokens * dim * (_FLOAT32 + 2 * size) + hidden
    waiting = 2 * (branches - 1) * tokens * dim * size
    context_tokens = config.text_len + (_IMAGE_TOKENS if config.model_type == "i2v" else 0)
    keys_values = branches * config.num_layers * 2 * context_tokens * dim * size
    kept = (1 + branches) * tokens * dim * size if teacache else 0
    latents = 4 * (branches + 4) * tokens * (config.in_dim + config.out_dim) * _FLOAT32
    at_a_time = max(attention, to_context, norm, feed_forward)
    return at_a_time + waiting + keys_values + kept + latents + dim * dim * _FLOAT32


def check_vram(vram: float | None, device: torch.device, offload: bool) -> None:
    """Raises ValueError where a budget of GPU memory, in GiB, makes no sense."""
    if vram is None:
        return
    if not 0 < vram < math.inf:
        raise ValueError(f"--vram {vram:g}: must be a number of GiB above 0")
    if device.type != "cuda":
        raise ValueError(f"--vram {vram:g}: device {device} has no GPU memory to keep to; leave it out")
    if offload:
        raise ValueError(f"--vram {vram:g}: excludes --offload, which streams all blocks; leave one out")


def _nbytes(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in parameters) * dtype.itemsize
