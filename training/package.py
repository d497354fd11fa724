"""Turns trained checkpoints into the bundled model's directory, in the published layout and names, bfloat16.

`python -m training.package --vae runs/vae --df runs/df --results runs/adherence`
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import DiT
from training.card import model_card
from training.data import FPS, FRAMES, HEIGHT, WIDTH
from training.optim import load_shards
from training.prompts import save_tokenizer, write_json

ASSETS = Path(__file__).parents[1] / "python" / "skyreels_fast" / "assets" / "tiny"
PROMPT = "a red circle moving right on a dark blue background"
MODEL, TEXT, VAE = "model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
LARGEST = 32 * 2**20  # of all weights together

_TEXT_TOP = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}
_TEXT_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def published_transformer(weights: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """A DiT's weights under the published names: fused projections cut into the tensors they are made of."""
    with torch.device("meta"):
        parts = DiT(config).key_parts()
    pieces = {name: weights[name].chunk(len(targets)) for name, targets in parts.items()}
    return {t: p.contiguous() for name, targets in parts.items() for t, p in zip(targets, pieces[name], strict=True)}


def published_text(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers UMT5EncoderModel's parameters under the published names. KeyError for a name it does not have."""
    return {_text_name(name): tensor.contiguous() for name, tensor in weights.items()}


def _text_name(name: str) -> str:
    block = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
    return f"blocks.{block[1]}.{_TEXT_BLOCK[block[2]]}.weight" if block else _TEXT_TOP[name]


def split(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def package(vae: Path, df: Path, out: Path, generation: dict, results: Path | None = None) -> None:
    """Write the model directory `out` from what train_vae and train_df left.

    Raises ValueError when the weights come to more than LARGEST bytes.
    """
    config = json.loads((df / "state.json").read_text())["config"]
    weights = load_shards(df, "ema")
    out.mkdir(parents=True, exist_ok=True)
    transformer = published_transformer(split(weights, "dit."), TransformerConfig.from_dict(config))
    save_file(transformer, out / MODEL, metadata={"format": "pt"})
    torch.save(published_text(split(weights, "text.")), out / TEXT)
    for name in (VAE, "vae_config.json"):
        shutil.copyfile(vae / name, out / name)
    save_tokenizer(out / "google" / "umt5-xxl")
    write_json(out / "config.json", {"_class_name": "WanModel", **config})
    write_json(out / "generation_config.json", generation)
    (out / "README.md").write_text(model_card(config, generation, results), encoding="utf-8")
    size = sum((out / name).stat().st_size for name in (MODEL, TEXT, VAE))
    print(f"{out}: {size / 2**20:.1f} MiB of weights")
    if size > LARGEST:
        raise ValueError(f"{size} bytes of weights are more than {LARGEST}: train a smaller model")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="directory that train_vae wrote")
    parser.add_argument("--df", type=Path, required=True, help="directory that train_df wrote")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=None, help="directory of benchmarks.adherence's --out files")
    parser.add_argument("--inference_steps", type=int, default=30)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--frames", type=int, default=FRAMES)
    args = parser.parse_args(argv)
    generation = {
        "mode": "df",
        "prompt": PROMPT,
        "negative_prompt": "",
        "height": args.height,
        "width": args.width,
        "num_frames": args.frames,
        "base_num_frames": args.frames,
        "inference_steps": args.inference_steps,
        "guidance_scale": args.guidance_scale,
        "shift": args.shift,
        "fps": FPS,
    }
    package(args.vae, args.df, args.out, generation, args.results)


if __name__ == "__main__":
    main()
