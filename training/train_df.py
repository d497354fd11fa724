"""Trains the bundled model: a small diffusion forcing DiT together with its text encoder, on clips encoded beforehand.

`python -m training.train_df --vae runs/vae --out runs/df --minutes 10` renders and encodes the clips on the device,
trains, and ends with a table of how well samples show what their prompts say.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import DiT
from skyreels_fast.vae import VAE
from training.data import FRAMES, HEIGHT, WIDTH
from training.evaluate import evaluate
from training.latents import Clips, encode_clips
from training.noising import Example, make_example
from training.optim import Clock, Log, Master, parameters, parse_run
from training.text import TEXT_LEN, build_encoder, encode_text, prompt_ids, unconditional_ids
from training.train_vae import load_vae

UNCONDITIONAL = 0.1
SHORTER = 0.15  # of the batches hold fewer latent frames than the longest, and more examples
SHORTER_FIRST = 0.7  # as much in the first FIRST of the time, when the model learns what single frames look like
FIRST = 0.15
MOST_TIMES = 6  # a short batch has at most so many times the examples
WITH_END = 0.05  # of the batches have an end image
OUTER = r"shared|relative_attention_bias"  # tables, whose rows learn one by one
IMPLIED = ("patch_size", "window_size", "qk_norm", "cross_attn_norm")  # what a published config.json leaves out


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    return TransformerConfig(
        model_type="t2v",
        in_dim=16,
        dim=args.dim,
        ffn_dim=4 * args.dim,
        num_heads=max(1, args.dim // 64),
        num_layers=args.layers,
        text_dim=args.text_dim,
        text_len=TEXT_LEN,
    )


def init_weights(dit: DiT) -> None:
    """Xavier for the projections, small normal for the conditions, a head that says zero."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(dit.patch_embedding.weight.flatten(1))
    for sequence in (dit.text_embedding, dit.time_embedding):
        for module in sequence:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(dit.head.head.weight)


class Model(nn.Module):
    """DiT and text encoder as one; on whole windows the blocks run compiled, where that is asked for and works."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.dit = DiT(transformer_config(args))
        self.text = build_encoder(args.text_dim)
        init_weights(self.dit)
        self.compiled: list[Callable[..., Tensor]] | None = None

    def compile_blocks(self) -> None:
        """Compile one block for one shape; the others run the same code."""
        torch._dynamo.config.suppress_errors = True
        self.compiled = [torch.compile(block, dynamic=False) for block in self.dit.blocks]

    def velocity(self, noised: Tensor, timestep: Tensor, text: Tensor, blocks: list | None) -> Tensor:
        context = self.dit.encode_context(text)
        x, e, e0, grid = self.dit.embed(noised, timestep)
        return self.dit.head(self.dit.run_blocks(x, e0, context, grid, blocks=blocks), e, grid)

    def loss(self, example: Example, ids: Tensor, *, whole: bool) -> Tensor:
        """Mean squared error of the velocity over the frames that are learnt."""
        text = encode_text(self.text, ids)
        predicted = self.velocity(example.noised, example.timestep, text, self.compiled if whole else None)
        error = (predicted.float() - example.velocity).square().mean((1, 3, 4), keepdim=True) * example.learnt
        return error.sum() / example.learnt.sum().clamp_min(1)


class Batches:
    """Endless training batches: examples with their token ids."""

    def __init__(self, first: Clips, mid: Clips, generator: torch.Generator, batch: int) -> None:
        self.first, self.mid, self.generator, self.batch = first, mid, generator, batch
        self.longest = first.latents.shape[2]
        self.ids = prompt_ids().to(generator.device)

    def shape(self, step: int, progress: float) -> tuple[int, bool]:
        """(latent frames, end image) of batch `step`; drawn on the host, so that the device is not waited for."""
        chance, length = torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist()
        if chance < (SHORTER_FIRST if progress < FIRST else SHORTER):
            return 1 + int(length**2 * (self.longest - 1)), False
        return self.longest, chance > 1 - WITH_END

    def draw(self, frames: int, end: bool) -> tuple[Example, Tensor]:
        n = self.batch * min(MOST_TIMES, self.longest // frames)
        example = make_example(self.first, self.mid, n, frames, end, self.generator)
        dropped = torch.rand(n, 1, generator=self.generator, device=self.ids.device) < UNCONDITIONAL
        blank = unconditional_ids(n, self.generator)
        return example, torch.where(dropped, blank, self.ids[example.prompt])


def encode_all(vae: VAE, args: argparse.Namespace, generator: torch.Generator) -> tuple[Clips, Clips]:
    """Clips that start at their video's first frame, and half as many from later on."""
    options = {"frames": args.frames, "canvas": (args.height, args.width), "batch": args.encode_batch}
    seconds = 60 * args.encode_minutes
    first = encode_clips(vae, args.clips * 2 // 3, seconds * 2 / 3, "first", generator, **options)
    mid = encode_clips(vae, args.clips // 3, seconds / 3, "mid", generator, **options)
    values = first.latents.float()
    print(
        f"{len(first.prompt)} first and {len(mid.prompt)} mid clips, latents {tuple(values.shape[1:])}, "
        f"mean {values.mean():.3f}, std {values.std():.3f}",
        flush=True,
    )
    return first, mid


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    model = Model(args).to(args.device, dtype)
    modules = {"dit": model.dit, "text": model.text}
    master = Master(modules, outer=args.outer, weight_decay=args.weight_decay, ema=args.ema)
    spent_s = 0.0
    if args.resume:
        spent_s = master.load(args.resume)["elapsed_s"]
        generator.manual_seed(args.seed + master.steps)
    print(f"{parameters([model.dit]) / 1e6:.2f} M + {parameters([model.text]) / 1e6:.2f} M parameters", flush=True)
    vae = load_vae(args.vae, args.device, dtype)
    batches = Batches(*encode_all(vae, args, generator), generator, args.batch)
    if args.compile:
        model.compile_blocks()
    log = Log(args.out / "train.jsonl", fresh=args.resume is None)
    clock = Clock(args.minutes, args.session_minutes, spent_s)
    loop(model, vae, master, batches, clock, log, args)
    save(master, model, clock, args)
    master.swap()
    evaluate(model.dit, model.text, vae, log, args, full=True)


def save(master: Master, model: Model, clock: Clock, args: argparse.Namespace) -> None:
    config = {name: value for name, value in asdict(model.dit.config).items() if name not in IMPLIED}
    master.save(args.out, {"elapsed_s": clock.elapsed_s, "config": config})


def loop(model: Model, vae: VAE, master: Master, batches: Batches, clock: Clock, log: Log, args) -> None:
    saved, began, first_step = time.perf_counter(), time.perf_counter(), master.steps
    while not clock.over and master.steps < args.steps:
        step = master.steps
        frames, end = batches.shape(step, clock.progress)
        example, ids = batches.draw(frames, end)
        loss = model.loss(example, ids, whole=frames == batches.longest and not end)
        loss.backward()
        rate = clock.rate(args.lr, step, args.warm_up)
        norm = master.step(rate, args.adamw * rate)
        if step % args.log_every == 0:
            seconds = (time.perf_counter() - began) / (step + 1 - first_step)
            shown = {"loss": loss.detach(), "grad_norm": norm, "seconds_per_step": seconds}
            log(step=step, elapsed_s=clock.elapsed_s, frames=frames, **shown)
        if time.perf_counter() - saved > args.save_seconds:
            save(master, model, clock, args)
            master.swap()
            evaluate(model.dit, model.text, vae, log, args, full=False)
            master.swap()
            saved = time.perf_counter()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="directory that train_vae wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, sessions together, encoding aside")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--text_dim", type=int, default=128)
    parser.add_argument("--clips", type=int, default=12000, help="to encode at most, two thirds from frame 0")
    parser.add_argument("--encode_minutes", type=float, default=1.5)
    parser.add_argument("--encode_batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.2e-2)
    parser.add_argument("--outer", default=OUTER)
    parser.add_argument(
        "--adamw", type=float, default=0.15, help="AdamW's rate for tables and vectors, in units of --lr"
    )
    parser.add_argument("--warm_up", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--compile", action="store_true", help="compile the DiT for whole windows")
    parser.add_argument("--prompts", type=int, default=40, help="of the evaluation")
    parser.add_argument("--inference_steps", type=int, default=30)
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[3.0, 5.0], help="first: in all tables")
    parser.add_argument("--shift", type=float, nargs="+", default=[5.0, 8.0], help="likewise")
    parser.add_argument("--long_frames", type=int, default=145)
    parser.add_argument("--overlap", type=int, default=17, help="pixel frames between the windows of long videos")
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--save_seconds", type=float, default=150.0)
    return parse_run(parser, argv)


if __name__ == "__main__":
    train(parse_args())
