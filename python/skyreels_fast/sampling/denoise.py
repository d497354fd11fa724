"""The denoising loop: one for every kind of video.

Text to video, image to video, diffusion forcing in step or staggered, long videos, extensions and end frames differ in
what is handed in (latents, schedule, channels, contexts), not here. No step copies from the host or waits for the
device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from skyreels_fast.dit.past import Past
from skyreels_fast.dit.stream import Stream

from .spans import Span, causal_spans, whole_spans
from .teacache import Residual, TeaCacheSettings, plan
from .team import Alone, Grid, Team
from .timesteps import Schedule
from .unipc import UniPC

if TYPE_CHECKING:
    from skyreels_fast.dit.context import Context
    from skyreels_fast.dit.model import DiT


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
    attend_context: Callable[..., Tensor] | None = None,
    past_bytes: int | None = None,
    team: Team | None = None,
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
    causal_block_size: attention is block-causal over so many frames; None: every frame sees every other. Then blocks
        that have not started are left out of a call, and of finished ones the keys and values are kept, if they fit
        into past_bytes (None: however many) and TeaCache is off.
    blocks, attend, attend_context: handed to `dit.run_branches`, when given; `blocks` is iterated anew in each call.
    team: the processes that share the work, None: this one has it all. Every one of them is given the same and returns
        the same; `attend` is to reach the tokens of the others, and past_bytes to be what all of them have.
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
    team = team or Alone()
    contexts = [cond] if uncond is None or guidance_scale == 1 else [cond, uncond]
    own = [contexts[branch] for branch in team.branches(len(contexts))]
    reuse = teacache is None and _fits(dit, latents, past_bytes, share=len(own) / team.sequence)
    spans = _spans(schedule, causal_block_size, keep=reuse, noised=prefix if addnoise else 0)
    computed = team.agree(_computed_rows(dit, schedule, spans, timesteps, fps, teacache))
    options = {"causal_block_size": causal_block_size, "blocks": blocks, "token_range": team.token_range}
    options |= {"attend": attend, "attend_context": attend_context}
    model = _Model(dit, own, guidance_scale, fps, team, options)
    dtype = next(dit.parameters()).dtype
    if extra_channels is not None:
        extra_channels = extra_channels.to(dtype)
    first = 0
    if state is not None:
        first, latents = state.row, state.latents.to(latents.device)
        solver.history = tuple(tensor.to(latents.device) for tensor in state.history)

    for row, (start, stop) in list(enumerate(schedule.interval))[first:]:
        # A state holds neither TeaCache's residual nor earlier frames' keys, so the row must need neither.
        if on_state is not None and computed[row] and spans[row].start == 0:
            on_state(State(row, latents, solver.history))
        window = latents[:, :, start:stop]
        if addnoise and start < prefix:
            window = _with_noise(window, prefix - start, addnoise, noise_generator)
        window = window.to(dtype)
        if extra_channels is not None:
            window = torch.cat([window, extra_channels[:, :, start:stop]], dim=1)
        model.enter(row, spans)
        keep = row + 1 < len(computed) and not computed[row + 1]
        velocity = model.velocity(window, timesteps[row : row + 1, start:stop], compute=computed[row], keep=keep)
        latents = solver.step(row, velocity, latents)
        if on_step is not None:
            on_step(row)
    if on_state is not None:
        on_state(State(len(computed), latents, solver.history))
    return latents


class _Branch:
    """What a guidance branch keeps from one model call to the next."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.residual = Residual()
        self.past: Past | None = None


class _Model:
    """The DiT with one window's contexts, those of the branches that this process computes."""

    def __init__(
        self,
        dit: DiT,
        contexts: Sequence[Context],
        guidance_scale: float,
        fps: int | None,
        team: Team,
        options: dict,
    ) -> None:
        self._dit, self._fps, self._scale, self._team = dit, fps, guidance_scale, team
        self._options = {name: value for name, value in options.items() if value is not None}
        self._branches = [_Branch(context) for context in contexts]
        self._span: Span

    def enter(self, row: int, spans: list[Span]) -> None:
        """Go on to a row: its span, and what has been kept."""
        self._span = spans[row]
        if self._span.start == 0:
            later = itertools.takewhile(lambda span: span.start > 0, spans[row + 1 :])
            frames = max((span.stop for span in later), default=0)
            for branch in self._branches:
                branch.past = Past(max(frames, self._span.stop)) if frames else None

    def velocity(self, latents: Tensor, timestep: Tensor, *, compute: bool, keep: bool) -> Tensor:
        """Guided velocity [1,16,f,h,w] float32, zero out of the span.

        compute: run the blocks, or else add what they added in the last call that ran them. keep: a later call adds it.
        """
        part = slice(self._span.start, self._span.stop)
        embedded = self._dit.embed(latents[:, :, part], timestep[:, part], self._fps)
        (x, e, e0, grid), own_grid = self._team.shard(embedded)
        del embedded
        if compute:
            stream, before = Stream(x), x if keep else None
            del x  # the stream lets go of it when the first block has added to it
            tokens = self._run(stream, e0, grid, before)
        else:
            tokens = [branch.residual.added_to(x, keep=keep) for branch in self._branches]
        velocities = self._team.whole([self._dit.head(y, e, own_grid).float() for y in tokens], grid)
        velocity = velocities[0]
        if len(velocities) == 2:
            cond, uncond = velocities
            velocity = uncond + self._scale * (cond - uncond)
        if velocity.shape[2] == latents.shape[2]:
            return velocity
        whole = velocity.new_zeros(*velocity.shape[:2], *latents.shape[2:])
        whole[:, :, part] = velocity
        return whole

    def _run(self, stream: Stream, e0: Tensor, grid: Grid, before: Tensor | None) -> list[Tensor]:
        """Each branch's tokens after the blocks. before: the tokens, where what is added to them is to be kept."""
        for branch in self._branches:
            branch.residual.forget()
        contexts, pasts = zip(*((branch.context, branch.past) for branch in self._branches), strict=True)
        after = self._dit.run_branches(stream, e0, contexts, grid, pasts=pasts, **self._options)
        for branch, tokens in zip(self._branches, after, strict=True):
            if before is not None:
                branch.residual.save(before, tokens)
            if branch.past is not None:
                branch.past.keep(self._span.fixed)
        return after


def _spans(schedule: Schedule, block: int | None, *, keep: bool, noised: int) -> list[Span]:
    return whole_spans(schedule) if block is None else causal_spans(schedule, block, keep=keep, noised=noised)


def _fits(dit: DiT, latents: Tensor, limit: int | None, share: float) -> bool:
    """share: how many times a video's keys and values this process has to keep."""
    if limit is None:
        return True
    weight = next(dit.parameters())
    tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
    return share * Past.nbytes(dit.config.num_layers, tokens, dit.config.dim, weight.itemsize) <= limit


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
    dit: DiT,
    schedule: Schedule,
    spans: list[Span],
    timesteps: Tensor,
    fps: int | None,
    settings: TeaCacheSettings | None,
) -> list[bool]:
    """Whether each row runs the blocks, in both branches: they share their timesteps, so they share the choice."""
    intervals = schedule.interval
    if settings is None:
        return [True] * len(intervals)
    signals = (
        dit.time_embedding_of(timesteps[row : row + 1, start:stop], fps)[settings.use_ret_steps]
        for row, (start, stop) in enumerate(intervals)
    )
    # A residual belongs to the frames it was computed for: none is reused once there are others.
    seen = list(zip(intervals, spans, strict=True))
    moved = [row for row in range(1, len(seen)) if seen[row] != seen[row - 1]]
    return plan(signals, settings.coefficients, settings.threshold, settings.use_ret_steps, forced=moved)
