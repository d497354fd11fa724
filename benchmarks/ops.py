"""What each fused op costs: `python -m benchmarks.ops [--op NAME …]`, a line and a row for each shape and backend.

Every op runs on the inputs that a DiT gives it, at 540P and 97 frames (25 x 34 x 60 = 51,000 tokens) in the widths of
1.3B and 14B: on each backend there is, as plain torch ("ref") and as torch.compile of that ("ref-compiled"). What it
gave is held against float64 before it is timed; an op that errs is refused, and the exit status is 1.

GB/s and TFLOP/s come from the op's own cost model. share_of_copy: of the GB/s of a device-to-device copy measured in
the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.cases import CASES, Case
from benchmarks.correctness import RedError
from benchmarks.harness import Timing
from benchmarks.models import GRID
from benchmarks.options import Parser, at_least_one

COMPILED = "ref-compiled"


def measured(case: Case, device: torch.device, *, compile: bool) -> tuple[dict[str, Timing], list[str]]:
    """The Timing of each implementation that is right, the plain torch first; and a line for each that was left out."""
    timings: dict[str, Timing] = {}
    refused: list[str] = []
    eager, plain = case.eager
    runs: dict[str, Callable[[], Any]] = {eager: plain}
    if compile and case.compiles:
        torch._dynamo.reset()  # else widths add up to the compiler's limit of recompilations
        runs[COMPILED] = torch.compile(plain, dynamic=False)
    for backend in case.backends:
        runs[backend] = lambda backend=backend: case.function(**case.args, backend=backend)
    for name, run in runs.items():
        try:
            if name in case.backends:
                case.check(name, run())
            timings[name] = harness.measure(run, device)
        except RedError as error:
            refused.append(f"REFUSED  {error}")
        except Exception as error:  # one backend that fails must not take the others' numbers along
            if not (isinstance(error, ValueError) and "is not available" in str(error)):
                reason = (str(error).splitlines() or [""])[0][:200]
                refused.append(f"FAILED   {case.label} {name}: {type(error).__name__}: {reason}")
    return timings, refused


def rows_of(case: Case, timings: dict[str, Timing], copy_gbps: float, device: torch.device) -> list[dict[str, Any]]:
    """One row for each implementation."""
    eager = timings.get(case.eager[0])
    compiled = timings.get(COMPILED)
    bytes_moved, flops = case.cost
    rows = []
    for impl, timing in timings.items():
        gbps = bytes_moved / timing.median / 1e9
        rows.append(
            {
                "bench": "ops",
                "impl": impl,
                "op": case.op,
                "variant": case.variant,
                "shape": list(case.shape),
                "frames": case.frames,
                "block_tokens": case.args.get("block_tokens"),
                "dtype": case.dtype,
                "us_median": timing.median * 1e6,
                "us_p20": timing.p20 * 1e6,
                "us_p80": timing.p80 * 1e6,
                "repeats": timing.repeats,
                "bytes": bytes_moved,
                "flops": flops,
                "gbps": gbps,
                "tflops": flops / timing.median / 1e12,
                "copy_gbps": copy_gbps,
                "share_of_copy": gbps / copy_gbps,
                "x_eager": eager.median / timing.median if eager else None,
                "x_compiled": compiled.median / timing.median if compiled else None,
                **harness.common(device),
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    what = " ".join(filter(None, (row["op"], row["variant"])))
    shape = "x".join(map(str, row["shape"]))
    if harness.memory_bound(row):
        rate = f"{row['gbps']:7.0f} GB/s {row['share_of_copy']:6.1%} of copy"
    else:
        rate = f"{row['tflops']:7.1f} TFLOP/s {'':12}"
    ratios = [f"{row[key]:6.2f}x {key[2:]}" for key in ("x_eager", "x_compiled") if row[key]]
    spread = f"{row['us_p20']:.1f}-{row['us_p80']:.1f}"
    time = f"{row['us_median']:10.1f} us ({spread:>17})"
    return f"{what:48} {shape:16} {row['impl']:12} {time}  {rate}  {'  '.join(ratios)}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "ops")
    parser.add_argument("--op", nargs="+", choices=sorted(CASES), default=sorted(CASES), help="families (default: all)")
    parser.add_argument("--dim", type=at_least_one, nargs="+", default=[1536, 5120], help="model widths")
    parser.add_argument("--head_dim", type=at_least_one, default=128)
    parser.add_argument("--grid", default="x".join(map(str, GRID)), help="tokens as FxHxW (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile of the references out")
    args = parser.parse_args(argv)
    try:
        grid = tuple(int(part) for part in args.grid.split("x"))
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--grid {args.grid}: give three numbers of at least 1 as FxHxW")
    if wrong := [dim for dim in args.dim if dim % args.head_dim]:
        parser.error(f"--dim {wrong[0]}: is no multiple of the head size {args.head_dim}")

    device, out = args.device, args.out
    print(f"{harness.provenance(device)}; rows go to {out or 'the terminal alone: give --out FILE to keep them'}")
    copy_gbps = harness.copy_gbps(device)
    print(f"device copy: {copy_gbps:.0f} GB/s, read and written")
    all_refused: list[str] = []
    with torch.inference_mode():
        for family in args.op:
            for dim in args.dim:
                for case in CASES[family](grid, dim, args.head_dim, getattr(torch, args.dtype), device):
                    timings, refused = measured(case, device, compile=not args.no_compile)
                    harness.keep(rows_of(case, timings, copy_gbps, device), line, out)
                    if refused:
                        print(*refused, sep="\n", flush=True)
                    all_refused += refused
    return int(bool(all_refused))


if __name__ == "__main__":
    sys.exit(main())
