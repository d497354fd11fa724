"""The two commands: flags → request → plan → video, with what there is to say. Only this module and `_job` print.

Exit codes: 0 done; 1 it failed while rendering; 2 it was refused before any weight was loaded; 130 Ctrl-C; 143 SIGTERM;
129 SIGHUP. Whatever was rendered before a failure or one of these signals is in a playable file, and what was computed
is in a folder beside it, from which --resume goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ._flags import PROGRAMS, check_together, parser, request_values, with_flags
from ._job import Job, Part, alone, begin, follow, interrupted, one_line, render, say
from ._resume import begun_with, check_no_run, resumed, run_directory
from ._sidecar import Record, describe_run, repeated_flags
from ._signals import Stopped, handle_signals, stop
from ._values import UsageError, device_name, own_device
from ._watch import Watch
from .request import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from .parallel import Degrees


def generate_video_df(argv: list[str] | None = None) -> int:
    """generate_video_df.py: diffusion forcing. Returns the exit code; `argv` is the process's own by default."""
    return _run("df", argv)


def generate_video(argv: list[str] | None = None) -> int:
    """generate_video.py: text-to-video, and image-to-video models. Returns the exit code."""
    return _run("t2v", argv)


def _run(mode: str, argv: list[str] | None) -> int:
    names, called = PROGRAMS[mode], Path(sys.argv[0]).name
    program = called if called in names else names[0]
    old = handle_signals(stop, signal.SIGINT)
    try:
        with Watch(partial(_stopped, program, None)) as watch:
            job = _prepare(program, mode, sys.argv[1:] if argv is None else argv, watch)
            if isinstance(job, int):
                return job
            return render(job, watch) if isinstance(job, Job) else follow(job, watch)
    except KeyboardInterrupt as error:
        return interrupted(program, error)
    except RuntimeError as error:
        from .parallel import is_lost_peer

        if not is_lost_peer(error):
            raise
        return alone(program)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _prepare(program: str, mode: str, argv: list[str], watch: Watch) -> Part | int:
    """All that can be refused, the quick before the slow: flags, request, output, model, plan.

    What one of several processes refuses, all do: each may find other files, other memory, another network.
    """
    try:
        args = parser(program, mode).parse(argv)
        check_together(args)
        settled = _meeting() if args.use_usp else _alone
    except (ValueError, OSError) as error:
        return _refuse(program, [one_line(error)])
    part = fault = None
    try:
        part = _part(program, mode, args, argv)
    except (ValueError, OSError) as error:
        fault = error
    watch.end = partial(_stopped, program, part)
    with contextlib.ExitStack() as undone:
        undone.callback(_withdraw, part)
        # A RefusedError is what has been settled already.
        reasons = getattr(fault, "reasons", None) or settled(fault and one_line(fault))
        if reasons:
            return _refuse(program, reasons)
        undone.pop_all()
    return part


def _stopped(program: str, part: Part | None, number: int) -> int:
    """What there is to do after a signal before rendering has begun; the exit code."""
    _withdraw(part)
    return interrupted(program, Stopped(number))


def _withdraw(part: Part | None) -> None:
    """Leave nothing of a run that has begun and comes to nothing."""
    if isinstance(part, Job) and not part.resumed:
        part.run.withdraw()
        with contextlib.suppress(OSError):
            part.record.withdraw()


def _meeting() -> Callable[[str | None], list[str]]:
    from .parallel import meet, settled

    meet()
    return settled


def _alone(reason: str | None) -> list[str]:
    """What speaks against a run of one process."""
    return [reason] if reason else []


def _refuse(program: str, reasons: list[str]) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all of a host know the same
        for reason in reasons:
            say(program, f"error: {reason}")
    return 2


def _part(program: str, mode: str, args: argparse.Namespace, argv: list[str]) -> Part:
    if args.resume:
        args = resumed(args.resume, mode, parser(program, mode), argv)
    request = Request(**request_values(args))
    if not args.use_usp or os.environ.get("RANK", "0") == "0":  # which alone writes
        _check_output(args)
    args.device = device_name(args.device)
    if args.use_usp:
        args.device = own_device(args.device)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.vae_dtype = args.vae_dtype or ("float32" if args.device == "cpu" else "bfloat16")
    _check_attention(args)
    return _open(program, mode, args, request)


def _open(program: str, mode: str, args: argparse.Namespace, request: Request) -> Part:
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
    if not pipe.machine.leads:
        return Part(program, pipe, plan)
    original = plan.settings.prompt
    if args.prompt_enhancer:
        plan = pipe.plan(_enhanced(request, original, args.device, plan.settings.seed))
    settings = plan.settings
    for note in plan.notes:
        say(program, f"note: {with_flags(note)}")
    if args.offload and args.device == "cpu":
        say(program, "note: --offload has no effect on cpu")
    print(plan.describe(), flush=True)
    if pipe.machine.world is not None:
        print(f"{pipe.machine.world.size} processes: {pipe.machine.layout(plan)}", flush=True)
    if shortage := pipe.machine.memory_note(plan):
        say(program, f"warning: {shortage}")

    name = output_path(args.outdir, settings.prompt, settings.seed, datetime.datetime.now())
    record = describe_run(program, args, settings)
    if args.prompt_enhancer:
        record["original_prompt"] = original
    if pipe.machine.world is not None:
        record["parallel"] = {"processes": pipe.machine.world.size} | pipe.machine.layout(plan)._asdict()
    path = Path(args.output) if args.output else name
    film = Film(path, settings.fps, settings.height, settings.width, run_directory(path))
    every_s = {} if args.save_every is None else {"every_s": args.save_every}
    run = Run(run_directory(path), film, **every_s)
    job = Job(program, pipe, plan, path, Record(path, record), film, run, bool(args.resume))
    made_with = {"torch": record["versions"]["torch"], "device": record["device"]}
    begun = begun_with(program, mode, path, repeated_flags(args, settings), made_with)
    try:
        begin(job, begun)
    except BaseException:
        if not job.resumed:
            job.run.withdraw()
        raise
    return job


def _degrees(args: argparse.Namespace) -> Degrees:
    from .parallel import Degrees

    cfg_parallel = True if args.cfg_parallel else False if args.no_cfg_parallel else None
    return Degrees(args.ulysses_degree, args.ring_degree, cfg_parallel)


def _enhanced(request: Request, prompt: str, device: str, seed: int) -> Request:
    from .enhance import enhance

    better = enhance(prompt, device=device, seed=seed)
    print(f"original prompt: {prompt}\nenhanced prompt: {better}", flush=True)
    return dataclasses.replace(request, prompt=better, seed=seed)


def _check_attention(args: argparse.Namespace) -> None:
    """Raises UsageError for a backend that is not there."""
    import torch

    from .ops import choose_attention

    try:
        choose_attention(args.attention, args.device, getattr(torch, args.dtype))
    except ValueError as error:
        raise UsageError(f"--attention {args.attention}: {str(error).removeprefix('attention: ')}") from None


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
