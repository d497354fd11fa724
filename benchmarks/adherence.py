"""Does the bundled model do what it is told? Renders fixed prompts through the pipeline and judges the frames.

`python -m benchmarks.adherence` prints a row a prompt, and for each attribute the share that came out right beside the
share asked for, held-out combinations apart. It leaves with status 1 when a share is missed.

--mode async staggers the frames; --long renders several windows and judges the last frames; --image-test starts from a
picture and judges that the video keeps it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import skyreels_fast as sf
from benchmarks.judge import judge, judge_image, judge_long
from benchmarks.options import Parser, at_least_one
from training.prompts import HELDOUT_SCENES, TRAIN_SCENES, Scene

# Shares of the prompts that must come out right.
THRESHOLDS = {"colour": 0.95, "background": 0.95, "motion": 0.90, "shape": 0.80, "image": 0.95}
LONG_FRAMES, OVERLAP = 145, 17
AR_STEP = 2


def spread_prompts(n: int = 40) -> list[tuple[str, bool]]:
    """`n` fixed (prompt, held out) pairs, a third of them held-out combinations, each attribute about equally often."""
    used: Counter[str] = Counter()
    heldout = _spread(HELDOUT_SCENES, -(-n // 3), used)
    trained = _spread(TRAIN_SCENES, n - len(heldout), used)
    return [(scene.prompt, True) for scene in heldout] + [(scene.prompt, False) for scene in trained]


def _spread(scenes: Sequence[Scene], n: int, used: Counter[str]) -> list[Scene]:
    """The first `n` scenes in an order that always takes the one whose attributes were used least."""
    left, chosen = list(scenes), []
    values = (8, 4, 5, 4)  # of each attribute
    for _ in range(min(n, len(left))):
        scene = min(left, key=lambda scene: sum(used[name] * count for name, count in zip(scene, values, strict=True)))
        left.remove(scene)
        chosen.append(scene)
        used.update(scene)
    return chosen


def table(rows: list[dict]) -> str:
    """A line a prompt, then the shares of all and of the held-out prompts, and what is asked for."""
    names = [name for name in rows[0] if name in THRESHOLDS]
    width = max(len(row["prompt"]) for row in rows)
    lines = [f"{'prompt':{width}}  held out  {'  '.join(names)}"]
    for row in rows:
        marks = "  ".join(f"{'yes' if row[name] else 'NO':>{len(name)}}" for name in names)
        lines.append(f"{row['prompt']:{width}}  {'yes' if row['heldout'] else '':>8}  {marks}")
    groups = {"all": rows, "held out": [row for row in rows if row["heldout"]]}
    for label, group in groups.items():
        lines.append(_share_line(f"{label} ({len(group)})", {name: share(group, name) for name in names}, width))
    lines.append(_share_line("asked for", {name: THRESHOLDS[name] for name in names}, width))
    return "\n".join(lines)


def _share_line(label: str, shares: dict[str, float], width: int) -> str:
    return f"{label:{width + 10}}  " + "  ".join(f"{100 * value:{len(name) - 1}.0f}%" for name, value in shares.items())


def share(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows])) if rows else float("nan")


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """For each attribute the shares {all, heldout} and what is asked for."""
    heldout = [row for row in rows if row["heldout"]]
    return {
        name: {"all": share(rows, name), "heldout": share(heldout, name), "asked": THRESHOLDS[name]}
        for name in rows[0]
        if name in THRESHOLDS
    }


def first_frame(prompt: str, seed: int, height: int, width: int) -> np.ndarray:
    """A rendered picture of what the prompt says, uint8 [height,width,3], with room to move."""
    from training.data import sample_batch

    generator = torch.Generator().manual_seed(seed)
    video, _, _ = sample_batch(1, generator, prompts=[prompt], frames=1, canvas=(height, width))
    return ((video[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def pipeline(args: argparse.Namespace) -> sf.Pipeline:
    """Raises ValueError for a model that cannot be had."""
    dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    return sf.Pipeline.from_pretrained(args.model_id, device=args.device, dtype=dtype)


def run(args: argparse.Namespace, pipe: sf.Pipeline) -> list[dict]:
    """Render and judge every prompt: {prompt, heldout, seed, attribute: bool, …} each."""
    from PIL import Image

    defaults = pipe.checkpoint.generation_config
    options: dict = {"ar_step": AR_STEP} if args.mode == "async" else {}
    if args.inference_steps:
        options["inference_steps"] = args.inference_steps
    if args.long:
        options |= {"num_frames": LONG_FRAMES, "overlap_history": OVERLAP}
    rows = []
    for number, (prompt, heldout) in enumerate(spread_prompts(args.n)):
        seed = args.seed + number
        if args.image_test:
            image = first_frame(prompt, seed, defaults["height"], defaults["width"])
            options["image"] = Image.fromarray(image)
        frames = pipe(sf.Request(prompt=prompt, seed=seed, **options)).frames.cpu().numpy()
        if args.image_test:
            verdict = judge_image(frames, image, prompt)
        else:
            verdict = judge_long(frames, prompt) if args.long else judge(frames, prompt)
        rows.append({"prompt": prompt, "heldout": heldout, "seed": seed, **verdict})
        if args.save:
            _save(args.save, f"{number:02d} {prompt}", frames, defaults.get("fps", 24))
    return rows


def _save(directory: Path, name: str, frames: np.ndarray, fps: float) -> None:
    import imageio.v3 as iio

    iio.imwrite(directory / f"{name}.mp4", frames, fps=fps, macro_block_size=1)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model_id", default="tiny")
    parser.add_argument("--n", type=at_least_one, default=40, help="prompts")
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    parser.add_argument("--long", action="store_true", help=f"{LONG_FRAMES} frames, overlap {OVERLAP}")
    parser.add_argument("--image-test", dest="image_test", action="store_true")
    parser.add_argument("--inference_steps", type=at_least_one, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for rows and shares")
    parser.add_argument("--save", type=Path, default=None, help="directory for the videos")
    args = parser.parse_args(argv)
    if args.long and args.image_test:
        parser.error("--long and --image-test are two tests: run them one after the other")
    try:
        pipe = pipeline(args)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = run(args, pipe)
    shares = summary(rows)
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps({"shares": shares, "rows": rows}, indent=1) + "\n")
    return int(any(values["all"] < values["asked"] for values in shares.values()))


if __name__ == "__main__":
    sys.exit(main())
