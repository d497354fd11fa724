"""Our own video, timed stage by stage through `skyreels_fast.Pipeline` itself."""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import skyreels_fast as sf
from benchmarks import harness
from benchmarks.floor import IMAGE_TOKENS
from benchmarks.harness import Timing
from benchmarks.meter import Meter, block_runs
from benchmarks.models import MODELS, RandomCheckpoint, Work, config
from skyreels_fast.checkpoint import Checkpoint
from skyreels_fast.config import VAE_STRIDE
from skyreels_fast.dit.model import IMAGE_DIM
from skyreels_fast.parallel import Degrees

# Of a prompt and a negative prompt, as real ones have; a model that takes fewer gets as many as it takes.
CONTEXT_TOKENS = (100, 126)
# About 100 tokens.
PROMPT = " and ".join(["a red circle moving right on a dark blue background"] * 9)
NEGATIVE_PROMPT = "a blue star standing still on a gray background"


class Prepared:
    """A pipeline and the request that will be timed on it; nothing is loaded yet."""

    def __init__(self, work: Work, pipe: sf.Pipeline, request: sf.Request, warm_up: sf.Request | None) -> None:
        self.work, self.pipe, self.device = work, pipe, pipe.device
        self._plan = pipe.plan(request)
        self._warm_up = None if warm_up is None else pipe.plan(warm_up)

    def describe(self) -> str:
        return self._plan.describe()

    def measure(self) -> dict[str, Any]:
        """Row values of one video. Raises RuntimeError where its latents are not finite."""
        once, encodes_text = {}, self._plan.settings.context is None
        if encodes_text:
            self.pipe.checkpoint.text_weights()  # random ones take long to make, which is no part of the text stage
        meter = Meter(self.device)
        if self._warm_up is not None:
            self._say("warm-up, one step:")
            first, _ = self._render(self._warm_up, meter)
            # What a pipeline does once it has done now, in the order in which a command does it.
            once = {stage: (first.timings[stage], meter.peaks[stage]) for stage in ("text", "load")}
            meter = Meter(self.device)
            _empty_cache(self.device)
        self._say("timed:")
        with block_runs() as runs:
            result, total_s = self._render(self._plan, meter)
        if not all(latents.isfinite().all() for latents in result.latents):
            raise RuntimeError("the latents are not finite: their time means nothing")
        timings = dict(result.timings)
        for stage, (seconds, peak) in once.items():
            timings[stage], meter.peaks[stage] = seconds, peak
        return {
            "attention": self.pipe.machine.attention,
            **self._steps(meter),
            "calls": self.work.branches * sum(self._plan.calls),
            "computed_calls": self.work.branches * len(runs),
            "text_s": timings["text"] if encodes_text else None,
            "vae_encode_s": self._encode(meter) if self.pipe.machine.leads else None,
            # A first decoding compiles and chooses kernels.
            "vae_decode_s": timings.get("decode") if self._warm_up is not None else None,
            "load_s": timings["load"],
            "total_s": total_s + (timings["text"] if once else -timings["load"]),
            "stages_s": timings,
            **self._memory(meter),
            **self._shared(meter),
        }

    def close(self) -> None:
        """Of several processes, all leave together."""
        if self.pipe.machine.world is not None:
            self.pipe.machine.world.close()

    def _say(self, text: str) -> None:
        if self.pipe.machine.leads:
            print(text, flush=True)

    def _shared(self, meter: Meter) -> dict[str, Any]:
        """How several processes shared the work, and each one's peaks while denoising."""
        if self.pipe.machine.world is None:
            return {}
        layout = self.pipe.machine.layout(self._plan)
        peaks = self.pipe.machine.world.each(meter.peaks["denoise"])
        return {"layout": "x".join(map(str, layout)), "ranks_peak_gib": peaks}

    def _render(self, plan: sf.Plan, meter: Meter) -> tuple[sf.pipeline.Result, float]:
        start = time.perf_counter()
        result = self.pipe(plan, stream=True, progress=meter)
        for _ in result.frames:
            pass
        meter.stage(None)
        return result, time.perf_counter() - start

    def _steps(self, meter: Meter) -> dict[str, Any]:
        first, others = meter.rows()
        timing = Timing.of(others or first)
        step = timing.median if self.work.uniform else float(np.mean(others or first))
        branches = self.work.branches
        return {
            "ms_per_forward": step * 1e3 / branches,
            "ms_per_forward_p20": timing.p20 * 1e3 / branches,
            "ms_per_forward_p80": timing.p80 * 1e3 / branches,
            "s_per_step": step,
            "first_step_s": float(np.median(first)),
            "step_ms": [second * 1e3 for second in others],
        }

    @torch.inference_mode()
    def _encode(self, meter: Meter) -> float:
        """Seconds to encode a video of the work's size that comes in chunks."""
        _, vae = self.pipe._load()  # the very VAE that the pipeline uses, in its dtype and layout
        frames, size = self.work.frames, (self.work.height, self.work.width)
        meter.stage("encode a video")
        with self.pipe.placement.use(vae):
            chunk = torch.rand(1, 3, VAE_STRIDE[0], *size, device=self.device) * 2 - 1
            vae.encode_stream([chunk[:, :, :1], chunk])  # the first call chooses its kernels
            harness.synchronize(self.device)
            start = time.perf_counter()
            vae.encode_stream(chunk[:, :, :1] if i == 0 else chunk for i in range((frames - 1) // VAE_STRIDE[0] + 1))
            harness.synchronize(self.device)
            seconds = time.perf_counter() - start
        meter.stage(None)
        return seconds

    def _memory(self, meter: Meter) -> dict[str, Any]:
        """Peaks over the whole video (its encoding apart) and by stage; host memory of this process so far."""
        video = {stage: peak for stage, peak in meter.peaks.items() if stage != "encode a video"}
        known = [peak for peak in video.values() if None not in peak]
        peaks = [max(values) for values in zip(*known, strict=True)] or [None, None]
        modules = dict(zip(("dit", "vae"), self.pipe._load(), strict=True))
        return {
            "peak_allocated_gib": peaks[0],
            "peak_reserved_gib": peaks[1],
            "peaks_gib": meter.peaks,
            "weights_gib": {
                name: sum(parameter.nbytes for parameter in module.parameters()) / harness.GIB
                for name, module in modules.items()
            },
            "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / harness.GIB,
        }


def prepare(work: Work, args: argparse.Namespace, device: torch.device) -> Prepared:
    """Raises ValueError for settings that do not work out, before anything is loaded."""
    pipe = _pipeline(work, args, device)
    request = _request(work)
    if args.with_text:
        texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "context": None, "negative_context": None}
        request = replace(request, **texts)
    warm_up = None
    if not args.no_warm_up:
        frames = work.base_frames or work.frames
        one_window = {"num_frames": frames, "overlap_history": None}
        one_window |= {"base_num_frames": frames} if work.kind == "df" else {}
        plain = {"ar_step": None, "teacache": None, "teacache_thresh": None, "use_ret_steps": None}
        warm_up = replace(request, inference_steps=1, **one_window, **plain)
    return Prepared(work, pipe, request, warm_up)


def _pipeline(work: Work, args: argparse.Namespace, device: torch.device) -> sf.Pipeline:
    options = {"offload": args.offload, "vram": args.vram, "mode": work.kind, "attention": args.attention}
    if args.gpus > 1:
        options["degrees"] = Degrees(args.ulysses_degree, args.ring_degree, args.cfg_parallel)
    if args.weights is not None:
        pipe = sf.Pipeline.from_pretrained(args.weights, device, work.dtype, **options)
        _check_config(pipe.checkpoint, work)
        return pipe
    checkpoint = RandomCheckpoint.of(work.model, work.mode, device, work.dtype, text=args.with_text)
    return sf.Pipeline(checkpoint, device, work.dtype, **options)


def _check_config(checkpoint: Checkpoint, work: Work) -> None:
    """Raises ValueError for a checkpoint that is not what `work`, and so the row and the peers, take it for."""
    found, expected = checkpoint.config, work.config
    if found == expected:
        return
    names = [field.name for field in fields(found) if getattr(found, field.name) != getattr(expected, field.name)]
    differs = ", ".join(f"{name} {getattr(found, name)}, not {getattr(expected, name)}" for name in names)
    fits = [model for model in MODELS if config(model, work.mode) == found]
    advice = f"; give --model {fits[0]}" if fits else ""
    raise ValueError(f"--weights {checkpoint.root}: is no {work.model} for --mode {work.mode} ({differs}){advice}")


def _request(work: Work) -> sf.Request:
    generator = torch.Generator().manual_seed(0)
    tokens, text_dim = [min(count, work.config.text_len) for count in CONTEXT_TOKENS], work.config.text_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    options: dict[str, Any] = {}
    if work.kind == "df":
        options |= {"ar_step": work.ar_step or None, "causal_block_size": work.block, "overlap_history": work.overlap}
        options |= {"causal_attention": work.causal or None, "base_num_frames": work.base_frames or work.frames}
    if work.kind == "i2v":
        pixels = np.random.default_rng(0).integers(0, 256, (work.height, work.width, 3), dtype=np.uint8)
        options |= {"image": Image.fromarray(pixels), "clip_features": draw(1, IMAGE_TOKENS, IMAGE_DIM)}
    if work.teacache is not None:
        options |= {"teacache": True, "teacache_thresh": work.teacache, "use_ret_steps": work.use_ret_steps}
    return sf.Request(
        height=work.height,
        width=work.width,
        num_frames=work.frames,
        inference_steps=work.steps,
        guidance_scale=work.guidance,
        fps=work.fps,
        seed=0,
        context=draw(tokens[0], text_dim),
        negative_context=draw(tokens[1], text_dim),
        **options,
    )


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
