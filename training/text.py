"""The bundled model's text side: a small UMT5 encoder, trained end to end, and the token ids it is fed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from training.prompts import ALL_SCENES, EOS, PAD, SPECIALS, UNK, token_ids, vocabulary

TEXT_LEN = 32  # tokens that the model attends to; its prompts have at most 11


def build_encoder(dim: int = 128, layers: int = 2, heads: int = 4) -> UMT5EncoderModel:
    """A fresh UMT5 encoder over the prompts' vocabulary."""
    config = UMT5Config(
        vocab_size=len(vocabulary()),
        d_model=dim,
        d_kv=dim // heads,
        d_ff=2 * dim,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu_pytorch_tanh",
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
    )
    return UMT5EncoderModel(config)


def prompt_ids(prompts: list[str] | None = None) -> Tensor:
    """[n, TEXT_LEN] int64 token ids, padded; default: of all 640 prompts in the order of ALL_SCENES."""
    prompts = [scene.prompt for scene in ALL_SCENES] if prompts is None else prompts
    rows = [token_ids(prompt)[:TEXT_LEN] for prompt in prompts]
    return torch.tensor([row + [PAD] * (TEXT_LEN - len(row)) for row in rows])


def unconditional_ids(n: int, generator: torch.Generator) -> Tensor:
    """[n, TEXT_LEN]: half empty prompts, half what prompts about other things look like to the vocabulary.

    Those are unknown words with few known ones among them, so that any negative prompt acts like the empty one.
    """
    device = generator.device
    words = torch.rand(n, TEXT_LEN, generator=generator, device=device)
    known = torch.randint(len(SPECIALS), len(vocabulary()), (n, TEXT_LEN), generator=generator, device=device)
    ids = torch.where(words < 0.05, known, UNK)
    lengths = torch.randint(1, TEXT_LEN, (n, 1), generator=generator, device=device)
    lengths = lengths * (torch.rand(n, 1, generator=generator, device=device) < 0.5)
    place = torch.arange(TEXT_LEN, device=device)
    return torch.where(place < lengths, ids, torch.where(place == lengths, EOS, PAD))


def encode_text(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Token ids [n, L] to text embeddings [n, L, dim], zero past each prompt's end."""
    mask = ids != PAD
    hidden = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return hidden * mask.unsqueeze(-1)
