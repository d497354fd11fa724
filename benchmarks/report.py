"""The README's tables and plots, from committed results alone: `python -m benchmarks.report`.

--readme FILE --write puts each table between <!-- benchmarks:NAME --> and <!-- /benchmarks:NAME --> and draws the
plots beside the results; --check leaves with status 1 where the file's tables are not those of the results.
--base FILE NEW compares two files of rows and leaves with status 1 where something got worse beyond noise.

Of each thing measured the latest row counts. "times ours" is taken within one run, where we were measured beside them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import compare, harness

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

OURS = "skyreels_fast"
EMPTY = "_Not measured yet._"
_MARKED = re.compile(r"(<!-- benchmarks:([\w-]+) -->\n).*?(<!-- /benchmarks:\2 -->)", re.DOTALL)
_WHAT = ("gpu", "model", "resolution", "frames", "mode", "gpus", "layout", "offload", "vram", "precision",
         "attention_asked", "guidance", "ar_step", "causal_block_size", "teacache", "base_frames", "overlap",
         "weights")  # fmt: skip
_IMPLS = (
    OURS,
    "diffusers-accelerated",
    "diffusers",
    "diffusers-compiled",
    "reference",
    "lightx2v",
    "lightx2v-compiled",
)


def committed_rows(directory: Path) -> list[Row]:
    """Rows of the *.jsonl files in `directory` that git tracks (all of them where there is no git), the oldest first.

    CPU rows are left out: they say that the benchmarks run, not how fast anything is.
    """
    rows = [row for file in _committed(directory) for row in harness.read(file) if row.get("gpu") != "cpu"]
    return sorted(rows, key=lambda row: row["time"])


def _committed(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.jsonl"))
    git = ["git", "-C", str(directory), "ls-files", "--full-name", "-z", "--", "*.jsonl"]
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return files
    tracked = {Path(name).name for name in listed if name}
    if left_out := [file.name for file in files if file.name not in tracked]:
        print(f"not committed, so left out: {', '.join(left_out)}", file=sys.stderr)
    return [file for file in files if file.name in tracked]


def _latest(rows: Iterable[Row], keys: tuple[str, ...]) -> list[Row]:
    """The last row of each thing measured, in order of these things."""
    last = {tuple(str(row.get(key)) for key in keys): row for row in rows}
    return [last[key] for key in sorted(last)]


def _latest_video(rows: list[Row]) -> list[Row]:
    """The latest video rows, each with `times_ours`, the biggest model last and ourselves before the peers."""
    video = [row for row in rows if row["bench"] == "video"]
    ours = {(row["run_id"], *(row.get(key) for key in _WHAT[:5])): row for row in video if row["impl"] == OURS}
    latest = _latest(video, ("impl", *_WHAT))
    for row in latest:
        beside = ours.get((row["run_id"], *(row.get(key) for key in _WHAT[:5])))
        row["times_ours"] = row["ms_per_forward"] / beside["ms_per_forward"] if beside else None
    order = {name: place for place, name in enumerate(_IMPLS)}
    return sorted(latest, key=lambda row: (*_place(row), order.get(row["impl"], len(order)), row["gpus"]))


def _place(row: Row) -> tuple:
    return row["model"] != "1.3B", row["resolution"], row["frames"], row["mode"], row["offload"], row["teacache"] or 0


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _mode(row: Row) -> str:
    notes = [row["mode"]]
    if row["causal_block_size"]:
        notes.append(f"block {row['causal_block_size']}, ar_step {row['ar_step']}")
    if row["teacache"]:
        notes.append(f"TeaCache {row['teacache']:g}")
    if row["offload"]:
        notes.append("offload")
    if row.get("vram"):
        notes.append(f"--vram {row['vram']:g}")
    if row.get("guidance") == 1:
        notes.append("no guidance")
    return ", ".join(notes)


def _table(rows: list[Row], texts: Columns, numbers: Columns) -> str:
    """A Markdown table, columns by their heads, with a line on where its numbers come from."""
    if not rows:
        return EMPTY
    columns = {**texts, **numbers}
    rule = ["---"] * len(texts) + ["---:"] * len(numbers)
    lines = [list(columns), rule, *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _source(rows)])


def _source(rows: list[Row]) -> str:
    runs = {}
    for row in rows:
        commit = (row["commit"] or "unknown")[:10] + ("+changes" if row["dirty"] else "")
        source = row.get("source") or f"commit {commit}"
        runs[f"{row['gpu']}, torch {row['versions']['torch']}, {row['time'][:10]}, {source}"] = None
    return f"{'; '.join(runs)}."


_VIDEO: Columns = {
    "model": lambda row: row["model"],
    "video": lambda row: f"{row['resolution']}, {row['frames']} frames",
    "mode": _mode,
    "GPUs": lambda row: str(row["gpus"]),
}


def _column(key: str, digits: int = 2) -> Callable[[Row], str]:
    return lambda row: _number(row[key], digits)


def denoise_peak(row: Row) -> float | None:
    """GiB while denoising, which is all that the peers do."""
    return row.get("peaks_gib", {}).get("denoise", [row["peak_allocated_gib"]])[0]


def forward_table(rows: list[Row]) -> str:
    """One forward by us and by the peers."""
    texts = _VIDEO | {"by": lambda row: row["impl"], "attention": lambda row: row["attention"] or ""}
    numbers = {"ms a forward": _column("ms_per_forward", 0), "times ours": _column("times_ours")}
    numbers |= {"s a step": _column("s_per_step"), "peak GiB": lambda row: _number(denoise_peak(row), 1)}
    plain = [row for row in rows if row["bench"] == "video" and row["gpus"] == 1 and not row["offload"]]
    return _table(_latest_video(plain), texts, numbers)


def stages_table(rows: list[Row]) -> str:
    """Our stages."""
    numbers = {"text s": _column("text_s"), "s a step": _column("s_per_step")}
    numbers |= {"VAE decode s": _column("vae_decode_s"), "VAE encode s": _column("vae_encode_s")}
    numbers |= {"peak GiB": _column("peak_allocated_gib", 1), "reserved GiB": _column("peak_reserved_gib", 1)}
    return _table([row for row in _latest_video(rows) if row["impl"] == OURS], _VIDEO, numbers)


def parallel_table(rows: list[Row]) -> str:
    """Several GPUs beside one, of what was measured on several."""
    ours = [row for row in _latest_video(rows) if row["impl"] == OURS]
    single = {_alike(row): row["s_per_step"] for row in ours if row["gpus"] == 1}
    several = {_alike(row) for row in ours if row["gpus"] > 1}

    def times_one(row: Row) -> float | None:
        one = single.get(_alike(row))
        return None if one is None else one / row["s_per_step"]

    def linear(row: Row) -> str:
        return "" if (times := times_one(row)) is None else f"{times / row['gpus']:.0%}"

    layout = {"ulysses × ring × branches": lambda row: " × ".join((row.get("layout") or "1x1x1").split("x"))}
    numbers: Columns = {"s a step": _column("s_per_step"), "times one GPU": lambda row: _number(times_one(row), 2)}
    numbers |= {"of linear": linear, "VAE decode s": _column("vae_decode_s")}
    numbers |= {"peak GiB a GPU": _column("peak_allocated_gib", 1)}
    return _table([row for row in ours if _alike(row) in several], _VIDEO | layout, numbers)


def _alike(row: Row) -> tuple[str, ...]:
    """What rows have in common that differ in their GPUs alone."""
    return tuple(str(row.get(key)) for key in _WHAT if key not in ("gpus", "layout"))


def ops_table(rows: list[Row]) -> str:
    """Each kernel that is no yardstick itself; its rate is what bounds it, bytes or arithmetic."""

    def rate(row: Row) -> str:
        return f"{row['gbps']:,.0f} GB/s" if harness.memory_bound(row) else f"{row['tflops']:,.0f} TFLOP/s"

    latest = _latest((row for row in rows if row["bench"] == "ops"), ("op", "variant", "dtype", "shape", "impl", "gpu"))
    texts: Columns = {
        "op": lambda row: " ".join(filter(None, (row["op"], row["variant"] and f"({row['variant']})"))),
        "shape": lambda row: "×".join(map(str, row["shape"])),
        "dtype": lambda row: row["dtype"],
        "kernel": lambda row: row["impl"],
    }
    numbers: Columns = {
        "µs": _column("us_median", 0),
        "rate": rate,
        "of copy": lambda row: f"{row['share_of_copy']:.0%}" if harness.memory_bound(row) else "",
        "× eager": _column("x_eager"),
        "× compiled": _column("x_compiled"),
    }
    return _table([row for row in latest if row["impl"] not in compare.YARDSTICKS], texts, numbers)


TABLES = {"forward": forward_table, "stages": stages_table, "parallel": parallel_table, "ops": ops_table}


def blocks(rows: list[Row], results: Path, readme: Path) -> dict[str, str]:
    """What stands between the markers of each name."""
    from benchmarks.plots import PLOTS

    texts = {name: table(rows) for name, table in TABLES.items()}
    there = os.path.relpath(results, readme.parent)
    lines = [f"![{title}]({there}/{name}.png)" for name, (title, *_) in PLOTS.items()]
    texts["plots"] = "\n".join(lines) if any(row["bench"] == "video" for row in rows) else EMPTY
    return texts


def filled(text: str, texts: dict[str, str]) -> str:
    """`text` with every marked block renewed. Raises ValueError where it has none, or one that is not known."""
    names = [match[2] for match in _MARKED.finditer(text)]
    if not names:
        raise ValueError("no <!-- benchmarks:NAME --> … <!-- /benchmarks:NAME --> in it")
    if unknown := [name for name in names if name not in texts]:
        raise ValueError(f"benchmarks:{unknown[0]} is not one of {', '.join(texts)}")
    return _MARKED.sub(lambda match: f"{match[1]}{texts[match[2]]}\n{match[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--readme", type=Path, default=harness.ROOT / "README.md")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="renew the tables in the readme, draw the plots")
    action.add_argument("--check", action="store_true", help="status 1 where the readme's tables are others")
    parser.add_argument("--base", type=Path, metavar="FILE", help="compare NEW with this file of rows")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW")
    args = parser.parse_args(argv)
    if (args.base is None) != (args.new is None):
        parser.error("--base FILE and NEW come together")
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.base is not None:
        text, worse = compare.report(harness.read(args.base), harness.read(args.new))
        print(text)
        return int(worse)
    rows = committed_rows(args.results)
    texts = blocks(rows, args.results, args.readme)
    if not (args.write or args.check):
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in texts.items()))
        return 0
    before = args.readme.read_text(encoding="utf-8")
    try:
        after = filled(before, texts)
    except ValueError as error:
        raise ValueError(f"{args.readme}: {error}") from None
    if args.check:
        if before != after:
            print(f"{args.readme}: its tables are not those of {args.results}: run benchmarks.report --write")
        return int(before != after)
    args.readme.write_text(after, encoding="utf-8")
    from benchmarks.plots import draw

    draw([row | {"peak_allocated_gib": denoise_peak(row)} for row in rows if row["bench"] == "video"], args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
