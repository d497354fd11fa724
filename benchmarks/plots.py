"""Bars of what one forward takes, ours beside the peers', for each model and resolution: PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import OURS, Row, unguided

# File name: title, the rows' key, what is on the axis, the numbers on the bars.
PLOTS = {
    "latency": ("One forward", "ms_per_forward", "ms (with guidance: half of a step)", "{:,.0f}"),
    "memory": ("Peak GPU memory while denoising", "peak_allocated_gib", "GiB", "{:.1f}"),
}
_COLOURS = {
    OURS: "#1b6ca8",
    "diffusers-accelerated": "#7fb2d9",
    "diffusers-compiled": "#8a8f98",
    "diffusers": "#c3c7cd",
    "reference": "#d9b48f",
    "lightx2v": "#b59a7a",
}
_LABELS = {"lightx2v": "lightx2v (T2V)"}  # where it is not the implementation's name


class Group(NamedTuple):
    """What stands side by side: lone forwards, or where `guided` halves of a step, of which ours share work."""

    model: str
    resolution: str
    frames: int
    guided: bool

    @classmethod
    def of(cls, row: Row) -> Group:
        return cls(row["model"], row["resolution"], row["frames"], not unguided(row))

    def __str__(self) -> str:
        guidance = "with guidance" if self.guided else "no guidance"
        return f"{self.model} {self.resolution}\n{self.frames} frames, {guidance}"


def bars(rows: list[Row], key: str) -> tuple[list[Group], dict[str, list[float | None]]]:
    """(groups, heights of each implementation's bars): one GPU, resident, all frames in step.

    A group is the latest run of its size in which a peer was measured beside us, one with guidance only where there is
    none without; others' forwards, which were measured apart (`source`), stand there with their best, in whichever mode
    they have.
    """
    plain = [row for row in rows if row["gpus"] == 1 and not (row["offload"] or row.get("vram") or row["teacache"])]
    plain = [row for row in plain if row.get("source") or row["mode"] == "sync"]
    known = sorted((row for row in plain if row.get(key) is not None), key=lambda row: row["time"])
    runs = {Group.of(row): row["run_id"] for row in known if row["impl"] != OURS and not row.get("source")}
    groups = sorted(group for group in runs if not group.guided or group._replace(guided=False) not in runs)
    heights: dict[str, list[float | None]] = {impl: [None] * len(groups) for impl in _COLOURS}
    for row in known:
        if (group := Group.of(row)) not in groups:
            continue
        if row.get("source"):
            values, place = heights[row["impl"].removesuffix("-compiled")], groups.index(group)
            values[place] = min(row[key], values[place] or row[key])
        elif row["run_id"] == runs[group]:
            heights[row["impl"]][groups.index(group)] = row[key]
    return groups, {impl: values for impl, values in heights.items() if any(values)}


def draw(rows: list[Row], directory: Path) -> list[Path]:
    """The plots that there are rows for. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("plots need matplotlib: pip install '.[bench]'") from None
    files = []
    for name, (title, key, axis, numbers) in PLOTS.items():
        groups, heights = bars(rows, key)
        if not groups:
            continue
        figure = Figure(figsize=(1.5 + 2.2 * len(groups), 3.6), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for place, (group, axes) in enumerate(zip(groups, panels, strict=True)):
            there = {impl: values[place] for impl, values in heights.items() if values[place] is not None}
            drawn = axes.bar(list(there), list(there.values()), color=[_COLOURS[impl] for impl in there])
            axes.bar_label(drawn, fmt=numbers, fontsize=8)
            axes.set_xticks([], [])
            axes.set_xlabel(str(group))
            axes.spines[["top", "right"]].set_visible(False)
        figure.supylabel(axis, fontsize=10)
        figure.suptitle(title)
        patches = [Patch(color=_COLOURS[impl], label=_LABELS.get(impl, impl)) for impl in heights]
        figure.legend(handles=patches, frameon=False, loc="outside lower center", ncols=len(patches), fontsize=8)
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=120, metadata={"Software": None})
    return files
