"""The judge of the bundled model's videos: right on what is rendered, and not to be fooled."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import adherence
from benchmarks.judge import describe, judge, judge_image, judge_long
from training.data import HEIGHT, WIDTH, sample_batch
from training.prompts import ALL_SCENES, COLOURS, HELDOUT_SCENES, MOTIONS, SHAPES, Scene, parse


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def frames_of(video: torch.Tensor) -> np.ndarray:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


def test_judge_knows_right_from_wrong(generator: torch.Generator) -> None:
    prompts = [prompt for prompt, _ in adherence.spread_prompts(40)]
    video, _, _ = sample_batch(40, generator, prompts=prompts)
    for frames, prompt in zip(frames_of(video), prompts, strict=True):
        assert all(judge(frames, prompt).values()), (prompt, describe(frames))
        scene = parse(prompt)
        other = next(s for s in ALL_SCENES if not set(s) & set(scene))
        assert not any(judge(frames, other.prompt).values())
        for name in Scene._fields:
            changed = scene._replace(**{name: getattr(other, name)})
            assert {key for key, right in judge(frames, changed.prompt).items() if not right} == {name}


def test_judge_bears_blur_and_noise(generator: torch.Generator) -> None:
    prompts = [scene.prompt for scene in HELDOUT_SCENES[::4]]
    video, _, _ = sample_batch(16, generator, prompts=prompts)
    blurred = torch.nn.functional.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    noisy = blurred + 0.08 * torch.randn(video.shape, generator=generator)
    for frames, prompt in zip(frames_of(noisy), prompts, strict=True):
        assert all(judge(frames, prompt).values()), (prompt, describe(frames))


def test_judge_finds_nothing_in_nothing(generator: torch.Generator) -> None:
    prompt = "a red circle standing still on a gray background"
    flat = np.full((49, HEIGHT, WIDTH, 3), 105, dtype=np.uint8)
    assert judge(flat, prompt) == {"colour": False, "shape": False, "motion": False, "background": True}
    noise = torch.rand(1, 3, 25, HEIGHT, WIDTH, generator=generator) * 2 - 1
    assert not any(judge(frames_of(noise)[0], prompt)[name] for name in ("colour", "shape"))


def test_judge_of_images_and_long_videos(generator: torch.Generator) -> None:
    prompt = ALL_SCENES[77].prompt
    frames = frames_of(sample_batch(1, generator, prompts=[prompt], frames=145)[0])[0]
    assert all(judge_long(frames, prompt).values())
    assert all(judge_image(frames, frames[0], prompt).values())
    assert not judge_image(frames, frames[20][:, ::-1], prompt)["image"]
    frames[100:] = frames[100:].mean((1, 2), keepdims=True)
    assert not judge_long(frames, prompt)["shape"]


def test_benchmark_prompts_cover_every_attribute() -> None:
    chosen = adherence.spread_prompts(40)
    assert len(set(chosen)) == 40
    assert sum(heldout for _, heldout in chosen) >= 12
    assert all((parse(prompt) in HELDOUT_SCENES) == heldout for prompt, heldout in chosen)
    counts = Counter(name for prompt, _ in chosen for name in parse(prompt))
    assert min(counts[name] for name in COLOURS) >= 4
    assert min(counts[name] for name in (*SHAPES, *MOTIONS)) >= 7
