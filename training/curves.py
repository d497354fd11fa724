"""Plots the losses of the bundled model: `python -m training.curves` writes training/curves/loss.png."""

from __future__ import annotations

import json
from pathlib import Path

CURVES = Path(__file__).parent / "curves"


def _losses(path: Path) -> tuple[list[float], list[float]]:
    """(minutes, loss) of the rows of a run's JSON lines that hold a loss."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return [row["elapsed_s"] / 60 for row in rows], [row["loss"] for row in rows]


def main() -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"vae": "VAE: reconstruction and KL", "df": "DiT: velocity, by frame noise level"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.semilogy(*_losses(CURVES / f"{name}.jsonl"), linewidth=1)
        axis.set(title=title, xlabel="minutes on one H200", ylabel="loss")
    figure.savefig(CURVES / "loss.png", dpi=110)


if __name__ == "__main__":
    main()
