"""The denoising loop: one for every kind of video.

Text to video, image to video, diffusion forcing in step or staggered, long videos, extensions and end frames differ in
what is handed in (latents, schedule, channels, contexts), not here. No step copies from the host or waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .teacache import Residual, TeaCacheSettings, plan
from .timesteps import Schedule
from .unipc import UniPC

if TYPE_CHECKING:
    from skyreels_fast.dit.model import Context, DiT, Embedded


class State(NamedTuple):
    """A window between two rows: all that the rows from `row` on need, beside the noise generator's own state."""

    row: int
    latents: Tensor  # [1,16,F,h,w] float32
    history: tuple[Tensor, ...]  # the solver's: three tensors as the latents; none before the first row


@torch.no_grad()
def denoise(
    dit: DiT,
    latents: Tensor,
    schedule: Schedule,
    sigmas: Sequence[float],
    cond: Context,
    uncond: Context | None = None,
    *,
    guidance_scale: float = 1.0,
    fps: int | None = None,
    in_place: bool = False,
    prefix: int = 0,
    addnoise: int = 0,
    noise_generator: torch.Generator | None = None,
    extra_channels: Tensor | None = None,
    teacache: TeaCacheSettings | None = None,
    causal_block_size: int | None = None,
    blocks: Iterable | None = None,
    attend: Callable[..., Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
    state: State | None = None,
    on_state: Callable[[State], None] | None = None,
) -> Tensor:
    """Denoise one window: latents [1,16,F,h,w] float32, noise with the given frames filled in → the same, clean.

    schedule, sigmas: as `timesteps` makes them, over the same F columns, given frames held.
    cond, uncond: contexts made by `dit`; the prediction is uncond + guidance_scale·(cond - uncond) in float32, or cond
        alone without `uncond` or at a scale of 1.
    fps: frame rate for models that take one.
    in_place: the solver's second step as in the published diffusion forcing loop (see `unipc`): True for that, False
        for T2V and I2V.
    prefix, addnoise: with addnoise = a > 0 the model sees the first `prefix` frames at timestep a, each blended as
        (1 - a/1000)·frame + a/1000·noise, the noise new in each row and from `noise_generator`; what is returned stays
        clean.
    extra_channels: [1,C,F,h,w], appended to the latents' channels in each call.
    causal_block_size: attention is block-causal over so many frames; None: every frame sees every other.
    blocks, attend: handed to `dit.run_blocks`, when given; `blocks` is iterated anew in each call.
    on_step: called with the row's number when its work has been queued.
    state: where to go on from, in place of `latents` and the first row; the same bits come out as without the break.
    on_state: called with each state that can be gone on from, before the row and after the last; its tensors change
        with the next row. Rows that reuse what an earlier one computed are left out.

    Raises ValueError when the schedule's columns are not the latents' frames, or addnoise is out of 0 to 1000 or has no
    generator.
    """
    if len(schedule.index[0]) != latents.shape[2]:
        raise ValueError(f"schedule of {len(schedule.index[0])} columns for {latents.shape[2]} latent frames")
    if not 0 <= addnoise <= 1000:
        raise ValueError(f"addnoise_condition={addnoise} is not in 0 to 1000")
    if addnoise and prefix and noise_generator is None:
        raise ValueError("addnoise_condition needs a noise generator")

    latents = latents.float()
    timesteps = _timestep_rows(schedule, prefix if addnoise else 0, addnoise, latents.device)
    solver = UniPC(schedule, sigmas, latents.device, in_place=in_place)
    computed = _computed_rows(dit, schedule, timesteps, fps, teacache)
    options = {"causal_block_size": causal_block_size, "blocks": blocks, "attend": attend}
    model = _Model(dit, cond, uncond, guidance_scale, fps, options)
    dtype = next(dit.parameters()).dtype
    if extra_channels is not None:
        extra_channels = extra_channels.to(dtype)
    first = 0
    if state is not None:
        first, latents = state.row, state.latents.to(latents.device)
        solver.history = tuple(tensor.to(latents.device) for tensor in state.history)

    for row, (start, stop) in list(enumerate(schedule.interval))[first:]:
        if on_state is not None and computed[row]:
            on_state(State(row, latents, solver.history))
        window = latents[:, :, start:stop]
        if addnoise and start < prefix:
            window = _with_noise(window, prefix - start, addnoise, noise_generator)
        window = window.to(dtype)
        if extra_channels is not None:
            window = torch.cat([window, extra_channels[:, :, start:stop]], dim=1)
        keep = row + 1 < len(computed) and not computed[row + 1]
        velocity = model.velocity(window, timesteps[row : row + 1, start:stop], compute=computed[row], keep=keep)
        latents = solver.step(row, velocity, latents)
        if on_step is not None:
            on_step(row)
    if on_state is not None:
        on_state(State(len(computed), latents, solver.history))
    return latents


class _Model:
    """The DiT with one window's contexts, each with a residual of its own."""

    def __init__(
        self, dit: DiT, cond: Context, uncond: Context | None, guidance_scale: float, fps: int | None, options: dict
    ) -> None:
        self._dit, self._fps, self._scale = dit, fps, guidance_scale
        self._options = {name: value for name, value in options.items() if value is not None}
        contexts = (cond,) if uncond is None or guidance_scale == 1 else (cond, uncond)
        self._branches = [(context, Residual()) for context in contexts]

    def velocity(self, latents: Tensor, timestep: Tensor, *, compute: bool, keep: bool) -> Tensor:
        """Guided velocity [1,16,f,h,w] float32; `compute` and `keep` as in `Residual.apply`."""
        embedded = self._dit.embed(latents, timestep, self._fps)
        velocities = [
            self._branch(embedded, context, residual, compute=compute, keep=keep)
            for context, residual in self._branches
        ]
        if len(velocities) == 1:
            return velocities[0]
        cond, uncond = velocities
        return uncond + self._scale * (cond - uncond)

    def _branch(self, embedded: Embedded, context: Context, residual: Residual, *, compute: bool, keep: bool) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self._dit.run_blocks(x, embedded.e0, context, embedded.grid, **self._options)

        x = residual.apply(embedded.x, run, compute=compute, keep=keep)
        return self._dit.head(x, embedded.e, embedded.grid).float()


def _timestep_rows(schedule: Schedule, noised: int, timestep: int, device: torch.device) -> Tensor:
    """[rows, F] int64 on the device, the first `noised` columns at `timestep`."""
    return torch.tensor([(timestep,) * noised + row[noised:] for row in schedule.timesteps]).to(device)


def _with_noise(window: Tensor, given: int, addnoise: int, generator: torch.Generator) -> Tensor:
    """A copy of the window [1,16,f,h,w], its first `given` frames blended with new noise."""
    window = window.clone()
    frames = window[:, :, :given]
    noise = torch.randn(frames.shape, generator=generator, dtype=frames.dtype, device=generator.device)
    share = 0.001 * addnoise
    window[:, :, :given] = (1 - share) * frames + share * noise.to(window.device)
    return window


def _computed_rows(
    dit: DiT, schedule: Schedule, timesteps: Tensor, fps: int | None, settings: TeaCacheSettings | None
) -> list[bool]:
    """Whether each row runs the blocks, in both branches: they share their timesteps, so they share the choice."""
    intervals = schedule.interval
    if settings is None:
        return [True] * len(intervals)
    signals = (
        dit.time_embedding_of(timesteps[row : row + 1, start:stop], fps)[settings.use_ret_steps]
        for row, (start, stop) in enumerate(intervals)
    )
    # A residual belongs to the frames it was computed for: none is reused once the interval has moved on.
    moved = [row for row in range(1, len(intervals)) if intervals[row] != intervals[row - 1]]
    return plan(signals, settings.coefficients, settings.threshold, settings.use_ret_steps, forced=moved)
