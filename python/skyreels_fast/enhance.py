"""A short prompt put into detail by a language model: `prompt_enhancer.py --prompt "..."`, installed or not
`python -m skyreels_fast.enhance --prompt "..."`."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import NoReturn

from ._values import UsageError, device_name

MODEL_ID = "Qwen/Qwen2.5-32B-Instruct"
MAX_NEW_TOKENS = 2048
SYSTEM_PROMPT = """You write the descriptions that a text-to-video model renders. You are given an idea for a short \
video and turn it into one detailed description.

- Keep everything the idea says: who or what is in it, how many, what they do, colours, places, moods, names and any \
words that are to be seen. Never contradict it.
- Add what it leaves open, chosen to fit: how the subject looks, what it does from the beginning to the end, the \
setting with its foreground and background, the light and the time of day, the framing and the movement of the camera, \
the style (a photograph in motion unless the idea says otherwise).
- Describe only what can be seen, as one continuous shot in the present tense. No sounds, no thoughts, no cuts.
- Write in English, whatever the language of the idea; names and words to be seen stay as they are.
- One paragraph of fewer than 200 words, without headings, lists, quotation marks around it or remarks about the task.

Answer with the description alone."""

_TOO_BIG = "the prompt enhancer's model {} does not fit into GPU memory: take a smaller one, or enhance on the CPU"


def enhance(
    prompt: str,
    model_id: str | Path = MODEL_ID,
    device: str = "cuda",
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int | None = None,
) -> str:
    """Let an instruction-tuned language model (one with a chat template) describe `prompt` in detail.

    The model is loaded from a directory or hub id in the type it is stored in, samples as its own generation_config
    says, and is freed before this returns. With a seed the answer repeats.

    Returns one line; the prompt itself should the model answer nothing.

    Raises ValueError: there is no such device; the model cannot be had, is none to chat with, or does not fit into
    memory.
    """
    device = device_name(device)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    # The type the weights are stored in; the option's name changed in 4.56.
    named = "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        model = AutoModelForCausalLM.from_pretrained(model_id, **{named: "auto"}).to(device).eval()
    except torch.cuda.OutOfMemoryError:
        raise ValueError(_TOO_BIG.format(model_id)) from None
    except Exception as error:  # damaged files and foreign models fail in many ways
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"the prompt enhancer's model {model_id} cannot be loaded: {said.rstrip(':')}; give the directory or "
            "Hugging Face id of an instruct model"
        ) from None
    try:
        if not tokenizer.chat_template:
            raise ValueError(f"the prompt enhancer's model {model_id} has no chat template: take an instruct model")
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer([text], return_tensors="pt").to(device)
        if seed is not None:
            torch.manual_seed(seed)
        with torch.inference_mode():
            # What else a tokenizer gives, not every model takes.
            known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            tokens = model.generate(**known, max_new_tokens=max_new_tokens)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    except torch.cuda.OutOfMemoryError:
        raise ValueError(_TOO_BIG.format(model_id)) from None
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return " ".join(answer.split()) or prompt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Print the original and the enhanced prompt; 2 if a flag is wrong or the model cannot be had."""
    script = Path(sys.argv[0]).name
    prog = script if script == "prompt_enhancer.py" else "python -m skyreels_fast.enhance"
    parser = _Parser(prog=prog, description=__doc__)
    parser.add_argument("--prompt", help="the idea, in any language")
    parser.add_argument("--model", default=MODEL_ID, help="directory or Hugging Face id (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda where there is one)")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="gives the same answer again (default: another one each time)")
    try:
        args = parser.parse_args(argv)
        if not args.prompt:
            raise UsageError("--prompt is missing: give the idea in quotes")
        if args.max_new_tokens < 1:
            raise UsageError(f"argument --max_new_tokens: {args.max_new_tokens} is not 1 or more")
        better = enhance(args.prompt, args.model, device_name(args.device), args.max_new_tokens, args.seed)
    except ValueError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"original prompt: {args.prompt}")
    print(f"enhanced prompt: {better}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
