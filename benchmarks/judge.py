"""Does a video show what its prompt says? Judged from the decoded frames alone, uint8 [T,H,W,3].

The background is the border's median colour, the object what differs from it. The object's colour is the palette's
nearest to the median of its core, its motion the way its centroid goes in 24 frames, its shape the one of four
templates, put on its centroid with its area, that overlaps it best.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from training.data import HELD, coverage
from training.prompts import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, parse

FARTHEST_BACKGROUND = 45.0  # RGB distances beyond which a colour is none of the palette's
FARTHEST_COLOUR = 80.0
STILL_PX = 6.0  # less travel in HELD frames is standing still; the slowest motion goes 18
SMALLEST_PX = 60
LEAST_OVERLAP = 0.65  # a worse fit of the best template is no shape
SAME_IMAGE_DB = 25.0
LAST = 24  # frames in which a long video is judged

Colour = np.ndarray  # [3] float


@dataclass(frozen=True)
class Finding:
    """The object in one frame."""

    image: np.ndarray  # [H,W,3] float
    background: Colour
    mask: np.ndarray  # [H,W] bool

    @property
    def found(self) -> bool:
        return SMALLEST_PX <= self.mask.sum() <= 0.4 * self.mask.size

    @property
    def centroid(self) -> np.ndarray:
        """(x, y) in pixels, pixel centres at halves."""
        rows, columns = np.nonzero(self.mask)
        return np.array([columns.mean() + 0.5, rows.mean() + 0.5])

    @cached_property
    def colour(self) -> Colour:
        core = self.mask
        for _ in range(2):
            smaller = _neighbours(core) == 9
            core = smaller if smaller.sum() >= 9 else core
        return np.median(self.image[core], axis=0)

    @property
    def alpha(self) -> np.ndarray:
        """[H,W] in 0..1: how far each pixel is from the background's to the object's colour; 0 away from the object."""
        direction = self.colour - self.background
        share = (self.image - self.background) @ direction / max(direction @ direction, 1.0)
        return np.clip(share, 0, 1) * (_neighbours(self.mask) > 0)

    @property
    def shape(self) -> str | None:
        """The best fitting template's name, or None when none fits."""
        alpha = self.alpha
        overlaps = {}
        for index, name in enumerate(SHAPES):
            templates = _templates(index, alpha, alpha.shape)
            overlaps[name] = max(np.minimum(t, alpha).sum() / np.maximum(t, alpha).sum() for t in templates)
        best = max(overlaps, key=overlaps.get)
        return best if overlaps[best] >= LEAST_OVERLAP else None


def find(frame: np.ndarray) -> Finding:
    """Separate the object from the background of one frame, uint8 [H,W,3]."""
    image = frame.astype(np.float64)
    edge = np.concatenate([part.reshape(-1, 3) for part in (image[:3], image[-3:], image[:, :3], image[:, -3:])])
    background = np.median(edge, axis=0)
    distance = np.linalg.norm(image - background, axis=-1)
    mask = distance > max(40.0, 0.5 * np.quantile(distance, 0.995))
    return Finding(image, background, mask & (_neighbours(mask) >= 4))


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """How many of the 3×3 pixels around each are set, itself included."""
    padded = np.pad(mask, 1).astype(np.int64)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


@lru_cache
def _unit(shape: int) -> tuple[float, float, float]:
    """Area of a shape of size 1, and its centroid's (x, y) from the centre of its bounding box."""
    size = 64.0
    covered = coverage(torch.tensor([shape]), torch.tensor([size]), torch.tensor([[[40.0, 40.0]]]), (80, 80))[0, 0]
    area, (x, y) = _moments(covered.numpy())
    return area / size**2, (x - 40) / size, (y - 40) / size


def _moments(alpha: np.ndarray) -> tuple[float, tuple[float, float]]:
    area = alpha.sum()
    x = (alpha.sum(0) * (np.arange(alpha.shape[1]) + 0.5)).sum() / area
    y = (alpha.sum(1) * (np.arange(alpha.shape[0]) + 0.5)).sum() / area
    return float(area), (float(x), float(y))


def _templates(shape: int, alpha: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """[5,H,W]: the shape with alpha's centroid and about its area."""
    area, (x, y) = _moments(alpha)
    unit_area, unit_x, unit_y = _unit(shape)
    sizes = (area / unit_area) ** 0.5 * np.array([0.9, 0.95, 1.0, 1.05, 1.1])
    centres = np.stack([x - unit_x * sizes, y - unit_y * sizes], axis=-1)
    position = torch.tensor(centres, dtype=torch.float32)[:, None]
    return coverage(torch.full((5,), shape), torch.tensor(sizes, dtype=torch.float32), position, canvas)[:, 0].numpy()


def nearest(colour: Colour, palette: dict[str, tuple[int, int, int]], farthest: float) -> str | None:
    """The palette's name for a colour, or None when all are farther away than `farthest`."""
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    best = min(distances, key=distances.get)
    return best if distances[best] <= farthest else None


def motion(first: Finding, later: Finding) -> str | None:
    """What the object does from one frame to another HELD frames later; None when it is not there."""
    if not (first.found and later.found):
        return None
    travel = later.centroid - first.centroid
    if np.abs(travel).max() < STILL_PX:
        return "standing still"
    return max((name for name in MOTIONS if any(MOTIONS[name])), key=lambda name: float(travel @ MOTIONS[name]))


def _majority(names: list[str | None]) -> str | None:
    return Counter(names).most_common(1)[0][0]


def look(frames: np.ndarray) -> dict[str, str | None]:
    """Background, colour and shape by majority over five frames spread over the video; None where there is none."""
    findings = [find(frames[i]) for i in np.linspace(0, len(frames) - 1, 5).round().astype(int)]
    return {
        "background": _majority([nearest(f.background, BACKGROUNDS, FARTHEST_BACKGROUND) for f in findings]),
        "colour": _majority([nearest(f.colour, COLOURS, FARTHEST_COLOUR) if f.found else None for f in findings]),
        "shape": _majority([f.shape if f.found else None for f in findings]),
    }


def describe(frames: np.ndarray) -> dict[str, str | None]:
    """What a video shows, in the prompts' words: colour, shape, motion, background; None where it shows none."""
    seen = look(frames)
    moved = motion(find(frames[0]), find(frames[min(HELD, len(frames) - 1)]))
    return {"colour": seen["colour"], "shape": seen["shape"], "motion": moved, "background": seen["background"]}


def judge(frames: np.ndarray, prompt: str) -> dict[str, bool]:
    """Whether frames, uint8 [T,H,W,3], show the prompt's colour, shape, motion and background.

    Raises ValueError for a prompt that is not one of the 640.
    """
    wanted = parse(prompt)._asdict()
    return {name: value == wanted[name] for name, value in describe(frames).items()}


def judge_long(frames: np.ndarray, prompt: str) -> dict[str, bool]:
    """Whether the last LAST frames of a long video still show the prompt's colour, shape and background."""
    wanted = parse(prompt)._asdict()
    return {name: value == wanted[name] for name, value in look(frames[-LAST:]).items()}


def judge_image(frames: np.ndarray, image: np.ndarray, prompt: str) -> dict[str, bool]:
    """`judge`, and whether the first frame is `image`, uint8 [H,W,3]."""
    error = np.square(frames[0].astype(np.float64) - image).mean()
    same = error == 0 or 10 * np.log10(255**2 / error) >= SAME_IMAGE_DB
    return {"image": bool(same), **judge(frames, prompt)}
