"""The pipeline: prompt → context → windows → noise → denoise → latents → VAE → frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import media, ops
from ._meta import without_weights
from .checkpoint import Checkpoint
from .conditions import Conditions, Contexts, History, image_channels, load_pictures
from .config import MODES
from .dit.model import DiT
from .footprint import check_vram
from .identity import identity
from .machine import Machine, check_dtypes, checked_device
from .parallel import Degrees, meet, require
from .plan import Plan
from .request import Request, Settings, resolve
from .run import Run
from .sampling.denoise import State, denoise
from .sampling.teacache import TeaCacheSettings
from .stages import Clock, Progress
from .start import starting_latents
from .vae import VAE


@dataclass
class Result:
    """What a run gives.

    frames: uint8 [F, H, W, 3], or with stream=True an iterator of such chunks, decoded as they are asked for.
    latents: one [1, 16, f, h, w] float32 tensor a window, as handed to the VAE; fills up as a stream is read, and stays
        empty with keep_latents=False.
    timings: seconds spent in each stage so far.
    """

    plan: Plan
    frames: Tensor | Iterator[Tensor] = field(default_factory=lambda: iter(()))
    latents: list[Tensor] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.plan.settings


class Pipeline:
    """One model directory, ready to render requests. Make it with `from_pretrained`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool,
        mode: str | None,
        vram: float | None = None,
        attention: str | None = None,
        vae_dtype: torch.dtype | None = None,
        degrees: Degrees | None = None,
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.mode = checkpoint, device, dtype, mode
        self.vae_dtype = vae_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.machine = Machine(
            checkpoint.config, device, dtype, offload=offload, vram=vram, attention=attention, degrees=degrees
        )
        self.placement = self.machine.placement
        self.conditions = Conditions(checkpoint, self.placement, dtype)
        self._dit: DiT | None = None
        self._vae: VAE | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        offload: bool = False,
        mode: str | None = None,
        vram: float | None = None,
        attention: str | None = None,
        vae_dtype: torch.dtype | None = None,
        degrees: Degrees | None = None,
    ) -> Pipeline:
        """Open a model directory, hub id, or "tiny" (the bundled model); weights are read when first needed.

        Args:
            offload: weights stay in host memory, and each block of the transformer comes to the GPU as it is needed.
            vram: GiB of GPU memory to keep to: while denoising as many blocks stay there as fit, the others come as
                with `offload`; where it is too little to decode whole frames the VAE takes them in overlapping tiles.
            mode: "df" (diffusion forcing) or "t2v", which an image-to-video model runs as "i2v"; None takes what the
                model was made for. Where nothing in the directory tells, requests do: "df" where they ask for it.
            attention: the backend of `ops.attention`; None: the fastest that the device has.
            vae_dtype: what the VAE computes in; None takes bfloat16 on a GPU, float32 on the CPU. On a GPU convolutions
                in float32 are TF32 unless `torch.backends.cudnn.allow_tf32` is False.
            degrees: several processes render together (`parallel`): every one makes the same pipeline, on a device of
                its own, and the same calls; the frames come out in rank 0. Each reads its streams to the end, and
                ends if one of them fails: the others wait for it. None: this one renders alone.

        Raises:
            ValueError: the directory is unknown or incomplete, a tensor is missing, unknown or misshapen,
                or the model cannot run in `mode`; or there is no such device; or `vram` is no budget for it; or a dtype
                is none of bfloat16, float16 and float32.
        """
        device = checked_device(device)
        check_dtypes(dtype=dtype, vae_dtype=vae_dtype)
        check_vram(vram, device, offload)
        ops.choose_attention(attention, device, dtype)
        if degrees is not None:
            require(device)
            meet()  # before the others can wait for one that fails below
        checkpoint = Checkpoint.open(path_or_id)
        checkpoint.require("vae")
        with without_weights():
            checkpoint.check_transformer(DiT(checkpoint.config))
            checkpoint.check_vae(_vae_of(checkpoint))
        options = {"offload": offload, "vram": vram, "attention": attention, "vae_dtype": vae_dtype}
        options |= {"degrees": degrees}
        return cls(checkpoint, device, dtype, mode=_mode(checkpoint, mode), **options)

    def plan(self, request: Request) -> Plan:
        """Fill in the model's defaults and lay out the windows; nothing is loaded. Raises ValueError on bad input."""
        source = None if request.video is None else media.VideoSource(request.video)
        source_frames = source.frame_count if source else 0
        checkpoint = self.checkpoint
        settings = resolve(
            request,
            mode=self.mode or ("df" if request.asks_diffusion_forcing else "t2v"),
            defaults=checkpoint.generation_config,
            resolution_hint=checkpoint.resolution_hint(),
        )
        if source and (fault := source.break_after(source_frames)):
            settings = replace(settings, notes=(*settings.notes, f"video={str(request.video)!r}: {fault}"))
        plan = Plan.of(settings, source_frames)
        notes = self.conditions.check(settings, plan.guided, plan.prompts)
        if notes:  # a new plan lays out its schedules anew
            plan = replace(plan, settings=replace(settings, notes=(*settings.notes, *notes)))
        self._teacache(settings)
        self.machine.check(plan)
        return plan

    def __call__(
        self,
        request: Request | Plan,
        stream: bool = False,
        progress: Progress | None = None,
        run: Run | str | Path | None = None,
        keep_latents: bool = True,
    ) -> Result:
        """Render a request, or the plan of one.

        Args:
            stream: give `Result.frames` as an iterator of uint8 chunks [n, H, W, 3]; all work happens as it is read.
            run: a folder to which everything is saved as it is done, and of which nothing that is there is done again:
                call with the same request and folder after a crash, and the same frames come out, of the seed that was
                drawn where the request has none. Yours to delete.
                Of several processes the first one keeps it.
            keep_latents: whether `Result.latents` holds every window's; without it host memory is the same for any
                length, as long as the stream's chunks are let go.

        Raises:
            ValueError: a bad setting, or a run of another request, before any weight is loaded.
        """
        saved = run if isinstance(run, Run) else Run(run if self.machine.leads else None)
        if isinstance(request, Request) and request.seed is None and (seed := saved.seed) is not None:
            request = replace(request, seed=seed)
        plan = request if isinstance(request, Plan) else self.plan(request)
        if saved.directory is not None:
            saved.begin(self.identity(plan))
        result = Result(plan)
        result.frames = self._render(plan, result, progress or Progress(), saved, keep_latents)
        if saved is not run:
            result.frames = saved.released_after(result.frames)
        if not stream:
            none = torch.empty(0, plan.settings.height, plan.settings.width, 3, dtype=torch.uint8)
            result.frames = torch.cat([none, *result.frames])
        return result

    def identity(self, plan: Plan) -> dict[str, Any]:
        """What decides about the frames of a plan on this pipeline, as JSON: see `Run.begin`."""
        dtypes = {"dtype": self.dtype, "vae_dtype": self.vae_dtype}
        return identity(self.checkpoint, plan.settings, self.device, dtypes, self.machine.attention)

    @torch.no_grad()
    def _render(self, plan: Plan, result: Result, progress: Progress, run: Run, keep_latents: bool) -> Iterator[Tensor]:
        settings, machine = plan.settings, self.machine
        team = machine.team(plan)
        clock = Clock(self.device, result.timings, progress)
        pictures = load_pictures(settings)
        with clock("text"):
            texts = team.first(lambda: self.conditions.texts(settings, plan.guided, plan.prompts))
        with clock("image"):
            image = team.first(lambda: self.conditions.image_tokens(settings, pictures))
        with clock("load"):
            dit, vae = self._load()
        needs = machine.footprint(plan)
        contexts = Contexts(lambda text: dit.encode_context(text.to(self.device), image))
        noise, condition_noise = (torch.Generator(self.device).manual_seed(settings.seed + i) for i in (0, 1))
        history = History(settings.overlap_history or 0)
        run.attach((noise, condition_noise), history)
        done = team.agree(run.windows)

        if settings.video is not None and not done and team.leads:
            for frames in media.VideoSource(settings.video).fitted(settings.height, settings.width):
                history.add(media.from_uint8(frames))
                yield frames
        for index, window in list(enumerate(plan.windows))[done:]:
            with clock("encode"), self.placement.use(vae):
                # Not shared out: to send the few frames that are given round takes longer than to encode them.
                start = partial(starting_latents, vae, settings, window, pictures, history, noise, self.dtype)
                initial = team.first(start)
                i2v = settings.mode == "i2v"
                channels = image_channels(vae, pictures["image"], window.latents, team.chain) if i2v else None
            state, noise_state = team.first(partial(_state, run, index, condition_noise))
            condition_noise.set_state(noise_state)
            calls, row = plan.calls[index], state.row if state else 0
            progress.window(index, len(plan.windows), calls - row)
            with clock("denoise"), self.placement.use(dit, beside=needs.beside), run.keeper(index, calls, row) as keep:
                latents = denoise(
                    dit,
                    initial,
                    plan.schedules[window],
                    plan.sigmas,
                    *contexts.of(texts[index]),
                    guidance_scale=settings.guidance_scale,
                    fps=settings.fps,
                    in_place=settings.mode == "df",
                    prefix=window.prefix,
                    addnoise=settings.addnoise_condition,
                    noise_generator=condition_noise,
                    extra_channels=channels,
                    teacache=self._teacache(settings),
                    causal_block_size=settings.causal_block_size if settings.causal_attention else None,
                    blocks=self.placement.blocks(dit),
                    attend=team.attend,
                    attend_context=machine.attend,
                    past_bytes=machine.spare_bytes(needs, team),
                    team=team,
                    on_step=lambda _row: progress.step(),
                    state=state,
                    on_state=keep,
                )[:, :, : window.latents]
            if keep_latents:
                result.latents.append(latents)
            with self.placement.use(vae):
                budget = team.agree(machine.decode_bytes(dit, vae))  # whole frames or tiles, as the leader would alone
                chunks = _skip(window.drop, vae.decode_stream(latents, budget, team.chain))
                decoded = media.to_host(chunks, floats=history.limit > 0)
                for chunk, frames in clock.each("decode", decoded):
                    if chunk is not None:
                        history.add(chunk)  # the next window's beginning is encoded from what was put out
                    yield frames
            run.put_out(index, history)

    def _load(self) -> tuple[DiT, VAE]:
        """The DiT and the VAE, each in its dtype; kept for the next request."""
        if self._dit is None or self._vae is None:
            with without_weights():
                dit, vae = DiT(self.checkpoint.config), _vae_of(self.checkpoint)
            self.checkpoint.load_transformer(dit, self.placement.home, self.dtype)
            self.checkpoint.load_vae(vae, self.placement.home, self.vae_dtype)
            if self.device.type == "cuda":
                vae.lay_out()
            self._dit, self._vae = dit.eval(), vae.eval()
        return self._dit, self._vae

    def _teacache(self, settings: Settings) -> TeaCacheSettings | None:
        if not settings.teacache:
            return None
        coefficients = settings.teacache_coefficients or self.checkpoint.config.teacache_coefficients(
            settings.use_ret_steps, settings.height, settings.width
        )
        if coefficients is None:
            raise ValueError(
                f"teacache: no coefficients are published for a {self.checkpoint.config.model_type} model of dim "
                f"{self.checkpoint.config.dim}; give them with teacache_coefficients, highest power first"
            )
        return TeaCacheSettings(coefficients, settings.teacache_thresh, settings.use_ret_steps)


def _mode(checkpoint: Checkpoint, asked: str | None) -> str | None:
    mode = asked or checkpoint.mode_hint()
    if mode not in (None, *MODES):
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    takes_image = checkpoint.config.model_type == "i2v"
    if takes_image and mode == "df":
        raise ValueError(f"{checkpoint.name} is an image-to-video model: run it with generate_video.py (mode 't2v')")
    if mode == "i2v" and not takes_image:
        raise ValueError(f"{checkpoint.name} is no image-to-video model and cannot run as 'i2v'")
    return "i2v" if takes_image else mode


def _state(run: Run, index: int, condition_noise: torch.Generator) -> tuple[State | None, Tensor]:
    """Where window `index` was left, and what the generator's state is then."""
    return run.state(index), condition_noise.get_state()


def _vae_of(checkpoint: Checkpoint) -> VAE:
    return VAE(VAE.base_dim_of(checkpoint.vae_weights()), *checkpoint.vae_statistics())


def _skip(count: int, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Leave out the first `count` frames of a video in chunks [1, 3, t, H, W]."""
    for chunk in chunks:
        if count < chunk.shape[2]:
            yield chunk[:, :, count:]
        count = max(0, count - chunk.shape[2])
