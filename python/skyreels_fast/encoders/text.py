"""UMT5: prompts → contexts [n, text_dim], one row a token.

The encoder of UMT5-XXL (arXiv:2304.09151): pre-norm, RMS norms, a relative position table per layer, feed-forward
gated by GELU(tanh). Its sizes are read off the weights, so that a small one works the same.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from ..config import TransformerConfig


class Checkpoint(Protocol):
    """What `TextEncoder.load` needs of a checkpoint."""

    config: TransformerConfig

    def text_weights(self) -> tuple[dict[str, Tensor], dict]: ...

    def tokenizer_path(self) -> Path: ...

    def load_text_encoder(self, encoder: TextEncoder, device: torch.device | str, dtype: torch.dtype) -> None: ...


_PUBLISHED = {
    "token_embedding": "embed_tokens",
    "norm": "final_layer_norm",
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def clean_prompt(prompt: str) -> str:
    """Mend broken encodings, resolve HTML entities (written twice over, too), fold white space."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


class TextEncoder(nn.Module):
    """UMT5's encoder with its tokenizer, made on the meta device: fill it with `renamed(weights)` before use.

    Args:
        weights: the checkpoint's tensors, with the published names or those of transformers' UMT5EncoderModel;
            only their shapes are looked at.
        settings: values of a transformers config.json that shapes do not tell.
        tokenizer: directory that holds tokenizer.json; None where only `encode_ids` is used.
        max_tokens: where a prompt is cut: the DiT's text_len.

    Raises:
        ValueError: the weights are not a UMT5 encoder's, or the tokenizer cannot be read.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        settings: Mapping | None = None,
        *,
        tokenizer: str | Path | None = None,
        max_tokens: int = 512,
    ) -> None:
        super().__init__()
        config = _config(self.renamed(weights), settings or {})
        with torch.device("meta"):
            # The stack alone: UMT5EncoderModel holds the embedding under two names.
            self.model = UMT5EncoderModel(config).encoder.eval()
        self.tokenizer = None if tokenizer is None else _tokenizer(Path(tokenizer), max_tokens)

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> TextEncoder:
        """The text encoder of a checkpoint, filled; on the CPU with the checkpoint's own dtype it stays mapped."""
        weights, settings = checkpoint.text_weights()
        max_tokens = checkpoint.config.text_len
        encoder = cls(weights, settings, tokenizer=checkpoint.tokenizer_path(), max_tokens=max_tokens)
        checkpoint.load_text_encoder(encoder, device, dtype)
        return encoder

    @staticmethod
    def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under this module's parameter names; what is not known keeps its own."""
        if "token_embedding.weight" in weights:
            return {_from_published(name): tensor for name, tensor in weights.items()}
        # transformers saves the embedding as `shared`, and some versions once more as the encoder's own.
        return {
            "model.embed_tokens.weight" if name == "shared.weight" else name.replace("encoder.", "model.", 1): tensor
            for name, tensor in weights.items()
            if not (name == "encoder.embed_tokens.weight" and "shared.weight" in weights)
        }

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Contexts [n, dim] of the prompts, n ≤ max_tokens their tokens, in the weights' dtype on the weights' device.

        Each prompt runs by itself and unpadded: the same numbers as padded and masked, for less work,
        whatever the other prompts are.
        """
        if self.tokenizer is None:
            raise ValueError("this TextEncoder was made without a tokenizer: encode_ids is all it can do")
        device = self.model.embed_tokens.weight.device
        encodings = self.tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
        ids = [torch.tensor([encoding.ids], dtype=torch.int64, device=device) for encoding in encodings]
        return [self.encode_ids(row, torch.ones_like(row))[0] for row in ids]

    @torch.inference_mode()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [B, L] with mask [B, L] (1 on tokens, 0 past them) → [B, L, dim], zero past the mask."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.where(mask.bool().unsqueeze(-1), hidden, 0)


def _from_published(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    prefix, rest = (f"model.block.{block[1]}.", block[2]) if block else ("model.", name)
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{_PUBLISHED[module]}.{leaf}" if module in _PUBLISHED else name


def _config(weights: Mapping[str, Tensor], settings: Mapping) -> UMT5Config:
    first = "model.block.0.layer"
    try:
        vocab, dim = weights["model.embed_tokens.weight"].shape
        buckets, heads = weights[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
        inner = weights[f"{first}.0.SelfAttention.q.weight"].shape[0]
        ffn_dim = weights[f"{first}.1.DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"these are not the weights of a UMT5 encoder: {error} is missing") from None
    return UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn_dim,
        num_heads=heads,
        num_layers=1 + max(int(block[1]) for name in weights if (block := re.match(r"model\.block\.(\d+)\.", name))),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=settings.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=settings.get("layer_norm_epsilon", 1e-6),
        feed_forward_proj="gated-gelu_pytorch_tanh",
        dropout_rate=0.0,
    )


def _tokenizer(directory: Path, max_tokens: int) -> Tokenizer:
    """The tokenizer exactly as its file says: transformers 5 rebuilds T5's by rules of its own."""
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{file} cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer
