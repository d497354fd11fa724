"""What a video costs: `python -m benchmarks.video --model 14B --resolution 540P --frames 97 --mode sync --steps 3`.

A model of a published size, with random weights made on the GPU, renders through the pipeline that users call. Text
and loading, which come once, are timed in a first video of one step that also warms the rest up; denoising and VAE in a
second one; then the encoding of as many frames. Seconds and peak memory are taken of each stage. --peer runs the same
forward by others, in the same process: rows that share their run_id were measured beside each other.

s_per_step and ms_per_forward are medians over the rows of the schedule, each window's first left out (means where rows
differ in their work: TeaCache, staggered causal blocks, several windows). calls: of the model; computed_calls: those
that TeaCache did not pass over, which takes a trained model's time embedding, and so --weights. total_s: all but the
loading, which takes for random weights as long as they take to make.

Several GPUs: torchrun --nproc_per_node=N -m benchmarks.video --gpus N …; layout is ulysses x ring x guidance branches,
ms_per_forward half of a step with two branches even where they run at once, ranks_peak_gib the peaks of each process.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import Any

import torch

from benchmarks import floor, harness, peers
from benchmarks.models import MODELS, MODES, Work, pipeline_mode
from benchmarks.options import Parser, at_least_one, frame_count, is_chief
from skyreels_fast.config import PIXEL_MULTIPLE, RESOLUTIONS
from skyreels_fast.parallel import require

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
# fmt: off
KEYS = (
    "bench", "impl", "model", "resolution", "frames", "mode", "gpus", "offload", "precision", "attention",
    "ms_per_forward", "s_per_step", "text_s", "vae_encode_s", "vae_decode_s", "load_s", "total_s",
    "peak_allocated_gib", "peak_reserved_gib", "run_id", "gpu", "versions", "commit",
)
# fmt: on


def row_of(impl: str, work: Work, values: dict[str, Any], device: torch.device, **given: Any) -> dict[str, Any]:
    """A row with every key; what was not measured is null."""
    known = {"bench": "video", "impl": impl, **work.keys(), **given, **values, **harness.common(device)}
    return {**{key: known.get(key) for key in KEYS}, **known}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one run, side by side with the first."""
    first = rows[0]["ms_per_forward"]
    lines = [f"{'':20}{'ms a forward':>14}{'times ours':>12}{'s a step':>10}{'peak GiB':>10}  attention"]
    for row in rows:
        peak = row["peak_allocated_gib"]
        lines.append(
            f"{row['impl']:20}{row['ms_per_forward']:14.1f}{row['ms_per_forward'] / first:12.3f}"
            f"{row['s_per_step']:10.3f}{f'{peak:.1f}' if peak else '-':>10}  {row['attention']}"
        )
    if rows[0]["computed_calls"] < rows[0]["calls"]:
        lines.append(f"TeaCache: {rows[0]['computed_calls']} of {rows[0]['calls']} model calls were computed")
    if least := rows[0]["floor_ms"]:
        lines.append(f"{'floor':20}{least:14.1f}{least / first:12.3f}{'':22}(matrix products and attention alone)")
    return "\n".join(lines)


def _size(text: str) -> tuple[int, int]:
    if text in RESOLUTIONS:
        return RESOLUTIONS[text]
    try:
        height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--resolution {text}: give {', '.join(RESOLUTIONS)} or HEIGHTxWIDTH") from None
    if height < 1 or width < 1 or height % PIXEL_MULTIPLE or width % PIXEL_MULTIPLE:
        raise ValueError(f"--resolution {text}: height and width must be multiples of {PIXEL_MULTIPLE}")
    return height, width


def _check_together(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would do nothing beside the others."""
    rules = (
        (("ar_step", "causal_block_size"), _staggered(args), "--mode async or causal"),
        (("base_frames", "overlap"), pipeline_mode(args.mode) == "df", "--mode sync, async or causal"),
        (("overlap",), args.base_frames is not None, "--base_frames: one window overlaps nothing"),
        (("use_ret_steps",), args.teacache is not None, "--teacache"),
        (("teacache",), args.weights is not None, "--weights: a random time embedding changes so much from row to row "
         "that every call is computed"),
        (("ulysses_degree", "ring_degree", "cfg_parallel"), args.gpus > 1, "--gpus of 2 or more"),
        (("peer",), args.gpus == 1, "--gpus 1: a peer runs on one GPU"),
    )  # fmt: skip
    for names, fits, needs in rules:
        for name in names:
            if not fits and (value := getattr(args, name)) is not None:
                raise ValueError(f"--{'no_' if value is False else ''}{name} needs {needs}")
    if args.base_frames is not None and args.base_frames >= args.frames:
        raise ValueError(f"--base_frames {args.base_frames}: --frames {args.frames} are one window; leave it out")


def _staggered(args: argparse.Namespace) -> bool:
    return args.mode in ("async", "causal")


def work_of(args: argparse.Namespace, device: torch.device) -> Work:
    """Raises ValueError for what does not fit together, in one line."""
    _check_together(args)
    height, width = _size(args.resolution)
    # Few steps need a small stagger for as many blocks to be under way at once as with the usual 5 of 50 steps.
    ar_step = args.ar_step if args.ar_step is not None else min(5, max(1, args.steps // 5)) * (args.mode == "async")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    return Work(
        model=args.model,
        mode=args.mode,
        resolution=args.resolution,
        height=height,
        width=width,
        frames=args.frames,
        steps=args.steps,
        ar_step=ar_step,
        block=(args.causal_block_size or 5) if _staggered(args) else None,
        dtype=PRECISIONS[precision],
        guidance=args.guidance,
        teacache=args.teacache,
        use_ret_steps=bool(args.use_ret_steps),
        base_frames=args.base_frames,
        overlap=args.overlap,
    )


def _gpus(asked: int, device: torch.device) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != world:
        raise ValueError(f"--gpus {asked}, but {world} processes: start it with torchrun --nproc_per_node={asked} -m …")
    if asked > 1:
        require(device)
    return asked


def parser() -> Parser:
    result = Parser(__doc__, "video")
    add = result.add_argument
    add("--model", required=True, choices=MODELS)
    add("--resolution", default="540P", help="540P, 720P or HEIGHTxWIDTH (default: %(default)s)")
    add("--frames", type=frame_count, default=97)
    add("--mode", default="sync", choices=MODES)
    add("--steps", type=at_least_one, default=3, help="solver steps (default: %(default)s)")
    add("--ar_step", type=int, help="rows between blocks (default: async 5, fewer below 25 steps; causal 0)")
    add("--causal_block_size", type=at_least_one, help="latent frames a block, async and causal (default: 5)")
    add("--guidance", type=float, default=6.0, help="1 runs one forward a step in place of two")
    add("--base_frames", type=frame_count, help="frames of a window, for a video longer than one")
    add("--overlap", type=frame_count, help="frames that windows share")
    add("--offload", action="store_true")
    add("--vram", type=float, help="GiB of GPU memory to keep to while denoising")
    add("--attention", help="a backend of ops.attention (default: the one chosen for this GPU)")
    add(
        "--teacache",
        type=float,
        nargs="?",
        const=0.2,
        help="with this threshold (0.2 if none is given); needs --weights",
    )
    add("--use_ret_steps", action="store_true", default=None, help="of TeaCache")
    add("--precision", choices=PRECISIONS, help="default: bf16, on the CPU fp32")
    add("--with_text", action="store_true", help="time the text stage too, on a random UMT5 of the true size")
    add(
        "--weights",
        metavar="MODEL",
        help="a directory, a hub id or tiny in place of random weights, of the shape that "
        "--model and --mode say; load_s is then its loading time",
    )
    add("--no_warm_up", action="store_true", help="leave out the first video, and with it vae_decode_s")
    add("--peer", action="append", choices=peers.PEERS, help="may be given several times")
    add("--gpus", type=at_least_one, default=1)
    add("--ulysses_degree", type=at_least_one)
    add("--ring_degree", type=at_least_one)
    add("--cfg_parallel", action="store_true", default=None, help="default: with an even number of GPUs")
    add("--no_cfg_parallel", dest="cfg_parallel", action="store_false")
    return result


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for. Raises ValueError for what cannot be run."""
    from benchmarks import ours

    device, out, chief = args.device, args.out, is_chief()
    gpus, work = _gpus(args.gpus, device), work_of(args, device)
    asked = args.peer or ()
    least = floor.forward_ms(work.config, work.grid, work.block if work.causal else None, gpu=harness.gpu_name(device))
    prepared = ours.prepare(work, args, device)
    if chief:
        print(harness.provenance(device))
        print(f"plan: {prepared.describe()}; {work.tokens} tokens; peers: {', '.join(asked) or 'none'}", flush=True)
    given = {"gpus": gpus, "offload": args.offload, "vram": args.vram, "attention_asked": args.attention}
    given |= {"floor_ms": least and least / gpus, "weights": "files" if args.weights else "random"}
    rows = [row_of("skyreels_fast", work, prepared.measure(), device, **given)]
    harness.append(out, rows[0])
    prepared.close()
    del prepared
    failed = False
    for peer in asked:
        _free(device)
        if reason := peers.missing(peer, work):
            print(reason)
            continue
        print(f"{peer}: one forward, {'compiling first' if 'compiled' in peer else 'eager'}", flush=True)
        try:
            values = peers.measure(peer, work, device)
        except Exception as error:  # theirs to fail; our row stands
            failed = True
            print(f"{peer} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
            continue
        rows.append(
            row_of(peer, work, values, device, **{**given, "offload": False, "vram": None, "attention_asked": None})
        )
        harness.append(out, rows[-1])
    if chief:
        print(table(rows))
        print(f"rows appended to {out}" if out else "no row was kept: give --out FILE")
    return int(failed)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"out of memory: {str(error).splitlines()[0]} (try --offload, or fewer frames)", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
