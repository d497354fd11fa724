"""The prompt enhancer, on a random model of the class it is made for and a tokenizer made on the spot."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from skyreels_fast import enhance

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A byte-level vocabulary and two layers of random weights."""
    path = tmp_path_factory.mktemp("qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    return path


def test_the_answer_alone_comes_back_on_one_line(model_dir):
    first = enhance.enhance("a fox in the snow", model_dir, "cpu", max_new_tokens=40, seed=3)
    assert first
    assert "\n" not in first
    assert "fox in the snow" not in first
    assert "<|im" not in first
    assert enhance.enhance("a fox in the snow", model_dir, "cpu", max_new_tokens=40, seed=3) == first
    assert enhance.enhance("a fox in the snow", model_dir, "cpu", max_new_tokens=40, seed=4) != first


def test_the_model_is_told_what_to_do_and_gets_the_prompt_whole(model_dir, monkeypatch):
    seen = []
    generate = Qwen2ForCausalLM.generate

    def spy(self, input_ids, **options):
        seen.append((input_ids, options["max_new_tokens"]))
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", spy)
    enhance.enhance("Ein Fuchs, 雪", model_dir, "cpu", max_new_tokens=5, seed=0)
    ((tokens, limit),) = seen
    text = PreTrainedTokenizerFast.from_pretrained(model_dir).decode(tokens[0])
    assert limit == 5
    assert text.startswith(f"<|im_start|>system\n{enhance.SYSTEM_PROMPT}<|im_end|>")
    assert text.endswith("<|im_start|>user\nEin Fuchs, 雪<|im_end|>\n<|im_start|>assistant\n")


def test_an_empty_answer_leaves_the_prompt(model_dir, monkeypatch):
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", lambda self, input_ids, **_: input_ids)
    assert enhance.enhance("a fox", model_dir, "cpu") == "a fox"


def test_full_gpu_memory_is_one_clear_line(model_dir, monkeypatch):
    def generate(self, **_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", generate)
    with pytest.raises(ValueError, match="does not fit into GPU memory"):
        enhance.enhance("a fox", model_dir, "cpu")


def test_the_command_prints_both_prompts(model_dir, capsys):
    words = ["--prompt", "a fox", "--model", str(model_dir), "--device", "cpu", "--max_new_tokens", "8", "--seed", "1"]
    assert enhance.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "original prompt: a fox"
    assert lines[1].startswith("enhanced prompt: ")
    assert len(lines) == 2


def test_a_model_that_cannot_be_had_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text("{}")
    for model in (tmp_path, tmp_path / "missing", "nobody/no-such-model"):
        assert enhance.main(["--prompt", "a fox", "--model", str(model), "--device", "cpu"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert f"the prompt enhancer's model {model} cannot be loaded: " in said[0]


def test_a_model_without_a_chat_template_is_refused(model_dir, tmp_path):
    Qwen2ForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        enhance.enhance("a fox", tmp_path, "cpu")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--prompt a --max_new_tokens 0",
        "--prompt a --seed x",
        "--prompt a --device gpu",
        "--prompt a --device cuda:99",
    ],
)
def test_bad_flags_are_one_line(words, capsys):
    assert enhance.main(words.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("python -m skyreels_fast.enhance: error: ")


def test_a_damaged_model_is_one_line(model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    assert enhance.main(["--prompt", "a fox", "--model", str(tmp_path / "model"), "--device", "cpu"]) == 2
    assert "cannot be loaded: " in capsys.readouterr().err.splitlines()[-1]
