"""UMT5: prompts → contexts [n, text_dim], one row a token.

The encoder of UMT5-XXL (arXiv:2304.09151): pre-norm, RMS norms, a relative position table per layer, feed-forward
gated by GELU(tanh). Its sizes are read off the weights, so that a small one works the same.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from .._meta import without_weights
from .._words import listed
from ..config import TransformerConfig

_SHOWN = 40  # characters of a prompt, in a line about it


class Checkpoint(Protocol):
    """What `TextEncoder.load` and `TextEncoder.check` need of a checkpoint."""

    config: TransformerConfig

    def text_weights(self) -> tuple[dict[str, Tensor], dict]: ...

    def tokenizer_path(self) -> Path: ...

    def load_text_encoder(self, encoder: TextEncoder, device: Any, dtype: torch.dtype) -> None: ...

    def check_encoder(self, part: str, make: Callable[[dict[str, Tensor], dict], TextEncoder]) -> TextEncoder: ...


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
_OWN = {ours: published for published, ours in _PUBLISHED.items()}


def clean_prompt(prompt: str) -> str:
    """Mend broken encodings, resolve HTML entities (written twice over, too), fold white space."""
    import ftfy  # requests that bring their own contexts do without

    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


def unread(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """What a model does not see of a prompt, a line each: words its tokenizer does not have, tokens past the last."""
    text = clean_prompt(prompt)
    encoding, unknown = tokenizer.encode(text), tokenizer.token_to_id("<unk>")
    spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown]
    words = list(dict.fromkeys(repr(text[start:stop]) for start, stop in spans))
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    lines = [f"prompt {shown!r}: the model does not know {listed(words, 'or')}"] if words else []
    read, *rest = (part.special_tokens_mask.count(0) for part in (encoding, *encoding.overflowing))
    if rest:
        lines.append(f"prompt {shown!r}: only the first {read} of its {read + sum(rest)} tokens are read")
    return lines


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
        self._is_published = _is_published(weights)
        config = _config(self.renamed(weights), settings or {}, self.name_in_checkpoint)
        with without_weights():
            # The stack alone: UMT5EncoderModel holds the embedding under two names.
            self.model = UMT5EncoderModel(config).encoder.eval()
        self.tokenizer = None if tokenizer is None else _tokenizer(Path(tokenizer), max_tokens)

    # The table takes 2 GiB for a few rows: they are looked up on the host.
    host_parameters = ("model.embed_tokens.weight",)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, which run one after the other."""
        return self.model.block

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: Any = "cpu") -> TextEncoder:
        """The text encoder of a checkpoint, filled; on the CPU with the checkpoint's own dtype it stays mapped.

        device: or a home for weights, as `checkpoint.fill` takes.
        """
        weights, settings = checkpoint.text_weights()
        max_tokens = checkpoint.config.text_len
        encoder = cls(weights, settings, tokenizer=checkpoint.tokenizer_path(), max_tokens=max_tokens)
        checkpoint.load_text_encoder(encoder, device, dtype)
        return encoder

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Find what is wrong with a checkpoint's text encoder or its tokenizer from headers alone, loading nothing.

        Returns the tokenizer.
        Raises ValueError, in one line, where tensors are missing, unknown or misshapen, the tokenizer cannot be read or
        has more tokens than the encoder, or the contexts are not text_dim wide.
        """

        def make(weights: dict[str, Tensor], settings: dict) -> TextEncoder:
            config = checkpoint.config
            encoder = cls(weights, settings, tokenizer=checkpoint.tokenizer_path(), max_tokens=config.text_len)
            rows, width = encoder.model.embed_tokens.weight.shape
            if width != config.text_dim:
                raise ValueError(f"its contexts are {width} wide, the transformer's text_dim is {config.text_dim}")
            if (tokens := encoder.tokenizer.get_vocab_size()) > rows:
                raise ValueError(f"its tokenizer has {tokens} tokens, its token embedding {rows} rows")
            return encoder

        return checkpoint.check_encoder("text_encoder", make).tokenizer

    def name_in_checkpoint(self, name: str) -> str:
        """A name as `renamed` gives it → the name in the checkpoint."""
        if not self._is_published:
            return "shared.weight" if name == "model.embed_tokens.weight" else re.sub("^model", "encoder", name)
        block = re.fullmatch(r"model\.block\.(\d+)\.(.+)", name)
        prefix, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name.removeprefix("model."))
        module, _, leaf = rest.rpartition(".")
        return f"{prefix}{_OWN[module]}.{leaf}" if module in _OWN else name

    @staticmethod
    def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under this module's parameter names; what is not known keeps its own."""
        if _is_published(weights):
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
        encodings = self.tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
        ids = [torch.tensor([encoding.ids], dtype=torch.int64) for encoding in encodings]
        return [self.encode_ids(row, torch.ones_like(row))[0] for row in ids]

    @torch.inference_mode()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [B, L] with mask [B, L] (1 on tokens, 0 past them) → [B, L, dim], zero past the mask."""
        table = self.model.embed_tokens.weight
        rows = functional.embedding(ids.to(table.device), table).to(self.model.final_layer_norm.weight)
        mask = mask.to(rows.device)
        hidden = self.model(inputs_embeds=rows, attention_mask=mask).last_hidden_state
        return torch.where(mask.bool().unsqueeze(-1), hidden, 0)


def _is_published(weights: Mapping[str, Tensor]) -> bool:
    return not any(name in weights for name in ("shared.weight", "encoder.embed_tokens.weight"))


def _from_published(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    prefix, rest = (f"model.block.{block[1]}.", block[2]) if block else ("model.", name)
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{_PUBLISHED[module]}.{leaf}" if module in _PUBLISHED else name


def _config(weights: Mapping[str, Tensor], settings: Mapping, shown: Callable[[str], str]) -> UMT5Config:
    def sizes(name: str) -> tuple[int, int]:
        if name not in weights:
            raise ValueError(f"these are not the weights of a UMT5 encoder: {shown(name)} is missing")
        shape = tuple(weights[name].shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"these are not the weights of a UMT5 encoder: {shown(name)} has shape {shape}")
        return shape

    first = "model.block.0.layer"
    vocab, dim = sizes("model.embed_tokens.weight")
    buckets, heads = sizes(f"{first}.0.SelfAttention.relative_attention_bias.weight")
    inner, _ = sizes(f"{first}.0.SelfAttention.q.weight")
    ffn_dim, _ = sizes(f"{first}.1.DenseReluDense.wi_0.weight")
    distance = settings.get("relative_attention_max_distance", 128)
    if not isinstance(distance, int) or distance < 1:
        raise ValueError(f"relative_attention_max_distance {str(distance):.80} is not a whole number from 1")
    return UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn_dim,
        num_heads=heads,
        num_layers=1 + max(int(block[1]) for name in weights if (block := re.match(r"model\.block\.(\d+)\.", name))),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
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
