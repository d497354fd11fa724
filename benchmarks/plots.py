"""Bars of what one forward takes, ours beside the peers', for each model and resolution: PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# File name: title, the rows' key, what is on the axis.
PLOTS = {
    "latency": ("One forward", "ms_per_forward", "ms"),
    "memory": ("Peak GPU memory while denoising", "peak_allocated_gib", "GiB"),
}
_FORMATS = {"ms": "{:,.0f}", "GiB": "{:.1f}"}
_COLOURS = {
    "skyreels_fast": "#1b6ca8",
    "diffusers-accelerated": "#7fb2d9",
    "diffusers-compiled": "#8a8f98",
    "diffusers": "#c3c7cd",
    "reference": "#d9b48f",
}


def bars(rows: list[dict[str, Any]], key: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """(groups, heights of each implementation's bars), of the latest rows: one GPU, resident, all frames in step.

    Of what a peer was measured on too.
    """
    plain = [
        row
        for row in rows
        if (row["mode"], row["gpus"]) == ("sync", 1) and not (row["offload"] or row.get("vram") or row["teacache"])
    ]
    known = [row for row in plain if row["impl"] in _COLOURS and row.get(key) is not None]
    beside = {_group(row) for row in known if row["impl"] != "skyreels_fast"}
    known = [row for row in known if _group(row) in beside]
    groups = sorted(beside)
    heights: dict[str, list[float | None]] = {impl: [None] * len(groups) for impl in _COLOURS}
    for row in sorted(known, key=lambda row: row["time"]):
        heights[row["impl"]][groups.index(_group(row))] = row[key]
    return groups, {impl: values for impl, values in heights.items() if any(values)}


def _group(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['resolution']}\n{row['frames']} frames"


def draw(rows: list[dict[str, Any]], directory: Path) -> list[Path]:
    """The plots that there are rows for. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'skyreels-fast[bench]'") from None
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
