"""Bars of what one forward takes, ours beside the peers', for each model and resolution: PNG files."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables import OURS, Row

# File name: title, the rows' key, what is on the axis.
PLOTS = {
    "latency": ("One forward", "ms_per_forward", "ms"),
    "memory": ("Peak GPU memory while denoising", "peak_allocated_gib", "GiB"),
}
_FORMATS = {"ms": "{:,.0f}", "GiB": "{:.1f}"}
_COLOURS = {
    OURS: "#1b6ca8",
    "diffusers-accelerated": "#7fb2d9",
    "diffusers-compiled": "#8a8f98",
    "diffusers": "#c3c7cd",
    "reference": "#d9b48f",
    "lightx2v": "#b59a7a",
}


def bars(rows: list[Row], key: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """(groups, heights of each implementation's bars): one GPU, resident, all frames in step.

    A group is the latest run of its size in which a peer was measured beside us; others' forwards, which were measured
    apart (`source`), stand there with their best, in whichever mode they have.
    """
    plain = [row for row in rows if row["gpus"] == 1 and not (row["offload"] or row.get("vram") or row["teacache"])]
    plain = [row for row in plain if row.get("source") or row["mode"] == "sync"]
    known = sorted((row for row in plain if row.get(key) is not None), key=lambda row: row["time"])
    runs = {_group(row): row["run_id"] for row in known if row["impl"] != OURS and not row.get("source")}
    groups = sorted(runs)
    heights: dict[str, list[float | None]] = {impl: [None] * len(groups) for impl in _COLOURS}
    for row in known:
        if (group := _group(row)) not in runs:
            continue
        if row.get("source"):
            values, place = heights[row["impl"].removesuffix("-compiled")], groups.index(group)
            values[place] = min(row[key], values[place] or row[key])
        elif row["run_id"] == runs[group]:
            heights[row["impl"]][groups.index(group)] = row[key]
    return groups, {impl: values for impl, values in heights.items() if any(values)}


def _group(row: Row) -> str:
    return f"{row['model']} {row['resolution']}\n{row['frames']} frames"


def draw(rows: list[Row], directory: Path) -> list[Path]:
    """The plots that there are rows for. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("plots need matplotlib: pip install '.[bench]'") from None
    files = []
    for name, (title, key, unit) in PLOTS.items():
        groups, heights = bars(rows, key)
        if not groups:
            continue
        figure = Figure(figsize=(1.5 + 2.2 * len(groups), 3.6), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for place, (group, axes) in enumerate(zip(groups, panels, strict=True)):
            there = {impl: values[place] for impl, values in heights.items() if values[place] is not None}
            drawn = axes.bar(list(there), list(there.values()), color=[_COLOURS[impl] for impl in there])
            axes.bar_label(drawn, fmt=_FORMATS[unit], fontsize=8)
            axes.set_xticks([], [])
            axes.set_xlabel(group)
            axes.spines[["top", "right"]].set_visible(False)
        figure.supylabel(unit, fontsize=10)
        figure.suptitle(title)
        patches = [Patch(color=_COLOURS[impl], label=impl) for impl in heights]
        figure.legend(handles=patches, frameon=False, loc="outside lower center", ncols=len(patches), fontsize=8)
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=120, metadata={"Software": None})
    return files
