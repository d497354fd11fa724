"""Whole runs of several processes against the same run in one, in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import golden_directory, load_golden, rel_l2
from processes import together
from test_golden_pipelines import SETTINGS, _request
from torch import Tensor

import skyreels_fast as sf
from skyreels_fast.conditions import Conditions
from skyreels_fast.parallel import Degrees

SHARED = Degrees(cfg_parallel=False)
# processes, degrees; golden models have two heads
WAYS = {
    "branches": (2, Degrees()),
    "branches of two": (4, Degrees()),
    "ulysses 2 x ring 2": (4, SHARED),
    "ring of 3": (3, Degrees()),
}


def _golden(rank: int, root: Path, degrees: Degrees, name: str) -> tuple[list[Tensor], Tensor]:
    mode = name.partition("_")[0].replace("tea", "t2v")
    pipe = sf.Pipeline.from_pretrained(root / mode, "cpu", torch.float32, mode=mode, degrees=degrees)
    result = pipe(_request(SETTINGS[name], load_golden("pipelines")))
    return result.latents, result.frames


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    for mode in ("df", "t2v", "i2v"):
        golden_directory(mode, root / mode)
    return root


@pytest.fixture(scope="module")
def alone(pipelines: dict[str, sf.Pipeline]):
    """Results of one process by name, each rendered once."""
    known = {}

    def result(name: str) -> sf.Result:
        if name not in known:
            mode = name.partition("_")[0].replace("tea", "t2v")
            known[name] = pipelines[mode](_request(SETTINGS[name], load_golden("pipelines")))
        return known[name]

    return result


# Every mode in one way, in the others what could differ there; the rest is for when there is time.
TELLING = {
    "branches": ("df_long_addnoise",),
    "branches of two": tuple(name for name in SETTINGS if name not in ("df_fps16", "df_async1", "df_long")),
    "ulysses 2 x ring 2": ("df_async_causal", "df_nocfg", "tea_ret"),
    "ring of 3": ("df_async_causal", "i2v"),
}
CASES = [
    pytest.param(name, way, marks=() if name in TELLING[way] else pytest.mark.slow) for way in WAYS for name in SETTINGS
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_equal_to_one_process(name: str, way: str, models: Path, alone) -> None:
    size, degrees = WAYS[way]
    results = together(size, _golden, models, degrees, name)
    expected = alone(name)
    for latents, _ in results:
        assert len(latents) == len(expected.latents)
        for own, one in zip(latents, expected.latents, strict=True):
            assert rel_l2(own, one) < 1e-5
        # All take the same solver steps from the same numbers.
        assert all(torch.equal(own, first) for own, first in zip(latents, results[0][0], strict=True))
    frames, *others = (frames for _, frames in results)
    assert frames.shape == expected.frames.shape
    assert (frames.int() - expected.frames.int()).abs().max() <= 1
    assert all(len(other) == 0 for other in others)


def _bundled(rank: int, degrees: Degrees, requests: list[sf.Request]) -> list[tuple[list[Tensor], Tensor, bool]]:
    pipe = sf.Pipeline.from_pretrained("tiny", "cpu", torch.float32, offload=True, mode="df", degrees=degrees)
    encode, seen = Conditions._encode, {"text": False}
    Conditions._encode = lambda *args: seen.update(text=True) or encode(*args)
    results = [pipe(request) for request in requests]
    return [(result.latents, result.frames, seen["text"]) for result in results]


PROMPT = "a red circle moving right on a black background"
ODD = {"height": 48, "width": 80, "inference_steps": 3, "seed": 5, "prompt": PROMPT}  # 15 tokens a frame
REQUESTS = [
    sf.Request(num_frames=9, **ODD),
    sf.Request(num_frames=9, guidance_scale=1, **ODD),  # no second branch: the same processes, laid out anew
    sf.Request(num_frames=21, causal_attention=True, causal_block_size=2, ar_step=1, **ODD),
]


@pytest.fixture(scope="module")
def bundled_alone() -> list[sf.Result]:
    pipe = sf.Pipeline.from_pretrained("tiny", "cpu", torch.float32, mode="df")
    return [pipe(request) for request in REQUESTS]


@pytest.mark.parametrize("size, degrees", [(2, SHARED), (4, Degrees()), (4, SHARED), (4, Degrees(2, 2))])
def test_prompts_and_frames_that_do_not_divide(size: int, degrees: Degrees, bundled_alone: list[sf.Result]) -> None:
    """The bundled model, offloaded. The encoders are read by the leader alone."""
    for rank, results in enumerate(together(size, _bundled, degrees, REQUESTS)):
        for (latents, frames, read_text), expected in zip(results, bundled_alone, strict=True):
            assert rel_l2(latents[0], expected.latents[0]) < 1e-5
            assert read_text == (rank == 0)
            if rank == 0:
                assert (frames.int() - expected.frames.int()).abs().max() <= 1


def _refused(rank: int, degrees: Degrees, request: sf.Request) -> str:
    pipe = sf.Pipeline.from_pretrained("tiny", "cpu", torch.float32, mode="df", degrees=degrees)
    pipe._load = None
    try:
        pipe(request)
    except ValueError as error:
        return str(error)
    return ""


def test_degrees_that_do_not_fit_are_refused_before_weights_load() -> None:
    """In every process alike: the bundled model has four heads."""
    for text in together(3, _refused, Degrees(ulysses=3), REQUESTS[0]):
        assert text == "--ulysses_degree 3: does not fit 4 heads and 3 processes; ulysses x ring that do: 1 x 3"


def _failing(rank: int, failing: int) -> str:
    pipe = sf.Pipeline.from_pretrained("tiny", "cpu", torch.float32, mode="df", degrees=Degrees())
    if rank == failing:
        pipe.conditions.texts = lambda *_: 1 / 0
    try:
        pipe(REQUESTS[0])
    except (ZeroDivisionError, RuntimeError) as error:
        return type(error).__name__
    return ""


def test_what_fails_in_the_leader_ends_the_others() -> None:
    assert together(3, _failing, 0) == ["ZeroDivisionError", "LeaderError", "LeaderError"]
