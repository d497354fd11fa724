"""The bundled model's README: what it knows, how it was made, what it gets right."""

from __future__ import annotations

import json
from pathlib import Path

from training.prompts import BACKGROUNDS, COLOURS, HELDOUT_SCENES, MOTIONS, SHAPES

_TEXT = """# The bundled model

A small diffusion forcing model in SkyReels-V2's published layout: a DiT of dim {dim} and {num_layers} layers, a causal
3D VAE of base dim 16, a UMT5 text encoder of dim {text_dim}. It was trained from scratch on clips drawn by `training/`
(see its README for the commands), is licensed as this project is, and serves tests, examples and benchmarks.

It makes videos of {height}×{width} pixels (height × width), {num_frames} frames at {fps} frames a second, of one shape
that moves at a constant speed and bounces off the borders. Its prompts read

    a COLOUR SHAPE MOTION on a BACKGROUND background

| | |
|---|---|
{attributes}

Other words are unknown to it; the empty prompt gives any of these. Its defaults: {inference_steps} steps, guidance
{guidance_scale:g}, shift {shift:g}, an empty negative prompt. It takes a first image, an end image, a video to extend,
and longer videos with `overlap_history=17`.

## What it gets right

{results}

Shares of fixed prompts, a third of them held-out combinations, as `python -m benchmarks.adherence` judges them:
held-out ones in parentheses.

## Combinations it was not trained on

{heldout}
"""

_NO_RESULTS = "Not measured yet."


def model_card(config: dict, generation: dict, results: Path | None) -> str:
    """Markdown. `results`: a directory of JSON files that benchmarks.adherence wrote, each a row named by its file."""
    tables = (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("background", BACKGROUNDS))
    attributes = "\n".join(f"| {name.upper()} | {', '.join(values)} |" for name, values in tables)
    heldout = "\n".join(f"- {scene.prompt}" for scene in HELDOUT_SCENES)
    measured = _results(results) if results else _NO_RESULTS
    return _TEXT.format(**config, **generation, attributes=attributes, heldout=heldout, results=measured)


def _results(directory: Path) -> str:
    shares = {path.stem: json.loads(path.read_text())["shares"] for path in sorted(directory.glob("*.json"))}
    if not shares:
        return _NO_RESULTS
    asked = {name: values["asked"] for run in shares.values() for name, values in run.items()}
    lines = [f"| | {' | '.join(asked)} |", f"|---|{'---|' * len(asked)}"]
    for run, found in shares.items():
        lines.append(f"| {run} | {' | '.join(_cell(found.get(name)) for name in asked)} |")
    lines.append(f"| asked for | {' | '.join(f'{value:.0%}' for value in asked.values())} |")
    return "\n".join(lines)


def _cell(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['all']:.0%} ({values['heldout']:.0%})"
