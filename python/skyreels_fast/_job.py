"""One run of a command: its file, its record, its folder; what there is to say at its end, whatever it ends by."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._flags import with_flags
from ._resume import notes, resume_line
from ._sidecar import Record
from ._signals import Stopped, handle_signals
from ._values import UsageError
from ._words import counted

if TYPE_CHECKING:
    from ._progress import ConsoleProgress
    from ._watch import Watch
    from .film import Film
    from .pipeline import Pipeline, Result
    from .plan import Plan
    from .run import Run


@dataclass
class Part:
    """A run that nothing speaks against, of which this process renders a part and another one writes it all."""

    program: str
    pipe: Pipeline
    plan: Plan


@dataclass
class Job(Part):
    """A run that nothing speaks against."""

    path: Path
    record: Record
    film: Film
    run: Run
    resumed: bool


def begin(job: Job, begun: dict[str, Any]) -> None:
    """Make the run's folder and the record, or take both up. Raises ValueError for another run's, and OSError."""
    from .film import Mark

    job.run.begin(job.pipe.identity(job.plan), anew=not job.resumed, **begun)
    for note in notes(job.run.kept["made_with"], begun["made_with"]):
        say(job.program, f"note: {note}")
    if job.run.mark:
        there = job.path.is_file() if job.run.finished else job.film.go_on(Mark(*job.run.mark))
        if there:
            print(f"{_share(job, job.run.mark[1])} are there already", flush=True)
        else:
            say(job.program, f"note: {job.path} is not as the run left it, and is made again from what was saved")
            job.run.rewind()
    job.record.begin(job.film.frames)


def render(job: Job, watch: Watch) -> int:
    """Render it all and say what there is to say; the exit code."""
    rendering = _Rendering(job)
    watch.end = rendering.stopped
    try:
        rendering.go()
    except (Exception, KeyboardInterrupt) as error:
        return rendering.end(error, watch)
    code = rendering.end(None, watch)
    if code == 0 and job.pipe.machine.world is not None:
        job.pipe.machine.world.close()
    return code


class _Rendering:
    def __init__(self, job: Job) -> None:
        self._job, self._start = job, time.monotonic()
        self._result: Result | None = None
        self._progress: ConsoleProgress | None = None

    def go(self) -> None:
        from ._progress import ConsoleProgress

        job = self._job
        if job.pipe.machine.world is not None:
            job.pipe.machine.world.agree(job.run.finished)
        if not job.run.finished:
            self._progress = ConsoleProgress(sum(job.plan.calls[job.run.windows :]) - job.run.rows_saved)
            self._result = job.pipe(job.plan, stream=True, progress=self._progress, run=job.run, keep_latents=False)
            for chunk in self._result.frames:
                job.film.write(chunk)

    def end(self, error: BaseException | None, watch: Watch) -> int:
        """Say what has become of it, undisturbed by signals; the exit code."""
        handle_signals(signal.SIG_IGN)  # torchrun sends one where another process is gone
        watch.mine()
        return self._end(error)

    def stopped(self, number: int) -> int:
        """The same of a run that a signal stops whose main thread does not answer it, and save what there is."""
        error: Exception | KeyboardInterrupt = Stopped(number)
        try:
            self._job.run.save_last()
        except Exception as failed:
            error = failed
        return self._end(error)

    def _end(self, error: BaseException | None) -> int:
        stage = None
        if self._progress is not None:
            stage = self._progress.current
            self._progress.close()
        code = 0 if error is None else _explain(self._job, stage, error)
        timings = dict(self._result.timings if self._result else {}) | {"total": time.monotonic() - self._start}
        try:
            return _finish(self._job, code, timings)
        finally:
            self._job.run.release()


def _finish(job: Job, code: int, timings: dict[str, float]) -> int:
    """Close the file, write the record beside it, say where it is, how much can be played and how to go on."""
    from .media import playable_frames

    try:
        job.film.close()
    except (RuntimeError, OSError) as error:
        say(job.program, f"error: {one_line(error)}")
        code = code or 1
    if not job.film.begun and not job.run.finished:
        say(job.program, _what_is_saved(job))
        return _break_off(job, code or 1)
    # What ffmpeg was given need not have reached the file. Never more, should an older file have withstood.
    frames = job.plan.frames if job.run.finished else job.film.frames
    hurried = job.pipe.machine.world is not None  # torchrun kills what has not ended in half a minute
    if code:
        if hurried:
            _break_off(job, code)
        frames = min(frames, playable_frames(job.path))  # as long as the video is
    else:
        _make_plain(job)
    try:
        # The timings of a resumed run are those of its last part.
        more = {"timings_s": timings} | ({"resumed": True} if job.resumed else {})
        job.record.write(code == 0 and frames == job.plan.frames, frames, **more)
    except OSError as error:
        say(job.program, f"the settings could not be saved beside the video: {one_line(error)}")
    if code:
        say(job.program, f"{_share(job, frames)} can be played in {job.path}")
        return code if hurried else _break_off(job, code)
    with contextlib.suppress(OSError):  # what is left of the folder says that the run is finished
        job.run.remove()
    print(f"{job.path} ({counted(frames, 'frame')}, {timings['total']:.1f} s)", flush=True)
    return code


def _share(job: Job, frames: int) -> str:
    return f"{frames} of {counted(job.plan.frames, 'frame')}"


def _what_is_saved(job: Job) -> str:
    """What there is where no frame has come out."""
    from .run import RunError

    if not job.run.has_something:
        return "no frame was rendered, no file written"
    try:
        return f"no frame is finished yet; {job.run.rows_saved} of {counted(sum(job.plan.calls), 'step')} are saved"
    except RunError:  # it ended the run, and has been said
        return "no frame is finished yet"


def _make_plain(job: Job) -> None:
    """Give the finished video a single index; as it is, it can be played too."""
    from .media import VideoError

    try:
        job.run.finish()
        job.film.make_plain()
    except (VideoError, OSError) as error:
        say(job.program, f"note: {job.path} is complete, but stays an MP4 of fragments: {one_line(error)}")


def _break_off(job: Job, code: int) -> int:
    """Say how to go on, or leave no folder and, without a video, no record where there is nothing to go on from."""
    if job.run.has_something:
        say(job.program, f"go on with: {resume_line(job.program, job.run.directory)}")
        return code
    with contextlib.suppress(OSError):
        job.run.remove()
        if not job.film.begun:
            job.record.withdraw()
    return code


def _explain(job: Part, stage: str, error: BaseException) -> int:
    """Say why rendering ended, in one line where the cause is known; the exit code."""
    import torch

    from .checkpoint import CheckpointError
    from .host_memory import HostMemoryError
    from .media import VideoError
    from .parallel import LeaderError, is_lost_peer
    from .run import RunError

    program = job.program
    if isinstance(error, LeaderError):
        return 1  # who failed says why
    if isinstance(error, KeyboardInterrupt):
        return interrupted(program, error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        wanted = re.search(r"to allocate [\d.]+ \w+", str(error))
        tried = f" (it tried {wanted[0]})" if wanted else ""
        advice = job.pipe.machine.memory_note(job.plan, full=True)
        say(program, f"error: GPU memory is full while {stage}{tried}: {advice}")
        return 1
    if isinstance(error, HostMemoryError):
        say(program, f"error: host memory is full while {stage}: {one_line(error)}: close other programs, or set "
             "SKYREELS_FAST_PINNED_GIB to pin less of it")  # fmt: skip
        return 1
    if isinstance(error, (VideoError, CheckpointError, RunError)):
        say(program, f"error: {one_line(error)}")
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        say(program, f"error: {one_line(error)}: make room")
        return 1
    if is_lost_peer(error):
        return alone(program)
    traceback.print_exception(error)
    return 1


def alone(program: str) -> int:
    """Say that another process is gone; the exit code."""
    say(program, "error: another process of this run has ended; its own message says why")
    return 1


def follow(part: Part, watch: Watch) -> int:
    """Do this process's part of what the first one renders and writes, which says what there is to say."""
    watch.end = lambda number: _code_of(Stopped(number))
    try:
        if not part.pipe.machine.world.agree(None):
            for _ in part.pipe(part.plan, stream=True, keep_latents=False).frames:
                pass
        part.pipe.machine.world.close()
    except KeyboardInterrupt as error:
        return _code_of(error)
    except Exception as error:
        return _explain(part, "rendering", error)
    return 0


def interrupted(program: str, error: KeyboardInterrupt) -> int:
    """Say so; the exit code."""
    code = _code_of(error)
    say(program, "interrupted" if code == 128 + signal.SIGINT else f"stopped by {signal.Signals(code - 128).name}")
    return code


def _code_of(error: KeyboardInterrupt) -> int:
    return 128 + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return with_flags(text) if isinstance(error, ValueError) and not isinstance(error, UsageError) else text


def say(program: str, text: str) -> None:
    rank = os.environ.get("RANK", "0")
    program = program if rank == "0" else f"{program} [rank {rank}]"
    print(f"{program}: {text}", file=sys.stderr, flush=True)
