"""The two commands: flags → request → plan → video, with what there is to say on the way. The only room that prints.

Exit codes: 0 done; 1 it failed while rendering; 2 it was refused before any weight was loaded; 130 Ctrl-C; 143 SIGTERM;
129 SIGHUP. Whatever was rendered before a failure or one of these signals is in a playable file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
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

from ._flags import PROGRAMS, check_usp, parser, request_values, with_flags
from ._sidecar import Record, describe_run
from ._values import UsageError, device_name, own_device
from .request import Request

if TYPE_CHECKING:
    from .media import VideoWriter
    from .parallel import Degrees
    from .pipeline import Pipeline
    from .plan import Plan


def generate_video_df(argv: list[str] | None = None) -> int:
    """generate_video_df.py: diffusion forcing. Returns the exit code; `argv` is the process's own by default."""
    return _run("df", argv)


def generate_video(argv: list[str] | None = None) -> int:
    """generate_video.py: text-to-video, and image-to-video models. Returns the exit code."""
    return _run("t2v", argv)


class _Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come."""


@dataclass
class _Job:
    """A run that nothing speaks against; of several processes, all but the first have no record to keep."""

    program: str
    pipe: Pipeline
    plan: Plan
    path: Path
    record: Record | None


def _run(mode: str, argv: list[str] | None) -> int:
    names, called = PROGRAMS[mode], Path(sys.argv[0]).name
    program = called if called in names else names[0]
    old = _handle_signals(_stop)
    try:
        job = _prepare(program, mode, sys.argv[1:] if argv is None else argv)
        return job if isinstance(job, int) else _render(job)
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


def _prepare(program: str, mode: str, argv: list[str]) -> _Job | int:
    """All that can be refused, the quick before the slow: flags, request, output, model, plan."""
    try:
        args = parser(program, mode).parse(argv)
        check_usp(args)
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


def _open(program: str, mode: str, args: argparse.Namespace, request: Request) -> _Job:
    import torch

    from .media import output_path
    from .pipeline import Pipeline

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
        return _Job(program, pipe, plan, Path(), None)
    original = plan.settings.prompt
    if args.prompt_enhancer:
        plan = pipe.plan(_enhanced(request, original, args.device, plan.settings.seed))
    settings = plan.settings
    for note in settings.notes:
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
    job = _Job(program, pipe, plan, path, Record(path, record))
    job.record.begin()
    return job


def _degrees(args: argparse.Namespace) -> Degrees:
    from .parallel import Degrees

    cfg_parallel = True if args.cfg_parallel else False if args.no_cfg_parallel else None
    return Degrees(args.ulysses_degree, args.ring_degree, cfg_parallel)


def _follow(job: _Job) -> int:
    """Do this process's part of what the first one renders and writes."""
    try:
        for _ in job.pipe(job.plan, stream=True).frames:
            pass
        job.pipe.world.close()
    except KeyboardInterrupt as error:
        return _code_of(error)
    except Exception as error:
        return _explain(job, "rendering", error)
    return 0


def _render(job: _Job) -> int:
    if job.record is None:
        return _follow(job)
    from ._progress import ConsoleProgress
    from .media import VideoWriter

    settings, start = job.plan.settings, time.monotonic()
    progress = ConsoleProgress(sum(job.plan.calls))
    writer = result = None
    code = 0
    try:
        result = job.pipe(job.plan, stream=True, progress=progress)
        for chunk in result.frames:
            if writer is None:
                writer = VideoWriter(job.path, settings.fps, settings.height, settings.width)
            writer.write(chunk)
    except (Exception, KeyboardInterrupt) as error:
        progress.close()
        code = _explain(job, progress.current, error)
    progress.close()
    timings = dict(result.timings if result else {}) | {"total": time.monotonic() - start}
    _handle_signals(signal.SIG_IGN)
    code = _finish(job, writer, code, timings)
    if code == 0 and job.pipe.world is not None:
        job.pipe.world.close()
    return code


def _finish(job: _Job, writer: VideoWriter | None, code: int, timings: dict[str, float]) -> int:
    """Close the file, write the record beside it, say where it is and how much of it can be played."""
    from .media import playable_frames

    if writer is None:
        _say(job.program, "no frame was rendered, no file written")
        with contextlib.suppress(OSError):
            job.record.withdraw()
        return code or 1
    try:
        writer.close()
    except RuntimeError as error:
        _say(job.program, f"error: {_one_line(error)}")
        code = code or 1
    # What ffmpeg was given need not have reached the file. Never more, should an older file have withstood.
    frames = min(writer.frames, playable_frames(job.path)) if code else writer.frames
    try:
        job.record.write(code == 0 and frames == job.plan.frames, frames, timings_s=timings)
    except OSError as error:
        _say(job.program, f"the settings could not be saved beside the video: {_one_line(error)}")
    if code:
        _say(job.program, f"{frames} of {job.plan.frames} frames can be played in {job.path}")
    else:
        print(f"{job.path} ({frames} frames, {timings['total']:.1f} s)", flush=True)
    return code


def _explain(job: _Job, stage: str, error: BaseException) -> int:
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
