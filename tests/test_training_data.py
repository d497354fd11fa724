"""The bundled model's world: its prompts, its tokenizer, what is rendered for it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from training.data import HEIGHT, SIZE, WIDTH, Scenes, coverage, draw_scenes, render, sample_batch, trajectory
from training.prompts import (
    ALL_SCENES,
    HELDOUT_SCENES,
    MOTIONS,
    SHAPES,
    TRAIN_SCENES,
    parse,
    save_tokenizer,
    token_ids,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_heldout_scenes_are_a_spread_tenth() -> None:
    assert len(ALL_SCENES) == 640
    assert len(set(HELDOUT_SCENES)) == 64
    assert not set(HELDOUT_SCENES) & set(TRAIN_SCENES)
    for i, values in enumerate((8, 4, 5, 4)):
        counts = Counter(scene[i] for scene in HELDOUT_SCENES)
        assert len(counts) == values
        assert max(counts.values()) - min(counts.values()) <= 1
    for i in range(4):
        for j in range(i):
            kept, possible = (Counter((s[i], s[j]) for s in scenes) for scenes in (TRAIN_SCENES, ALL_SCENES))
            assert min(kept[pair] / possible[pair] for pair in possible) > 0.8


def test_prompts_read_back() -> None:
    assert all(parse(scene.prompt) == scene for scene in ALL_SCENES)
    assert parse("A Red  circle standing still on a dark blue background.").background == "dark blue"
    with pytest.raises(ValueError, match="a red cube"):
        parse("a red cube standing still on a black background")


def test_tokenizer_loads_and_agrees_with_token_ids(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [ALL_SCENES[0].prompt, "", "Foo, A  Red star!", "色调艳丽，过曝", ALL_SCENES[-1].prompt.upper()]
    assert [tokenizer(prompt).input_ids for prompt in prompts] == [token_ids(prompt) for prompt in prompts]
    assert tokenizer("").input_ids == [1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert all(2 not in token_ids(scene.prompt) for scene in ALL_SCENES)


def test_shapes_have_their_areas_centres_and_extents() -> None:
    size = torch.full((4,), 40.0)
    covered = coverage(torch.arange(4), size, torch.full((4, 1, 2), 32.3), (64, 64))[:, 0]
    star = 5 * (20 / math.sin(0.4 * math.pi)) ** 2 * 0.4 * math.sin(math.pi / 5)  # ten triangles round the centre
    areas = torch.tensor([math.pi * 20**2, 40**2, math.sqrt(3) / 4 * 40**2, star])
    torch.testing.assert_close(covered.sum((1, 2)), areas, rtol=0.01, atol=0)
    for shape, image in enumerate(covered):
        columns = (image.amax(0) > 0.05).nonzero()
        middle = (columns.min() + columns.max() + 1) / 2
        assert abs(middle - 32.3) < 0.8, SHAPES[shape]
        assert columns.max() - columns.min() + 1 <= 42
        torch.testing.assert_close(image, coverage_mirrored(shape), atol=1e-4, rtol=0)


def coverage_mirrored(shape: int) -> torch.Tensor:
    position = torch.tensor([[[64 - 32.3, 32.3]]])
    return coverage(torch.tensor([shape]), torch.tensor([40.0]), position, (64, 64))[0, 0].flip(-1)


def test_videos_keep_their_direction_stay_inside_and_bounce(generator: torch.Generator) -> None:
    scenes = draw_scenes(400, generator)
    position = trajectory(scenes, 200)
    unit = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[scenes.attributes[:, 2]]
    steps = position.diff(dim=1)
    expected = (unit * scenes.speed[:, None])[:, None]
    torch.testing.assert_close(steps[:, :24], expected.expand(-1, 24, -1), atol=1e-3, rtol=0)
    assert (steps.abs() <= expected.abs() + 1e-3).all()
    moving = scenes.speed > 0
    assert ((scenes.speed[moving] >= 0.75) & (scenes.speed[moving] <= 2)).all()
    assert (steps[moving] * unit[moving][:, None]).sum(-1).amin(1).max() < 0  # every one has turned round
    _, covered = render(scenes, position[:, ::40])
    _, uncut = render(scenes, position[:, ::40] + 8, (HEIGHT + 16, WIDTH + 16))
    assert (uncut.sum((3, 4)) / covered.sum((3, 4))).max() < 1.05  # the border cuts no more than soft edges


def test_mid_clips_are_later_parts_of_videos(generator: torch.Generator) -> None:
    scenes = draw_scenes(8, generator)
    whole = trajectory(scenes, 120)
    start = torch.arange(8) * 10
    parts = trajectory(scenes, 50, start)
    for i in range(8):
        torch.testing.assert_close(parts[i], whole[i, start[i] : start[i] + 50], atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="neither"):
        sample_batch(1, generator, start="last")


def test_sizes_scale_with_small_canvases(generator: torch.Generator) -> None:
    scenes = draw_scenes(50, generator, canvas=(48, 64))
    assert isinstance(scenes, Scenes)
    assert scenes.size.max() <= SIZE[1] / 2
    position = trajectory(scenes, 100, canvas=(48, 64))
    assert position.amin() > 0 and (position.amax((0, 1)) < torch.tensor([64.0, 48.0])).all()
