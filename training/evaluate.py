"""Samples from the model in training, on the device and many prompts at once, and what the judge says of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import product

import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from benchmarks.adherence import spread_prompts, table
from benchmarks.judge import judge, judge_image, judge_long
from skyreels_fast.dit import DiT
from skyreels_fast.sampling.timesteps import hold, sigma_schedule, timestep_matrix, timestep_schedule
from skyreels_fast.sampling.unipc import UniPC
from skyreels_fast.sampling.windows import latent_frames
from skyreels_fast.vae import VAE
from training.data import sample_batch
from training.optim import Log
from training.text import encode_text, prompt_ids

JUDGED = ("colour", "shape", "motion", "background")


class Sampler:
    """Renders prompts in one batch, guided against the empty prompt, as the pipeline does one by one."""

    def __init__(
        self,
        dit: DiT,
        text: UMT5EncoderModel,
        vae: VAE,
        args: argparse.Namespace,
        guidance_scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        self.dit, self.text, self.vae, self.args = dit, text, vae, args
        self.guidance_scale = args.guidance_scale[0] if guidance_scale is None else guidance_scale
        self.shift = args.shift[0] if shift is None else shift
        self.latents = latent_frames(args.frames)
        self.size = (args.height // 8, args.width // 8)

    def window(self, prompts: list[str], given: Tensor | None, ar_step: int, generator: torch.Generator) -> Tensor:
        """Latents [n,16,F,h,w] of one window that starts with the latents `given` [n,16,p,h,w]."""
        args, n, prefix = self.args, len(prompts), 0 if given is None else given.shape[2]
        levels = timestep_schedule(args.inference_steps, self.shift)
        schedule = hold(timestep_matrix(self.latents, levels, ar_step=ar_step, ready=prefix), prefix, False)
        x = torch.randn(n, 16, self.latents, *self.size, generator=generator, device=generator.device)
        if given is not None:
            x[:, :, :prefix] = given
        rows = torch.tensor(schedule.timesteps, device=x.device)
        solver = UniPC(schedule, sigma_schedule(args.inference_steps, self.shift), x.device)
        ids = prompt_ids(prompts + [""] * n).to(x.device)
        context = self.dit.encode_context(encode_text(self.text, ids))
        for row in range(len(rows)):
            both = self.dit(x.repeat(2, 1, 1, 1, 1), rows[row].expand(2 * n, -1), context)
            cond, uncond = both.chunk(2)
            x = solver.step(row, uncond + self.guidance_scale * (cond - uncond), x)
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to video [n,3,T,H,W] in [-1,1], a few at a time."""
        return torch.cat([self.vae.decode(part) for part in latents.split(8)])

    @torch.inference_mode()
    def render(
        self,
        prompts: list[str],
        generator: torch.Generator,
        *,
        image: Tensor | None = None,
        ar_step: int = 0,
        frames: int | None = None,
    ) -> np.ndarray:
        """uint8 [n,T,H,W,3]; image [n,3,1,H,W] in [-1,1] starts the videos; `frames` beyond one window come by windows
        that take up the last frames of the one before."""
        given, overlap = None if image is None else self.vae.encode(image), self.args.overlap
        video = self.decode(self.window(prompts, given, ar_step, generator))
        while video.shape[2] < (frames or 0):
            given = self.vae.encode(video[:, :, -overlap:])
            video = torch.cat([video, self.decode(self.window(prompts, given, ar_step, generator))[:, :, overlap:]], 2)
        return ((video + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def evaluate(dit: DiT, text: UMT5EncoderModel, vae: VAE, log: Log, args: argparse.Namespace, *, full: bool) -> None:
    """Print how many of the benchmark's prompts come out right; `full` for every way of sampling, with rows."""
    dit.eval()
    chosen = spread_prompts(args.prompts)
    for name, rows, frames in _runs(Sampler(dit, text, vae, args), chosen, args, full):
        if full:
            print(f"\n{name}\n{table(rows)}", flush=True)
        if name == "sync":
            _contact_sheet(frames, args)
        shares = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if isinstance(rows[0][key], bool)}
        log(event=name, **{k: v for k, v in shares.items() if k != "heldout"})
    for scale, shift in product(args.guidance_scale, args.shift) if full else ():
        rows, _ = _judged(Sampler(dit, text, vae, args, scale, shift), chosen, "judge")
        shares = {key: float(np.mean([row[key] for row in rows])) for key in JUDGED}
        log(event="settings", guidance_scale=scale, shift=shift, **shares)
    dit.train()


def _judged(sampler: Sampler, chosen: list[tuple[str, bool]], how: str, **options) -> tuple[list[dict], np.ndarray]:
    generator = torch.Generator(sampler.args.device).manual_seed(0)
    prompts = [prompt for prompt, _ in chosen]
    verdicts = {"judge": judge, "judge_long": judge_long}
    if how == "judge_image":
        canvas = (sampler.args.height, sampler.args.width)
        video, _, _ = sample_batch(len(prompts), generator, prompts=prompts, frames=1, canvas=canvas)
        stills = ((video[:, :, 0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        frames = sampler.render(prompts, generator, image=video, **options)
        found = [judge_image(f, still, prompt) for f, still, prompt in zip(frames, stills, prompts, strict=True)]
    else:
        frames = sampler.render(prompts, generator, **options)
        found = [verdicts[how](f, prompt) for f, prompt in zip(frames, prompts, strict=True)]
    rows = [{"prompt": p, "heldout": h, **verdict} for (p, h), verdict in zip(chosen, found, strict=True)]
    return rows, frames


def _runs(
    sampler: Sampler, chosen: list[tuple[str, bool]], args: argparse.Namespace, full: bool
) -> Iterator[tuple[str, list[dict], np.ndarray]]:
    kinds: dict[str, tuple[str, dict]] = {"sync": ("judge", {})}
    if full:
        long = {"frames": args.long_frames}
        kinds |= {
            "async": ("judge", {"ar_step": 2}),
            "image": ("judge_image", {}),
            "long": ("judge_long", long),
            "long async": ("judge_long", {**long, "ar_step": 2}),
        }
    for name, (how, options) in kinds.items():
        began = time.perf_counter()
        rows, frames = _judged(sampler, chosen, how, **options)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        yield name, rows, frames


def _contact_sheet(frames: np.ndarray, args: argparse.Namespace) -> None:
    """samples.png: twelve videos as rows of five frames."""
    picked = frames[:12, np.linspace(0, frames.shape[1] - 1, 5).round().astype(int)]
    rows = picked.transpose(0, 2, 1, 3, 4).reshape(-1, 5 * picked.shape[3], 3)
    iio.imwrite(args.out / "samples.png", rows)
