"""The two commands: flags → request → plan → video, with what there is to say on the way. The only room that prints.

Exit codes: 0 done; 1 it failed while rendering; 2 it was refused before any weight was loaded; 130 Ctrl-C; 143 SIGTERM;
129 SIGHUP. Whatever was rendered before a failure or one of these signals is in a playable file, and what was computed
is in a folder beside it, from which --resume goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._flags import PROGRAMS, check_together, parser, request_values, with_flags
from ._resume import begun_with, check_no_run, notes, resume_line, resumed, run_directory
from ._sidecar import Record, describe_run, repeated_flags
from ._values import UsageError, device_name, own_device
from .request import Request

if TYPE_CHECKING:
    from .film import Film
    from .parallel import Degrees
    from .pipeline import Pipeline
    from .plan import Plan
    from .run import Run


def generate_video_df(argv: list[str] | None = None) -> int:
    """generate_video_df.py: diffusion forcing. Returns the exit code; `argv` is the process's own by default."""
    return _run("df", argv)


def generate_video(argv: list[str] | None = None) -> int:
    """generate_video.py: text-to-video, and image-to-video models. Returns the exit code."""
    return _run("t2v", argv)


class _Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come."""


@dataclass
class _Part:
    """A run that nothing speaks against, of which this process renders a part and another one writes it all."""

    program: str
    pipe: Pipeline
    plan: Plan


@dataclass
class _Job(_Part):
    """A run that nothing speaks against."""

    path: Path
    record: Record
    film: Film
    run: Run
    resumed: bool


def _run(mode: str, argv: list[str] | None) -> int:
    names, called = PROGRAMS[mode], Path(sys.argv[0]).name
    program = called if called in names else names[0]
    old = _handle_signals(_stop)
    try:
        job = _prepare(program, mode, sys.argv[1:] if argv is None else argv)
        if isinstance(job, int):
            return job
        return _render(job) if isinstance(job, _Job) else _follow(job)
    except KeyboardInterrupt as error:
        return _interrupted(program, error)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _handle_signals(handler: Any) -> dict[int, Any]:
    """Set the handler of SIGTERM and SIGHUP unless they are ignored, as under nohup; those that were."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def _stop(number: int, _frame: object) -> None:
    _handle_signals(signal.SIG_IGN)  # the second shall not disturb the first's cleaning up
    raise _Stopped(number)


def _interrupted(program: str, error: KeyboardInterrupt) -> int:
    code = _code_of(error)
    _say(program, "interrupted" if code == 128 + signal.SIGINT else f"stopped by {signal.Signals(code - 128).name}")
    return code


def _code_of(error: KeyboardInterrupt) -> int:
    return 128 + (error.args[0] if isinstance(error, _Stopped) else signal.SIGINT)


def _prepare(program: str, mode: str, argv: list[str]) -> _Part | int:
    """All that can be refused, the quick before the slow: flags, request, output, model, plan."""
    try:
        args = parser(program, mode).parse(argv)
        check_together(args)
        if args.resume:
            args = resumed(args.resume, mode, parser(program, mode), argv)
        request = Request(**request_values(args))
        _check_output(args)
        args.device = device_name(args.device)
        if args.use_usp:
            args.device = own_device(args.device)
        args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
        args.vae_dtype = args.vae_dtype or ("float32" if args.device == "cpu" else "bfloat16")
        return _open(program, mode, args, request)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of this host say the same
            _say(program, f"error: {_one_line(error)}")
        return 2


def _open(program: str, mode: str, args: argparse.Namespace, request: Request) -> _Part:
    import torch

    from .film import Film
    from .media import output_path
    from .pipeline import Pipeline
    from .run import Run

    pipe = Pipeline.from_pretrained(
        args.model_id,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        offload=args.offload,
        mode=mode,
        vram=args.vram,
        attention=args.attention,
        vae_dtype=getattr(torch, args.vae_dtype),
        degrees=_degrees(args) if args.use_usp else None,
    )
    plan = pipe.plan(request)
    if pipe.world is not None and not pipe.world.leads:
        return _Part(program, pipe, plan)
    original = plan.settings.prompt
    if args.prompt_enhancer:
        plan = pipe.plan(_enhanced(request, original, args.device, plan.settings.seed))
    settings = plan.settings
    for note in plan.notes:
        _say(program, f"note: {with_flags(note)}")
    print(plan.describe(), flush=True)
    if pipe.world is not None:
        print(f"{pipe.world.size} processes: {pipe.layout(plan)}", flush=True)
    if shortage := pipe.memory_note(plan):
        _say(program, f"warning: {shortage}")

    name = output_path(args.outdir, settings.prompt, settings.seed, datetime.datetime.now())
    record = describe_run(program, args, settings)
    if args.prompt_enhancer:
        record["original_prompt"] = original
    if pipe.world is not None:
        record["parallel"] = {"processes": pipe.world.size} | pipe.layout(plan)._asdict()
    path = Path(args.output) if args.output else name
    film = Film(path, settings.fps, settings.height, settings.width, run_directory(path))
    every_s = {} if args.save_every is None else {"every_s": args.save_every}
    run = Run(run_directory(path), film, **every_s)
    job = _Job(program, pipe, plan, path, Record(path, record), film, run, bool(args.resume))
    made_with = {"torch": record["versions"]["torch"], "device": record["device"]}
    begun = begun_with(program, mode, path, repeated_flags(args, settings), made_with)
    try:
        _begin(job, begun)
    except BaseException:
        if not job.resumed:
            job.run.withdraw()
        raise
    return job


def _degrees(args: argparse.Namespace) -> Degrees:
    from .parallel import Degrees

    cfg_parallel = True if args.cfg_parallel else False if args.no_cfg_parallel else None
    return Degrees(args.ulysses_degree, args.ring_degree, cfg_parallel)


def _follow(part: _Part) -> int:
    """Do this process's part of what the first one renders and writes."""
    try:
        if not part.pipe.world.agree(None):
            for _ in part.pipe(part.plan, stream=True, keep_latents=False).frames:
                pass
        part.pipe.world.close()
    except KeyboardInterrupt as error:
        return _code_of(error)
    except Exception as error:
        return _explain(part, "rendering", error)
    return 0


def _begin(job: _Job, begun: dict[str, Any]) -> None:
    """Make the run's folder and the record, or take both up. Raises ValueError for another run's, and OSError."""
    from .film import Mark

    job.run.begin(job.pipe.identity(job.plan), anew=not job.resumed, **begun)
    for note in notes(job.run.kept["made_with"], begun["made_with"]):
        _say(job.program, f"note: {note}")
    if job.run.mark:
        there = job.path.is_file() if job.run.finished else job.film.go_on(Mark(*job.run.mark))
        if there:
            print(f"{job.run.mark[1]} of {job.plan.frames} frames are there already", flush=True)
        else:
            _say(job.program, f"note: {job.path} is not as the run left it, and is made again from what was saved")
            job.run.rewind()
    job.record.begin(job.film.frames)


def _render(job: _Job) -> int:
    from ._progress import ConsoleProgress

    start = time.monotonic()
    result = progress = None
    code = 0
    try:
        if job.pipe.world is not None:
            job.pipe.world.agree(job.run.finished)
        if not job.run.finished:
            progress = ConsoleProgress(sum(job.plan.calls[job.run.windows :]) - job.run.rows_saved)
            result = job.pipe(job.plan, stream=True, progress=progress, run=job.run, keep_latents=False)
            for chunk in result.frames:
                job.film.write(chunk)
    except (Exception, KeyboardInterrupt) as error:
        if progress is not None:
            progress.close()
        code = _explain(job, progress.current if progress else None, error)
    if progress is not None:
        progress.close()
    timings = dict(result.timings if result else {}) | {"total": time.monotonic() - start}
    _handle_signals(signal.SIG_IGN)
    try:
        code = _finish(job, code, timings)
    finally:
        job.run.release()
    if code == 0 and job.pipe.world is not None:
        job.pipe.world.close()
    return code


def _finish(job: _Job, code: int, timings: dict[str, float]) -> int:
    """Close the file, write the record beside it, say where it is, how much can be played and how to go on."""
    from .media import playable_frames

    try:
        job.film.close()
    except (RuntimeError, OSError) as error:
        _say(job.program, f"error: {_one_line(error)}")
        code = code or 1
    if not job.film.begun and not job.run.finished:
        _say(job.program, "no frame was rendered, no file written")
        return _break_off(job, code or 1)
    # What ffmpeg was given need not have reached the file. Never more, should an older file have withstood.
    frames = job.plan.frames if job.run.finished else job.film.frames
    if code:
        frames = min(frames, playable_frames(job.path))
    else:
        _make_plain(job)
    try:
        # The timings of a resumed run are those of its last part.
        more = {"timings_s": timings} | ({"resumed": True} if job.resumed else {})
        job.record.write(code == 0 and frames == job.plan.frames, frames, **more)
    except OSError as error:
        _say(job.program, f"the settings could not be saved beside the video: {_one_line(error)}")
    if code:
        _say(job.program, f"{frames} of {job.plan.frames} frames can be played in {job.path}")
        return _break_off(job, code)
    with contextlib.suppress(OSError):  # what is left of the folder says that the run is finished
        job.run.remove()
    print(f"{job.path} ({frames} frames, {timings['total']:.1f} s)", flush=True)
    return code


def _make_plain(job: _Job) -> None:
    """Give the finished video a single index; as it is, it can be played too."""
    from .media import VideoError

    try:
        job.run.finish()
        job.film.make_plain()
    except (VideoError, OSError) as error:
        _say(job.program, f"note: {job.path} is complete, but stays an MP4 of fragments: {_one_line(error)}")


def _break_off(job: _Job, code: int) -> int:
    """Say how to go on, or leave no folder and, without a video, no record where there is nothing to go on from."""
    if job.run.has_something:
        _say(job.program, f"go on with: {resume_line(job.program, job.run.directory)}")
        return code
    with contextlib.suppress(OSError):
        job.run.remove()
        if not job.film.begun:
            job.record.withdraw()
    return code


def _explain(job: _Part, stage: str, error: BaseException) -> int:
    """Say why rendering ended, in one line where the cause is known; the exit code."""
    import torch

    from .checkpoint import CheckpointError
    from .host_memory import HostMemoryError
    from .media import VideoError
    from .parallel import LeaderError, is_lost_peer

    program = job.program
    if isinstance(error, LeaderError):
        return 1  # who failed says why
    if job.pipe.world is not None and is_lost_peer(error):
        _say(program, "error: another process of this run has ended; its own message says why")
        return 1
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(program, error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        wanted = re.search(r"to allocate [\d.]+ \w+", str(error))
        tried = f" (it tried {wanted[0]})" if wanted else ""
        advice = job.pipe.memory_note(job.plan, full=True)
        _say(program, f"error: GPU memory is full while {stage}{tried}: {advice}")
        return 1
    if isinstance(error, HostMemoryError):
        _say(program, f"error: host memory is full while {stage}: {_one_line(error)}: close other programs, or set "
             "SKYREELS_FAST_PINNED_GIB to pin less of it")  # fmt: skip
        return 1
    if isinstance(error, (VideoError, CheckpointError)):
        _say(program, f"error: {_one_line(error)}")
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        _say(program, f"error: {_one_line(error)}: make room")
        return 1
    traceback.print_exception(error)
    return 1


def _enhanced(request: Request, prompt: str, device: str, seed: int) -> Request:
    from .enhance import enhance

    better = enhance(prompt, device=device, seed=seed)
    print(f"original prompt: {prompt}\nenhanced prompt: {better}", flush=True)
    return dataclasses.replace(request, prompt=better, seed=seed)


def _check_output(args: argparse.Namespace) -> None:
    """Find out now, not after hours, whether a video can be encoded and saved. Raises ValueError."""
    from .media import VideoError, check_encoder, check_writable

    if args.output:
        output = Path(args.output)
        if output.suffix.lower() != ".mp4":
            raise UsageError(f"--output {args.output!r}: must end in .mp4")
        for flag in ("image", "end_image", "video_path"):
            source = getattr(args, flag, None)
            if source and output.exists() and output.samefile(source):
                raise UsageError(f"--output {args.output!r}: is the input of --{flag}; choose another name")
        check_writable(output, make=False)
        if not args.resume:
            check_no_run(output)
    else:
        try:
            check_writable(Path("result") / args.outdir / "video.mp4", make=False)
        except ValueError as error:
            raise UsageError(f"--outdir {args.outdir!r}: {error}") from None
    try:
        check_encoder()
    except VideoError as error:
        raise UsageError(str(error)) from None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return with_flags(text) if isinstance(error, ValueError) and not isinstance(error, UsageError) else text


def _say(program: str, text: str) -> None:
    rank = os.environ.get("RANK", "0")
    program = program if rank == "0" else f"{program} [rank {rank}]"
    print(f"{program}: {text}", file=sys.stderr, flush=True)
