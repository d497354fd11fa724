"""The two commands: flags → request → plan → video, with what there is to say on the way. The only room that prints.

Exit codes: 0 done; 1 it failed while rendering; 2 it was refused before any weight was loaded; 130 Ctrl-C.
Whatever was rendered before a failure or a Ctrl-C is in a playable file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._flags import FIELDS, UsageError, parser, request_values
from ._sidecar import describe_run, write_json
from .request import Request

if TYPE_CHECKING:
    from .media import VideoWriter
    from .pipeline import Pipeline
    from .plan import Plan


def generate_video_df(argv: list[str] | None = None) -> int:
    """generate_video_df.py: diffusion forcing. Returns the exit code; `argv` is the process's own by default."""
    return _run("generate_video_df.py", "df", argv)


def generate_video(argv: list[str] | None = None) -> int:
    """generate_video.py: text-to-video, and image-to-video models. Returns the exit code."""
    return _run("generate_video.py", "t2v", argv)


@dataclass
class _Job:
    """A run that nothing speaks against."""

    program: str
    pipe: Pipeline
    plan: Plan
    path: Path
    record: dict[str, Any]


def _run(program: str, mode: str, argv: list[str] | None) -> int:
    try:
        job = _prepare(program, mode, sys.argv[1:] if argv is None else argv)
        return job if isinstance(job, int) else _render(job)
    except KeyboardInterrupt:
        _say(program, "interrupted")
        return 130


def _prepare(program: str, mode: str, argv: list[str]) -> _Job | int:
    """All that can be refused, the quick before the slow: flags, request, output, model, plan."""
    try:
        args = parser(program, mode).parse(argv)
        _check_usp(args)
        request = Request(**request_values(args))
        _check_output(args)
        _choose_device(args)
        return _open(program, mode, args, request)
    except (ValueError, OSError) as error:
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
    )
    plan = pipe.plan(request)
    original = plan.settings.prompt
    if args.prompt_enhancer:
        plan = pipe.plan(_enhanced(request, original, args.device, plan.settings.seed))
    settings = plan.settings
    for note in settings.notes:
        _say(program, f"note: {_with_flag(note)}")
    print(plan.describe(), flush=True)

    name = output_path(args.outdir, settings.prompt, settings.seed, datetime.datetime.now())
    record = describe_run(program, args, settings)
    if args.prompt_enhancer:
        record["original_prompt"] = original
    return _Job(program, pipe, plan, Path(args.output) if args.output else name, record)


def _render(job: _Job) -> int:
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
        code = _explain(job.program, settings.mode, error)
    progress.close()
    job.record["timings_s"] = dict(result.timings if result else {}) | {"total": time.monotonic() - start}
    return _finish(job, writer, code)


def _finish(job: _Job, writer: VideoWriter | None, code: int) -> int:
    """Close the file, write the record beside it, say where it is."""
    if writer is None:
        _say(job.program, "no frame was rendered, no file written")
        return code or 1
    try:
        writer.close()
    except RuntimeError as error:
        _say(job.program, f"error: {_one_line(error)}")
        code = code or 1
    complete = code == 0 and writer.frames == job.plan.frames
    job.record = {"complete": complete, "video": job.path.name, "frames": writer.frames, **job.record}
    try:
        write_json(job.path.with_suffix(".json"), job.record)
    except OSError as error:
        _say(job.program, f"the settings could not be saved beside the video: {_one_line(error)}")
    if code:
        _say(job.program, f"{writer.frames} of {job.plan.frames} frames are saved in {job.path}")
    else:
        print(f"{job.path} ({writer.frames} frames, {job.record['timings_s']['total']:.1f} s)", flush=True)
    return code


def _explain(program: str, mode: str, error: BaseException) -> int:
    """Say why rendering ended, in one line where the cause is known; the exit code."""
    import torch

    from .checkpoint import CheckpointError
    from .media import VideoError

    if isinstance(error, KeyboardInterrupt):
        _say(program, "interrupted")
        return 130
    if isinstance(error, torch.cuda.OutOfMemoryError):
        wanted = re.search(r"to allocate [\d.]+ \w+", str(error))
        frames = "--base_num_frames" if mode == "df" else "--num_frames"
        _say(program, f"error: GPU memory is full{f' (it tried {wanted[0]})' if wanted else ''}: try --offload, a "
             f"smaller size or fewer {frames}")  # fmt: skip
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


def _check_usp(args: argparse.Namespace) -> None:
    if not args.use_usp:
        return
    if args.seed is None:
        raise UsageError("--use_usp needs --seed: all GPUs must start from the same noise")
    if args.prompt_enhancer:
        raise UsageError("--use_usp and --prompt_enhancer exclude each other: enhance the prompt beforehand with "
                         "python -m skyreels_fast.enhance")  # fmt: skip
    raise UsageError("--use_usp needs several GPUs, which this version does not support yet; run without it")


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
    check_writable(args.output or Path("result") / args.outdir / "video.mp4")
    try:
        check_encoder()
    except VideoError as error:
        raise UsageError(str(error)) from None


def _choose_device(args: argparse.Namespace) -> None:
    """Fill in --device and --dtype. Raises UsageError for a device that is not there."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise UsageError(f"--device {args.device!r}: must be cuda, cuda:N or cpu")
    index = int(args.device.partition(":")[2] or 0)
    if args.device != "cpu" and index >= torch.cuda.device_count():
        raise UsageError(f"--device {args.device!r}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; "
                         "run with --device cpu or another one")  # fmt: skip
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")


def _with_flag(message: str) -> str:
    """A message about a field (`video='x.mp4': ...`) as one about its flag (`--video_path 'x.mp4': ...`)."""
    found = re.match(r"(\w+)(=|(?=: ))", message)
    if not found or found[1] not in FIELDS:
        return message
    return f"--{FIELDS[found[1]]}{' ' if found[2] else ''}{message[found.end() :]}"


def _one_line(error: BaseException) -> str:
    return _with_flag(" ".join(str(error).split()) or type(error).__name__)


def _say(program: str, text: str) -> None:
    print(f"{program}: {text}", file=sys.stderr, flush=True)
