"""Bars of what one forward takes, ours beside the peers', for each model and resolution: PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# File name: title, the rows' key, what is on the axis.
PLOTS = {
    "latency": ("One forward", "ms_per_forward", "ms"),
    "memory": ("Peak GPU memory while denoising", "peak_allocated_gib", "GiB"),
}
_COLOURS = {
    "skyreels_fast": "#1b6ca8",
    "diffusers-accelerated": "#7fb2d9",
    "diffusers-compiled": "#8a8f98",
    "diffusers": "#c3c7cd",
    "reference": "#d9b48f",
}


def bars(rows: list[dict[str, Any]], key: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """(groups, heights of each implementation's bars), of the latest rows: one GPU, resident, all frames in step."""
    plain = [
        row
        for row in rows
        if (row["mode"], row["gpus"]) == ("sync", 1) and not (row["offload"] or row.get("vram") or row["teacache"])
    ]
    known = [row for row in plain if row["impl"] in _COLOURS and row.get(key) is not None]
    groups = sorted({_group(row) for row in known})
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
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'skyreels-fast[bench]'") from None
    files = []
    for name, (title, key, unit) in PLOTS.items():
        groups, heights = bars(rows, key)
        if not groups:
            continue
        figure = Figure(figsize=(2 + 1.8 * len(groups), 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(heights)
        for place, (impl, values) in enumerate(heights.items()):
            at = [group + width * (place - (len(heights) - 1) / 2) for group in range(len(groups))]
            drawn = axes.bar(at, [value or 0 for value in values], width, label=impl, color=_COLOURS[impl])
            axes.bar_label(drawn, [f"{value:,.0f}" if value else "" for value in values], fontsize=8)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(unit)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=120, metadata={"Software": None})
    return files
