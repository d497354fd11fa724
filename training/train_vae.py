"""Trains the bundled model's VAE on rendered clips, each rendered on the device when it is needed.

`python -m training.train_vae --out runs/vae --minutes 6` ends with Wan2.1_VAE.pth and vae_config.json in `--out`,
beside the checkpoint that `--resume` takes up and the log train.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skyreels_fast.config import LATENT_CHANNELS
from skyreels_fast.vae import VAE
from training.data import FRAMES, HEIGHT, MAX_START, WIDTH, attribute_table, draw_scenes, render, trajectory
from training.optim import Clock, Log, Master, parameters, parse_run
from training.prompts import ALL_SCENES, HELDOUT_SCENES
from training.whiten import Moments, rewrite

LOG_VARIANCE = (-12.0, 8.0)


def build(base_dim: int) -> VAE:
    """A VAE with identity latent statistics, initialised so that it starts as a low-noise autoencoder."""
    vae = VAE(base_dim, [0.0] * LATENT_CHANNELS, [1.0] * LATENT_CHANNELS)
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            half.middle[1].proj.weight.zero_()
            half.middle[1].proj.bias.zero_()
        vae.conv1.bias[LATENT_CHANNELS:] = -4.0
    return vae


def clips(
    n: int, frames: int, generator: torch.Generator, canvas: tuple[int, int], crop: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """(video [n,3,frames,H,W], coverage [n,1,frames,H,W]) of all combinations, from anywhere in their videos.

    With `crop` (height, width) only a window of the canvas, drawn so that the shape crosses it.
    """
    scenes = draw_scenes(n, generator, table=attribute_table(ALL_SCENES), canvas=canvas)
    start = torch.randint(0, MAX_START, (n,), generator=generator, device=generator.device)
    position = trajectory(scenes, frames, start, canvas)
    if crop is not None:
        window = torch.tensor(crop[::-1], device=generator.device)
        corner = position[:, frames // 2] - torch.rand(n, 2, generator=generator, device=generator.device) * window
        room = torch.tensor(canvas[::-1], device=generator.device) - window
        position = position - corner.round().clamp(min=torch.zeros_like(room), max=room)[:, None]
    return render(scenes, position, crop or canvas)


def objective(
    vae: VAE, video: Tensor, covered: Tensor, generator: torch.Generator, args: argparse.Namespace
) -> dict[str, Tensor]:
    """L1 + MSE, heavier on and around the shape, + `args.kl` times the mean KL divergence per latent value.

    The encoder sees the video with noise of up to `args.noise`, so that decoding and encoding again does not drift.
    """
    device, dtype = video.device, vae.conv2.weight.dtype
    level = args.noise * torch.rand(len(video), 1, 1, 1, 1, generator=generator, device=device)
    noisy = video + level * torch.randn(video.shape, generator=generator, device=device)
    mean, log_variance = vae.encode_moments(noisy.to(dtype))
    mean, log_variance = mean.float(), log_variance.float().clamp(*LOG_VARIANCE)
    draw = torch.randn(mean.shape, generator=generator, device=device)
    decoded = vae.decode_raw((mean + draw * (0.5 * log_variance).exp()).to(dtype)).float()
    near = F.max_pool3d(covered, (1, 7, 7), stride=1, padding=(0, 3, 3)) > 0
    weight = 1 + (args.foreground - 1) * near
    error = decoded - video
    reconstruction = (weight * (error.abs() + error.square())).sum() / (3 * weight.sum())
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"loss": reconstruction + args.kl * kl, "l1": error.detach().abs().mean(), "kl": kl.detach()}


def shape_of_step(step: int, progress: float, args: argparse.Namespace) -> tuple[int, int, tuple[int, int] | None]:
    """(clips, frames, crop) of a batch, all of about as many pixels.

    Short clips, crops and whole frames by turns; every eighth batch single images; in the last quarter the crops
    give way to long clips.
    """
    if step % 8 == 7:
        return args.batch * args.frames, 1, None
    if step % 2:
        return args.batch, args.frames, None
    if progress > 0.75:
        return max(1, args.batch * args.frames // args.long_frames), args.long_frames, None
    return args.batch * args.height * args.width // (args.crop * args.crop), args.frames, (args.crop, args.crop)


def train_step(vae: VAE, master: Master, batch: tuple, rate: float, generator: torch.Generator, args) -> dict:
    n, frames, crop = batch
    video, covered = clips(n, frames, generator, (args.height, args.width), crop)
    losses = objective(vae, video, covered, generator, args)
    losses["loss"].backward()
    losses["grad_norm"] = master.step(rate, rate * args.adamw)
    return losses


def pick_layout(vae: VAE, generator: torch.Generator, args: argparse.Namespace) -> None:
    """Move the weights to whichever memory layout runs a training step faster here."""
    if args.layout == "auto":
        seconds = {layout: _step_seconds(vae, layout, generator, args) for layout in ("contiguous", "channels_last")}
        args.layout = min(seconds, key=seconds.get)
        print("seconds a step:", seconds, flush=True)
    lay_out(vae, args.layout)


def lay_out(vae: VAE, layout: str) -> None:
    """Put the weights in a memory layout, "contiguous" or "channels_last", which the convolutions then follow."""
    if layout == "channels_last":
        vae.lay_out()
        return
    for param in vae.parameters():
        param.data = param.data.contiguous()


def _step_seconds(vae: VAE, layout: str, generator: torch.Generator, args: argparse.Namespace) -> float:
    lay_out(vae, layout)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        video, covered = clips(args.batch, args.frames, generator, (args.height, args.width))
        objective(vae, video, covered, generator, args)["loss"].backward()
        vae.zero_grad(set_to_none=True)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[-1]


def load_vae(directory: Path, device: str, dtype: torch.dtype) -> VAE:
    """The VAE that train_vae left in `directory`."""
    weights = torch.load(directory / "Wan2.1_VAE.pth", weights_only=True)
    vae = VAE(VAE.base_dim_of(weights), **json.loads((directory / "vae_config.json").read_text()))
    vae.load_state_dict(weights)
    vae.to(device, dtype).eval().requires_grad_(False)
    if device.startswith("cuda"):
        lay_out(vae, "channels_last")
    return vae


@torch.no_grad()
def psnr_db(vae: VAE, args: argparse.Namespace, trips: int = 1, n: int = 16) -> float:
    """PSNR of held-out clips after `trips` times encode and decode, frame by frame as inference does it."""
    generator = torch.Generator(args.device).manual_seed(1)
    canvas = (args.height, args.width)
    scenes = draw_scenes(n, generator, table=attribute_table(HELDOUT_SCENES), canvas=canvas)
    video = out = render(scenes, trajectory(scenes, args.frames, 0, canvas), canvas)[0]
    for _ in range(trips):
        out = vae.decode(vae.encode(out))
    return -10 * ((out - video) / 2).square().mean().log10().item()


@torch.no_grad()
def whiten(vae: VAE, args: argparse.Namespace) -> None:
    """Rewrite the latents as uncorrelated channels of unit variance, measured on `args.statistics` clips."""
    generator = torch.Generator(args.device).manual_seed(2)
    moments, n = Moments(args.device), min(16, args.statistics)
    for _ in range(args.statistics // n):
        video, _ = clips(n, args.frames, generator, (args.height, args.width))
        mean, log_variance = vae.encode_moments(video.to(vae.conv2.weight.dtype))
        moments.add(mean, log_variance.clamp(*LOG_VARIANCE))
    rewrite(vae, *moments.whitening())


def finish(vae: VAE, args: argparse.Namespace, log: Log) -> None:
    """Write the averaged weights (float32 in `vae`) as the pipeline loads them, and measure them."""
    whiten(vae, args)
    weights = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in vae.state_dict().items()}
    torch.save(weights, args.out / "Wan2.1_VAE.pth")
    statistics = {"latents_mean": vae.latents_mean, "latents_std": vae.latents_std}
    (args.out / "vae_config.json").write_text(json.dumps(statistics) + "\n")
    vae.to(getattr(torch, args.dtype))
    log(event="final", psnr_db=psnr_db(vae, args), psnr_5_trips_db=psnr_db(vae, args, trips=5))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    if args.whiten:
        finish(load_vae(args.whiten, args.device, torch.float32), args, Log(args.out / "train.jsonl"))
        return
    clock = Clock(args.minutes, args.session_minutes)
    vae = build(args.base_dim).to(args.device, getattr(torch, args.dtype))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    pick_layout(vae, generator, args)
    master = Master({"vae": vae}, weight_decay=args.weight_decay, ema=args.ema)
    if args.resume:
        clock = Clock(args.minutes, args.session_minutes, master.load(args.resume)["elapsed_s"])
        generator.manual_seed(args.seed + master.steps)
    print(f"{parameters([vae]) / 1e6:.2f} M parameters, {args.layout}, {args.dtype}", flush=True)
    log, saved = Log(args.out / "train.jsonl", fresh=args.resume is None), time.perf_counter()
    while not clock.over and master.steps < args.steps:
        step = master.steps
        batch = shape_of_step(step, clock.progress, args)
        losses = train_step(vae, master, batch, clock.rate(args.lr, step, args.warm_up), generator, args)
        if step % args.log_every == 0:
            log(step=step, elapsed_s=clock.elapsed_s, batch=batch, **losses)
        if time.perf_counter() - saved > args.save_seconds:
            master.save(args.out, {"elapsed_s": clock.elapsed_s})
            saved = time.perf_counter()
    master.save(args.out, {"elapsed_s": clock.elapsed_s})
    vae.eval().float()
    master.swap()
    finish(vae, args, log)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="of the whole run, sessions together")
    parser.add_argument("--whiten", type=Path, default=None, help="no training: whiten the VAE in this directory")
    parser.add_argument("--base_dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="whole clips; other batches take as many pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--long_frames", type=int, default=FRAMES)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--crop", type=int, default=64, help="height and width of the cropped batches")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--adamw", type=float, default=0.3, help="AdamW's rate for vectors, in units of --lr")
    parser.add_argument("--warm_up", type=int, default=100)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--kl", type=float, default=3e-5, help="weight of the KL divergence per latent value")
    parser.add_argument("--noise", type=float, default=0.04, help="largest input noise")
    parser.add_argument("--foreground", type=float, default=4.0, help="weight of pixels on and around the shape")
    parser.add_argument("--layout", choices=("auto", "contiguous", "channels_last"), default="auto")
    parser.add_argument("--statistics", type=int, default=256, help="clips to whiten the latents by")
    parser.add_argument("--log_every", type=int, default=20)
    parser.add_argument("--save_seconds", type=float, default=120.0)
    return parse_run(parser, argv)


if __name__ == "__main__":
    train(parse_args())
