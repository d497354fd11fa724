"""Windows: the published arithmetic, frames that add up, and refusals whose advice works."""

from __future__ import annotations

import itertools
import re

import pytest

from skyreels_fast.sampling.windows import Window, latent_frames, pixel_frames, plan_windows


def test_latents_and_pixels() -> None:
    assert [latent_frames(n) for n in (1, 2, 4, 5, 8, 9, 97, 121)] == [1, 1, 1, 2, 2, 3, 25, 31]
    assert all(latent_frames(pixel_frames(n)) == n for n in range(1, 50))


def test_one_window() -> None:
    assert plan_windows(97) == (Window(25, prefix=0, drop=0, frames=97, end=False),)
    assert plan_windows(17, image=True, end_image=True) == (Window(5, prefix=1, drop=0, frames=17, end=True),)
    assert plan_windows(1) == (Window(1, prefix=0, drop=0, frames=1, end=False),)
    assert plan_windows(17, 17, 9) == plan_windows(17)


def test_long_video() -> None:
    windows = plan_windows(41, 17, 9, image=True, end_image=True)
    assert windows == (
        Window(5, prefix=1, drop=0, frames=17, end=False),
        Window(5, prefix=3, drop=9, frames=8, end=False),
        Window(5, prefix=3, drop=9, frames=8, end=False),
        Window(5, prefix=3, drop=9, frames=8, end=True),
    )
    assert [w.latents for w in plan_windows(257, 97, 17)] == [25, 25, 25]
    assert [w.latents for w in plan_windows(37, 21, 5, causal_block_size=2)] == [6, 6]
    assert [w.latents for w in plan_windows(45, 17, 9)] == [5, 5, 5, 5, 4]
    assert [w.latents for w in plan_windows(37, 21, 9)] == [6, 6, 4]


def test_extension() -> None:
    windows = plan_windows(33, 17, 9, extend=True)
    assert windows == (Window(5, prefix=3, drop=9, frames=8, end=False),) * 3
    assert plan_windows(13, 17, 9, extend=True) == (Window(4, prefix=3, drop=9, frames=4, end=False),)
    assert plan_windows(33, 17, 9, extend=True, end_image=True)[-1].end


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_one_window_without_diffusion_forcing(mode: str) -> None:
    assert plan_windows(121, image=mode == "i2v", mode=mode) == (Window(31, prefix=0, drop=0, frames=121, end=False),)
    with pytest.raises(ValueError, match="no end image"):
        plan_windows(121, end_image=True, mode=mode)
    with pytest.raises(ValueError, match="no video to extend"):
        plan_windows(121, overlap_history=17, extend=True, mode=mode)
    with pytest.raises(ValueError, match="'vid'"):
        plan_windows(121, mode="vid")


def test_sliding_is_one_window() -> None:
    assert plan_windows(57, 37, sliding=True, causal_block_size=5) == (Window(15, 0, 0, 57, False),)
    assert len(plan_windows(57, 37, 17, sliding=True)) == 2


@pytest.mark.parametrize("extend", [False, True])
def test_frames_add_up(extend: bool) -> None:
    for num_frames, base, overlap in itertools.product(range(6, 90), (9, 17, 18, 25), (1, 5, 9)):
        if latent_frames(overlap) >= latent_frames(base) or (extend and num_frames < overlap + 4):
            continue
        windows = plan_windows(num_frames, base, overlap, extend=extend)
        whole = pixel_frames(latent_frames(num_frames))
        assert sum(w.frames for w in windows) == whole - extend * overlap
        for k, window in enumerate(windows):
            assert window.prefix < window.latents <= latent_frames(base)
            assert window.frames == pixel_frames(window.latents) - window.drop > 0
            assert window.prefix == (latent_frames(overlap) if k or extend else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_frames": 17, "base_num_frames": 0}, "base_num_frames=0"),
        ({"num_frames": 17, "causal_block_size": 0}, "causal_block_size=0"),
        ({"num_frames": 4, "image": True}, "num_frames=4 leaves .* the image; give at least 5"),
        ({"num_frames": 193}, "give overlap_history .* or at most 97 frames"),
        ({"num_frames": 193, "overlap_history": 18}, "overlap_history: 17 or 21"),
        ({"num_frames": 193, "overlap_history": 16}, "overlap_history: 13 or 17"),
        ({"num_frames": 193, "overlap_history": 0}, "overlap_history: 1$"),
        ({"num_frames": 193, "overlap_history": 97}, "base_num_frames of at least 101"),
        ({"num_frames": 41, "base_num_frames": 20, "overlap_history": 17}, "base_num_frames of at least 21"),
        ({"num_frames": 97, "extend": True}, "needs overlap_history"),
        ({"num_frames": 17, "overlap_history": 17, "extend": True}, "overlap_history=17; give at least 21"),
        ({"num_frames": 97, "overlap_history": 17, "extend": True, "image": True}, "leave one out"),
        (
            {"num_frames": 97, "causal_block_size": 2},
            "window of 25 .* num_frames: 93 or 101 .with base_num_frames=101.$",
        ),
        ({"num_frames": 41, "causal_block_size": 5}, "window of 11 .* nearest valid num_frames: 37 or 57"),
        ({"num_frames": 193, "overlap_history": 17, "causal_block_size": 4}, "base_num_frames: 93 or 109"),
        ({"num_frames": 57, "base_num_frames": 17, "overlap_history": 9, "causal_block_size": 2}, "frames: 13 or 21"),
        ({"num_frames": 9, "base_num_frames": 9, "causal_block_size": 5}, "frames: 17 .with base_num_frames=17.$"),
        ({"num_frames": 1, "base_num_frames": 1, "causal_block_size": 2}, "window of 1 latent frame, .*: 5 .with base"),
        ({"num_frames": 9, "base_num_frames": 1}, "at most 1 frame$"),
        ({"num_frames": 33, "base_num_frames": 21, "overlap_history": 5, "causal_block_size": 2}, "frames: 29 or 37"),
    ],
)
def test_refusals_name_the_fix(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_windows(**arguments)


def test_advice_on_num_frames_is_valid_and_nearest() -> None:
    advised = 0
    for num_frames, overlap, block, extend in itertools.product(range(10, 110), (5, 9), (2, 3, 4), (False, True)):
        settings = {"base_num_frames": 45, "overlap_history": overlap, "causal_block_size": block, "extend": extend}
        if extend and num_frames < overlap + 4:
            continue
        try:
            plan_windows(num_frames, **settings)
        except ValueError as error:
            values = [int(value) for value in re.findall(r"\d+", str(error).partition("nearest valid num_frames")[2])]
            assert values
            advised += 1
            for value in values:
                plan_windows(value, **settings)
            for between in range(min(values) + 4, max(values), 4):
                with pytest.raises(ValueError, match="nearest"):
                    plan_windows(between, **settings)
    assert advised > 100


def test_advice_past_the_base_is_valid() -> None:
    for latents, block, image in itertools.product(range(2, 14), range(2, 8), (False, True)):
        frames, options = pixel_frames(latents), {"causal_block_size": block, "image": image}
        if latents % block == 0:
            continue
        with pytest.raises(ValueError, match=r"\(with base_num_frames") as error:
            plan_windows(frames, frames, **options)
        longer, base = map(int, re.findall(r"(\d+) \(with base_num_frames=(\d+)\)$", str(error.value))[0])
        assert longer == base > frames
        assert len(plan_windows(longer, base, **options)) == 1
