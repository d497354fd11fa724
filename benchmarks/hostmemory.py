"""Host memory of whole commands against the length of the video: it shall not grow.

    python -m benchmarks.hostmemory                                            # the bundled model, 145 to 1457 frames
    python -m benchmarks.hostmemory --model_id DIRECTORY --frames 257 1457 --base_num_frames 97 --overlap_history 17

Each length runs generate_video_df.py's command in a process of its own; a row holds the peak of that process (its
resident set, as getrusage tells it; the ffmpeg beside it begins anew with each window). The exit code is 1 where a
peak is off the first by more than 5 %.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.options import Parser, at_least_one, frame_count

MIB = 2**20
TOLERANCE = 0.05
# What is freed goes back to the system at once, so that a peak tells what is held and not what malloc keeps for later.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(words: list[str]) -> dict[str, float]:
    """The peak in MiB of the command, run in this process, which has run nothing else."""
    from skyreels_fast import cli

    with tempfile.TemporaryDirectory() as folder:
        code = cli.generate_video_df([*words, "--output", str(Path(folder) / "out.mp4")])
    if code:
        raise SystemExit(code)
    return {"peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB}


def run(words: list[str]) -> dict[str, float]:
    """`measure` in a process of its own. Raises CalledProcessError where the command fails."""
    start = time.monotonic()
    child = [sys.executable, "-m", "benchmarks.hostmemory", "--in_this_process", *words]
    done = subprocess.run(
        child, stdout=subprocess.PIPE, text=True, check=True, cwd=harness.ROOT, env=os.environ | MALLOC
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.monotonic() - start}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--in_this_process"]:
        print(json.dumps(measure(argv[1:])))
        return 0
    parser = Parser(__doc__, "hostmemory", device=False)
    parser.add_argument("--model_id", default="tiny")
    parser.add_argument("--frames", type=frame_count, nargs="+", default=[145, 257, 289, 577, 1457])
    parser.add_argument("--base_num_frames", type=frame_count, default=49)
    parser.add_argument("--overlap_history", type=int, default=17)
    parser.add_argument("--inference_steps", type=at_least_one, default=1)
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args(argv)
    device, out = args.device, args.out
    names = ("model_id", "base_num_frames", "overlap_history", "inference_steps", "height", "width")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += ["--seed", "0", "--device", device.type, *(["--offload"] if args.offload else [])]
    print(harness.provenance(device))
    peaks = []
    for length in args.frames:
        try:
            found = run([*words, "--num_frames", str(length)])
        except subprocess.CalledProcessError as error:  # the command has said why, unless a signal ended it
            if error.returncode < 0:
                print(f"error: signal {-error.returncode} ended the command for {length} frames", file=sys.stderr)
            return abs(error.returncode)
        peaks.append(found["peak_host_mib"])
        row = {"bench": "hostmemory", **harness.common(device), **settings, "offload": args.offload, "frames": length}
        harness.append(out, row | found)
        off = peaks[-1] / peaks[0] - 1
        print(f"{length} frames: {peaks[-1]:.0f} MiB ({off:+.1%}), {found['seconds']:.0f} s", flush=True)
    return int(any(abs(peak / peaks[0] - 1) > TOLERANCE for peak in peaks))


if __name__ == "__main__":
    sys.exit(main())
