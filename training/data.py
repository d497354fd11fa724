"""Renders the bundled model's world on any device: one shape that moves at constant speed and bounces off the borders.

Positions are the centres of the shapes' bounding boxes in pixels, (x, y) with y downwards; pixel (i, j) has its centre
at (j + 0.5, i + 0.5). Shapes come from signed distances, so edges are anti-aliased over about one pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.prompts import BACKGROUNDS, COLOURS, HELDOUT_SCENES, MOTIONS, SHAPES, TRAIN_SCENES, Scene, parse

HEIGHT, WIDTH, FRAMES, FPS = 96, 160, 49, 24
SIZE = (20.0, 36.0)  # pixels across
SPEED = (0.75, 2.0)  # pixels a frame
HELD = 24  # frames for which a video keeps the direction its prompt names
MAX_START = 256  # "mid" clips start at most this many frames into their video

# Half the bounding box, (x, y) in units of the size, in the order of SHAPES.
_STAR_RADIUS = 0.5 / math.sin(2 * math.pi / 5)
_STAR_INNER = 0.4  # inner radius by outer radius
_EXTENT = (
    (0.5, 0.5),
    (0.5, 0.5),
    (0.5, 0.25 * math.sqrt(3)),
    (0.5, 0.5 * _STAR_RADIUS * (1 + math.cos(math.pi / 5))),
)


@dataclass(frozen=True)
class Scenes:
    """A batch of videos to render: indices into the attribute tables, and what the prompt leaves open."""

    attributes: torch.Tensor  # [B,4] int64: colour, shape, motion, background
    size: torch.Tensor  # [B] pixels across
    speed: torch.Tensor  # [B] pixels a frame, 0 when standing still
    position: torch.Tensor  # [B,2] where frame 0 has the shape

    @property
    def names(self) -> list[Scene]:
        tables = (tuple(COLOURS), SHAPES, tuple(MOTIONS), tuple(BACKGROUNDS))
        return [Scene(*(table[i] for table, i in zip(tables, row, strict=True))) for row in self.attributes.tolist()]


def attribute_table(scenes: Sequence[Scene]) -> torch.Tensor:
    """[len(scenes), 4] int64: each scene's indices into COLOURS, SHAPES, MOTIONS, BACKGROUNDS."""
    tables = (tuple(COLOURS), SHAPES, tuple(MOTIONS), tuple(BACKGROUNDS))
    rows = [[table.index(name) for table, name in zip(tables, scene, strict=True)] for scene in scenes]
    return torch.tensor(rows, dtype=torch.int64)


def _range(shape: torch.Tensor, size: torch.Tensor, canvas: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest centre, both [B,2], for which the shape lies inside the canvas (height, width)."""
    half = torch.tensor(_EXTENT, device=size.device)[shape] * size[:, None]
    return half, torch.tensor(canvas[::-1], device=size.device) - half


def _uniform(low: float, high: float, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low


def draw_scenes(
    n: int, generator: torch.Generator, *, table: torch.Tensor | None = None, canvas: tuple[int, int] = (HEIGHT, WIDTH)
) -> Scenes:
    """Draw `n` videos on the generator's device: combinations from the rows of `table` (default: the training ones).

    Start positions leave room for HELD frames in the named direction, as far as the canvas allows.
    """
    device = generator.device
    table = attribute_table(TRAIN_SCENES) if table is None else table
    rows = torch.randint(len(table), (n,), generator=generator, device=device)
    return place(table.to(device)[rows], generator, canvas=canvas)


def place(attributes: torch.Tensor, generator: torch.Generator, *, canvas: tuple[int, int] = (HEIGHT, WIDTH)) -> Scenes:
    """Draw size, speed and start position for each row of `attributes` [B,4]."""
    device = generator.device
    n = len(attributes)
    attributes = attributes.to(device)
    scale = min(1.0, min(canvas) / HEIGHT)
    size = _uniform(*SIZE, n, generator) * scale
    unit = torch.tensor(list(MOTIONS.values()), device=device, dtype=torch.float32)[attributes[:, 2]]
    speed = _uniform(*SPEED, n, generator) * scale * unit.abs().amax(1)
    low, high = _range(attributes[:, 1], size, canvas)
    room = (high - low - HELD * speed[:, None] * unit.abs()).clamp_min(0)
    start = low + torch.rand(n, 2, generator=generator, device=device) * room
    # Moving left or up starts from the far end of that room.
    start = torch.where(unit < 0, low + high - start, start)
    return Scenes(attributes, size, speed, start)


def trajectory(
    scenes: Scenes, frames: int = FRAMES, start: torch.Tensor | int = 0, canvas: tuple[int, int] = (HEIGHT, WIDTH)
) -> torch.Tensor:
    """[B,frames,2] float32: positions from frame `start` ([B] or one number) on, reflected at the borders."""
    device = scenes.size.device
    unit = torch.tensor(list(MOTIONS.values()), device=device, dtype=torch.float32)[scenes.attributes[:, 2]]
    start = torch.as_tensor(start, device=device, dtype=torch.float32).expand(len(scenes.size))
    time = start[:, None] + torch.arange(frames, device=device, dtype=torch.float32)
    low, high = (bound[:, None] for bound in _range(scenes.attributes[:, 1], scenes.size, canvas))
    free = scenes.position[:, None] + (unit * scenes.speed[:, None])[:, None] * time[..., None]
    span = high - low
    return low + span - ((free - low).remainder(2 * span) - span).abs()


def coverage(
    shape: torch.Tensor, size: torch.Tensor, position: torch.Tensor, canvas: tuple[int, int] = (HEIGHT, WIDTH)
) -> torch.Tensor:
    """[B,T,H,W] float32 in 0..1: how much of each pixel the shape covers. shape [B], size [B], position [B,T,2]."""
    device = position.device
    rows = torch.arange(canvas[0], device=device, dtype=torch.float32)[:, None] + 0.5
    columns = torch.arange(canvas[1], device=device, dtype=torch.float32)[None, :] + 0.5
    x = columns - position[..., 0, None, None]
    y = rows - position[..., 1, None, None]
    size = size[:, None, None, None]
    distance = _circle(x, y, size)
    for index, signed_distance in enumerate((_square, _triangle, _star), start=1):
        chosen = (shape == index).nonzero()[:, 0]
        if len(chosen):
            distance[chosen] = signed_distance(x[chosen], y[chosen], size[chosen])
    return (0.5 - distance).clamp_(0, 1)


def _circle(x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - 0.5 * size


def _square(x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - _EXTENT[1][0] * size


def _triangle(x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    half = _EXTENT[2][1] * size
    # The slanted edge of an equilateral triangle has the normal (cos 30°, -sin 30°) and meets the tip (0, -half).
    slanted = x.abs() * (0.5 * math.sqrt(3)) - 0.5 * (y + half)
    return torch.maximum(slanted, y - half)


def _star(x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    radius = _STAR_RADIUS * size
    # The pentagram's centre lies below that of its bounding box.
    y = y - (radius - _EXTENT[3][1] * size)
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (angle - sector * (angle / sector).round()).abs()
    r = torch.hypot(x, y)
    u, v = r * folded.cos(), r * folded.sin()
    # Edge from the tip (1, 0) to the inner corner, in units of the outer radius.
    edge_u = _STAR_INNER * math.cos(sector / 2) - 1
    edge_v = _STAR_INNER * math.sin(sector / 2)
    return (edge_v * (u - radius) - edge_u * v) / math.hypot(edge_u, edge_v)


def render(
    scenes: Scenes, position: torch.Tensor, canvas: tuple[int, int] = (HEIGHT, WIDTH)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint the scenes' shapes at `position` [B,T,2].

    Returns (video [B,3,T,H,W] float32 in [-1,1], coverage [B,1,T,H,W] float32 in 0..1).
    """
    device = position.device
    covered = coverage(scenes.attributes[:, 1], scenes.size, position, canvas)[:, None]
    colour = _palette(COLOURS, device)[scenes.attributes[:, 0]][:, :, None, None, None]
    background = _palette(BACKGROUNDS, device)[scenes.attributes[:, 3]][:, :, None, None, None]
    return torch.lerp(background, colour, covered), covered


def _palette(colours: dict[str, tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(colours.values()), device=device) / 127.5 - 1


def draw_start(n: int, generator: torch.Generator, start: str) -> torch.Tensor:
    """[B] first frames of clips: 0 for "first", anywhere in 1..MAX_START for "mid". ValueError for other words."""
    if start == "first":
        return torch.zeros(n, dtype=torch.int64, device=generator.device)
    if start == "mid":
        return torch.randint(1, MAX_START + 1, (n,), generator=generator, device=generator.device)
    raise ValueError(f"start {start!r} is neither 'first' nor 'mid'")


def sample_batch(
    n: int,
    generator: torch.Generator,
    start: str = "first",
    heldout: bool = False,
    prompts: Sequence[str] | None = None,
    *,
    frames: int = FRAMES,
    canvas: tuple[int, int] = (HEIGHT, WIDTH),
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Draw and render `n` clips on the generator's device; `prompts` (n of them) fixes the combinations.

    Returns (video [n,3,frames,H,W] in [-1,1], prompts, trajectories [n,frames,2]). "first" clips show what their
    prompt says for HELD frames at least; "mid" clips start later, where the shape may have bounced.
    Raises ValueError for a wrong `start`, an unknown prompt, or a wrong number of prompts.
    """
    if prompts is None:
        table = attribute_table(HELDOUT_SCENES if heldout else TRAIN_SCENES)
        scenes = draw_scenes(n, generator, table=table, canvas=canvas)
    elif len(prompts) == n:
        scenes = place(attribute_table([parse(prompt) for prompt in prompts]), generator, canvas=canvas)
    else:
        raise ValueError(f"{len(prompts)} prompts for n = {n} clips: give as many")
    position = trajectory(scenes, frames, draw_start(n, generator, start), canvas)
    video, _ = render(scenes, position, canvas)
    return video, [scene.prompt for scene in scenes.names], position
