"""What a request comes to on one model, before any weight is loaded: windows, schedules, model calls, frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ._words import counted, listed
from .config import PIXEL_MULTIPLE
from .prompts import delayed, unused, window_prompts
from .request import Settings
from .sampling.timesteps import Schedule, hold, sigma_schedule, timestep_matrix, timestep_schedule
from .sampling.windows import Window, latent_frames, plan_windows


@dataclass(frozen=True)
class Plan:
    """Settings with every default filled in, and the windows they come to.

    `source_frames` counts the frames of an input video, which come out before the generated ones.
    """

    settings: Settings
    windows: tuple[Window, ...]
    source_frames: int = 0

    @classmethod
    def of(cls, settings: Settings, source_frames: int = 0) -> Plan:
        """Raises ValueError where the windows or the schedule do not work out, naming the nearest values that do."""
        plan = cls(settings, _windows(settings), source_frames)
        _ = (
            plan.schedules,
            plan.sigmas,
            plan.prompts,
        )  # made now, so that what cannot be scheduled is refused before anything loads
        return plan

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each window."""
        settings = self.settings
        if settings.prompts is None:
            return (settings.prompt,) * len(self.windows)
        return window_prompts(settings.prompts, self.windows, self.source_frames)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may want to know, one line each."""
        notes = list(self.settings.notes)
        if self.settings.prompts is not None:
            timing = self.settings.prompts, self.windows, self.source_frames
            for frame, first in delayed(*timing):
                where = f"at frame {first}, where the next window begins"
                notes.append(f"prompts: the prompt of frame {frame} takes effect {where}")
            for frame in unused(*timing):
                notes.append(f"prompts: no window begins while that of frame {frame} holds, so it is never used")
        return tuple(notes)

    @cached_property
    def sigmas(self) -> list[float]:
        return sigma_schedule(self.settings.inference_steps, self.settings.shift)

    @cached_property
    def schedules(self) -> dict[Window, Schedule]:
        """For each kind of window the timestep of each latent frame at each model call. Windows alike share theirs."""
        return {window: self._schedule(window) for window in dict.fromkeys(self.windows)}

    def _schedule(self, window: Window) -> Schedule:
        """Given frames are held whatever the block."""
        settings = self.settings
        timesteps = timestep_schedule(settings.inference_steps, settings.shift)
        matrix = timestep_matrix(
            window.latents,
            timesteps,
            base=min(window.latents, latent_frames(settings.base_num_frames)) if settings.mode == "df" else None,
            ar_step=settings.ar_step,
            ready=window.prefix,
            block=settings.causal_block_size,
        )
        return hold(matrix, window.prefix, window.end)

    @cached_property
    def calls(self) -> tuple[int, ...]:
        """Schedule rows of each window; each is one model call, two with guidance."""
        return tuple(len(self.schedules[window].timesteps) for window in self.windows)

    @property
    def tokens(self) -> int:
        """Of the transformer's largest call: latent frames that move together, cut in patches of 16 x 16 pixels."""
        intervals = (interval for schedule in self.schedules.values() for interval in schedule.interval)
        frames = max(stop - start for start, stop in intervals)
        return frames * (self.settings.height // PIXEL_MULTIPLE) * (self.settings.width // PIXEL_MULTIPLE)

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch runs: it has no weight at 1, and diffusion forcing drops it below."""
        scale = self.settings.guidance_scale
        return scale > 1 if self.settings.mode == "df" else scale != 1

    @property
    def frames(self) -> int:
        """Frames of the whole output."""
        return self.source_frames + sum(window.frames for window in self.windows)

    def describe(self) -> str:
        settings, branches = self.settings, 1 + self.guided
        texts = counted(len(set(self.prompts)), "prompt") + ", " if settings.prompts else ""
        source = f", {self.source_frames} of them the source's" if self.source_frames else ""
        return (
            f"{settings.mode.upper()} {settings.width}x{settings.height}: {counted(len(self.windows), 'window')} of "
            f"{self._lengths()}, {counted(settings.inference_steps, 'step')}, {texts}"
            f"{counted(branches * sum(self.calls), 'model call')}, "
            f"{counted(self.frames, 'frame')} out ({self.frames / settings.fps:.1f} s at {settings.fps:g} fps){source}"
        )

    def _lengths(self) -> str:
        """The windows' lengths: one where all are alike, else each; those between are left out where they are many."""
        lengths = [window.latents for window in self.windows]
        if len(set(lengths)) == 1:
            return counted(lengths[0], "latent frame")
        shown = lengths if len(lengths) <= 4 else [lengths[0], "...", *lengths[-2:]]
        return f"{listed(shown)} latent frames"


def _windows(settings: Settings) -> tuple[Window, ...]:
    return plan_windows(
        settings.num_frames,
        settings.base_num_frames,
        settings.overlap_history,
        image=settings.image is not None,
        end_image=settings.end_image is not None,
        extend=settings.video is not None,
        causal_block_size=settings.causal_block_size,
        sliding=settings.ar_step > 0,
        mode=settings.mode,
    )
