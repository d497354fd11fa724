"""The README's tables and plots, from committed results alone: `python -m benchmarks.report`.

--readme FILE --write puts each table between <!-- benchmarks:NAME --> and <!-- /benchmarks:NAME --> and draws the
plots beside the results; --check leaves with status 1 where the file's tables are not those of the results.
--base FILE NEW compares two files of rows and leaves with status 1 where something got worse beyond noise.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import compare, harness
from benchmarks.tables import EMPTY, TABLES, Row, denoise_peak

_MARKED = re.compile(r"(<!-- benchmarks:([\w-]+) -->\n).*?(<!-- /benchmarks:\2 -->)", re.DOTALL)


def committed_rows(directory: Path) -> list[Row]:
    """Rows of the *.jsonl files in `directory` that git tracks (all of them where there is no git), the oldest first.

    CPU rows are left out, save those of fidelity and host memory: they say that a benchmark runs, not how fast it is.
    """
    rows = [row for file in _committed(directory) for row in harness.read(file)]
    rows = [row for row in rows if row.get("gpu") != "cpu" or row["bench"] in ("fidelity", "hostmemory")]
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
