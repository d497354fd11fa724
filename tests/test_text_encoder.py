"""UMT5: the golden output, both naming schemes, prompts and their tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import skyreels_fast as sf
from skyreels_fast.checkpoint import Checkpoint, CheckpointError, fill
from skyreels_fast.encoders.text import TextEncoder, clean_prompt, unread

WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog", "▁on", "▁the", "▁mat", "▁"]


def golden_weights() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "t5_tiny.pth", weights_only=True, mmap=True)


def write_tokenizer(directory: Path, *, padded: bool = False) -> Path:
    """A word tokenizer in UMT5's manner: pad 0, end 1 (appended), unknown 2."""
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(WORDS[:3])
    if padded:
        tokenizer.enable_padding(length=32)
        tokenizer.enable_truncation(4)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 300}))
    return directory


def made(tokenizer: Path | None = None, dtype: torch.dtype = torch.float32) -> TextEncoder:
    weights = golden_weights()
    encoder = TextEncoder(weights, tokenizer=tokenizer)
    fill(encoder, encoder.renamed(weights), device="cpu", dtype=dtype, what="text encoder")
    return encoder


def published(directory: Path) -> Path:
    write_tokenizer(directory / "google" / "umt5-xxl")
    shutil.copy(GOLDEN / "df" / "config.json", directory)
    shutil.copy(GOLDEN / "t5_tiny.pth", directory / "models_t5_umt5-xxl-enc-bf16.pth")
    return directory


# The network


def test_golden_output() -> None:
    golden = load_golden("components")
    out = made().encode_ids(golden["t5.ids"], golden["t5.mask"])
    assert rel_l2(out, golden["t5.out"]) < 1e-5
    assert not out[golden["t5.mask"] == 0].any()


def test_everything_runs_in_the_dtype_asked_for() -> None:
    golden, encoder = load_golden("components"), made(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    out = encoder.encode_ids(golden["t5.ids"], golden["t5.mask"])
    assert out.dtype == torch.bfloat16 and rel_l2(out, golden["t5.out"]) < 0.02


def test_padding_and_neighbours_change_nothing() -> None:
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 9:] = 0
    encoder = made()
    both = encoder.encode_ids(ids, mask)
    assert rel_l2(both[:1], encoder.encode_ids(ids[:1], mask[:1])) < 1e-5
    assert rel_l2(both[1:, :9], encoder.encode_ids(ids[1:, :9], mask[1:, :9])) < 1e-5


def test_a_mask_of_nothing_gives_zeros() -> None:
    out = made().encode_ids(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    assert out.shape == (1, 4, 64) and not out.any()


def test_each_layer_has_its_own_position_table() -> None:
    weights = {name: tensor.clone() for name, tensor in golden_weights().items()}
    weights["blocks.1.pos_embedding.embedding.weight"] *= -1
    encoder = TextEncoder(weights)
    fill(encoder, encoder.renamed(weights), device="cpu", dtype=torch.float32, what="text encoder")
    golden = load_golden("components")
    assert rel_l2(encoder.encode_ids(golden["t5.ids"], golden["t5.mask"]), golden["t5.out"]) > 1e-3


@pytest.mark.parametrize("twice", [False, True])
def test_diffusers_layout_computes_the_same(tmp_path: Path, twice: bool) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    settings = {"num_heads": 3, "d_kv": 6, "num_layers": 2, "relative_attention_max_distance": 20}
    config = UMT5Config(vocab_size=50, d_model=24, d_ff=40, layer_norm_epsilon=1e-3, **settings)
    theirs = UMT5EncoderModel(config).eval()
    theirs.save_pretrained(tmp_path / "text_encoder")
    if twice:
        file = tmp_path / "text_encoder" / "model.safetensors"
        weights = load_file(file)
        save_file(weights | {"encoder.embed_tokens.weight": weights["shared.weight"].clone()}, file)
    shutil.copy(GOLDEN / "df" / "config.json", tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    encoder = TextEncoder.load(Checkpoint.open(tmp_path), torch.float32)
    ids = torch.randint(3, 50, (1, 64))
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
    assert rel_l2(encoder.encode_ids(ids, torch.ones_like(ids)), expected) < 1e-5
    assert len(encoder.encode(["the cat"])[0]) == 3


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the weights of a UMT5 encoder"):
        TextEncoder(torch.load(GOLDEN / "clip_tiny.pth", weights_only=True))
    weights = golden_weights()
    del weights["blocks.1.norm2.weight"]
    weights["decoder.weight"] = torch.ones(1)
    torch.save(weights, published(tmp_path) / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.norm2\.weight; unknown decoder\.weight"):
        TextEncoder.load(Checkpoint.open(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.1.attn.q.weight", None, r"missing blocks\.1\.attn\.q\.weight$"),
        ("blocks.0.ffn.gate.0.weight", None, r"blocks\.0\.ffn\.gate\.0\.weight is missing$"),
        ("token_embedding.weight", None, r"token_embedding\.weight is missing$"),
        ("token_embedding.weight", torch.ones(()), r"token_embedding\.weight has shape \(\)$"),
        ("norm.weight", torch.ones(3), r"misshapen norm\.weight \(3,\) in place of \(64,\)$"),
        ("lora.down", torch.ones(3), r"unknown lora\.down$"),
        ("token_embedding.weight", torch.ones(4, 64), "tokenizer has 10 tokens, its token embedding 4 rows$"),
        ("token_embedding.weight", torch.ones(96, 32), "contexts are 32 wide, the transformer's text_dim is 64$"),
    ],
)
def test_check_finds_damage_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: Tensor | None, message: str
) -> None:
    file = published(tmp_path) / "models_t5_umt5-xxl-enc-bf16.pth"
    TextEncoder.check(Checkpoint.open(tmp_path))
    weights = golden_weights()
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    file.unlink()
    torch.save(weights, file)
    monkeypatch.setattr(Checkpoint, "load_text_encoder", None)
    with pytest.raises(CheckpointError, match=f"^text encoder of .*{message}"):
        TextEncoder.check(Checkpoint.open(tmp_path))


def test_check_opens_the_tokenizer_and_reads_the_settings(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(published(tmp_path))
    (tmp_path / "text_encoder_config.json").write_text('{"relative_attention_max_distance": [1]}')
    with pytest.raises(CheckpointError, match=r"relative_attention_max_distance .*\[1\]") as error:
        TextEncoder.check(checkpoint)
    assert "\n" not in str(error.value)
    (tmp_path / "text_encoder_config.json").unlink()
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read") as error:
        TextEncoder.check(checkpoint)
    assert "\n" not in str(error.value)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("  a\n\tcat \u00a0 on  ", "a cat on"),
        ("a cat &amp;amp; a dog", "a cat & a dog"),
        ("&lt;a&gt;", "<a>"),
        ("schÃ¶n", "schön"),
        ("“a”", '"a"'),
        ("猫、走る", "猫、走る"),
        ("", ""),
    ],
)
def test_clean_prompt(prompt: str, clean: str) -> None:
    assert clean_prompt(prompt) == clean


def test_prompts_become_their_own_tokens(tmp_path: Path) -> None:
    encoder = made(write_tokenizer(tmp_path))
    contexts = encoder.encode(["  the   cat on the mat", "a dog", ""])
    assert [tuple(context.shape) for context in contexts] == [(6, 64), (3, 64), (1, 64)]
    ids = torch.tensor([[7, 4, 6, 7, 8, 1]])
    assert torch.equal(contexts[0], encoder.encode_ids(ids, torch.ones_like(ids))[0])


def test_equals_the_published_way_of_padding_to_512(tmp_path: Path) -> None:
    encoder = made(write_tokenizer(tmp_path))
    ids, mask = torch.zeros(1, 512, dtype=torch.int64), torch.zeros(1, 512, dtype=torch.int64)
    ids[0, :3], mask[0, :3] = torch.tensor([3, 5, 1]), 1
    assert rel_l2(encoder.encode(["a dog"])[0], encoder.encode_ids(ids, mask)[0, :3]) < 1e-5


def test_long_prompts_are_cut_to_512_tokens_and_still_end(tmp_path: Path) -> None:
    encoder = made(write_tokenizer(tmp_path))
    (context,) = encoder.encode(["cat " * 600])
    ids = torch.tensor([[4] * 511 + [1]])
    assert torch.equal(context, encoder.encode_ids(ids, torch.ones_like(ids))[0])


@pytest.mark.parametrize(
    ("prompt", "lines"),
    [
        ("the cat on  the mat", []),
        ("", []),
        ("a zebra on the &amp; zebra", ["prompt 'a zebra on the & zebra': the model does not know 'zebra' or '&'"]),
        ("cat " * 600, [f"prompt '{'cat ' * 9}c...': only the first 511 of its 600 tokens are read"]),
        ("cat " * 511, []),
    ],
)
def test_what_a_model_does_not_see_of_a_prompt_is_told(prompt: str, lines: list[str], tmp_path: Path) -> None:
    assert unread(made(write_tokenizer(tmp_path)).tokenizer, prompt) == lines


def test_a_plan_tells_what_the_model_does_not_know() -> None:
    pipe = sf.Pipeline.from_pretrained("tiny", device="cpu")
    request = sf.Request(prompts=["a red circle", "a red boat"], num_frames=81, overlap_history=17)
    assert pipe.plan(request).notes == ("prompt 'a red boat': the model does not know 'boat'",)
    assert pipe.plan(sf.Request(prompt="a red circle moving right on a black background")).notes == ()


def test_what_a_tokenizer_file_says_of_lengths_is_overruled(tmp_path: Path) -> None:
    encoder = made(write_tokenizer(tmp_path, padded=True))
    assert len(encoder.encode(["the cat on the mat"])[0]) == 6


def test_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(write_tokenizer(tmp_path) / "tokenizer.json"), pad_token="<pad>"
    )
    prompts = ["the cat on the mat", "a zebra </s> dog", "", "cat " * 600]
    expected = theirs(prompts, truncation=True, max_length=512, add_special_tokens=True)["input_ids"]
    assert [encoding.ids for encoding in made(tmp_path).tokenizer.encode_batch(prompts)] == expected


def test_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a tokenizer"):
        made().encode(["a"])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        made(tmp_path)
