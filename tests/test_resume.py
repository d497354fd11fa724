"""Runs that break off at any moment: what was done is kept, and going on gives the frames of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from skyreels_fast import cli, media
from skyreels_fast.film import Film

SIZE = ["--height", "48", "--width", "64", "--device", "cpu", "--save_every", "0"]
LONG = ["--num_frames", "17", "--base_num_frames", "9", "--overlap_history", "5"]
QUICK = ["--inference_steps", "3", "--seed", "1", "--guidance_scale", "3"]
STORY = "a red circle\n# no prompt\n\na blue star\n"
KILLS = 20
# Everything that has a state of its own, in few runs.
RUNS: dict[str, tuple[str, list[str]]] = {
    "prompts over time, noised overlap": ("df", [*LONG, "--prompt_file", "story.txt", "--addnoise_condition", "20"]),
    "staggered": ("df", [*LONG, "--ar_step", "1"]),
    "TeaCache": (
        "df",
        [*LONG[2:], "--num_frames", "13", "--teacache", "--teacache_coefficients", "1,0", "--teacache_thresh", "0.05",
         "--inference_steps", "8"],
    ),
    "extension": ("df", ["--video_path", "source.mp4", "--overlap_history", "5", "--num_frames", "13",
                         "--base_num_frames", "9"]),
    "I2V": ("t2v", ["--num_frames", "9", "--image", str(GOLDEN / "first.png")]),
    "image to image": ("df", ["--num_frames", "9", "--image", str(GOLDEN / "first.png"),
                              "--end_image", str(GOLDEN / "last.png")]),
}  # fmt: skip


class Child:
    """What became of a command in a process of its own, forked from this one, which has all imported already."""

    def __init__(self, code: int, said: str) -> None:
        self.code, self.said = code, said

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def run(mode: str, words: list[str], before: Callable[[], None] = lambda: None) -> Child:
    """A command in a child, with one thread: more would not survive the fork. `before` runs in the child first."""
    command = cli.generate_video_df if mode == "df" else cli.generate_video
    log = Path("child.log")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            before()
            code = command(words)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return Child(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text())


def count_calls(path: Path) -> Callable[[], None]:
    """Write to `path` how many calls Python makes in the child until the command ends."""

    def begin() -> None:
        calls = [0]
        finish = cli._finish

        def finish_and_tell(*args: object) -> int:
            code = finish(*args)
            sys.setprofile(None)
            path.write_text(str(calls[0]))
            return code

        def tick(*_: object) -> None:
            calls[0] += 1

        cli._finish = finish_and_tell
        sys.setprofile(tick)

    return begin


def kill_at(call: int) -> Callable[[], None]:
    """Kill the child with its ffmpeg, or without, at its call number `call`: in the midst of anything."""

    def begin() -> None:
        left = [call]

        def tick(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(tick)

    return begin


def frames_of(path: str | Path) -> np.ndarray:
    return np.stack(list(media.VideoSource(path)))


@pytest.fixture(scope="module")
def unbroken(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """(command line, frames, calls) of a run that nothing disturbs; each is made once."""
    made: dict[str, tuple] = {}
    folder = tmp_path_factory.mktemp("unbroken")

    def of(name: str) -> tuple[list[str], np.ndarray, int]:
        mode, flags = RUNS[name]
        if name not in made:
            model = "i2v" if name == "I2V" else mode
            prompt = [] if "--prompt_file" in flags else ["--prompt", "a red circle"]
            words = ["--model_id", str(models[model]), *SIZE, *QUICK, *prompt, *flags]
            path = folder / f"{len(made)}.mp4"
            child = run(mode, [*words, "--output", str(path)], count_calls(folder / "calls"))
            assert child.code == 0, child.said
            made[name] = words, frames_of(path), int((folder / "calls").read_text())
        return made[name]

    return of


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text(STORY)
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)
    with media.VideoWriter("source.mp4", 12, 48, 64) as writer:
        writer.write(noise)


def assert_goes_on(mode: str, words: list[str], expected: np.ndarray) -> None:
    """What a broken-off run left plays, and going on ends in the frames of an unbroken run, with nothing beside."""
    if Path("out.run/run.json").exists():
        done = json.loads(Path("out.run/run.json").read_text())
        if done["windows"] and not done.get("finished"):
            played = frames_of("out.mp4")
            assert len(played) >= done["mark"][1] > 0
            assert np.array_equal(played, expected[: len(played)])
        child = run(mode, ["--resume", "out.run"])
    else:
        child = run(mode, [*words, "--output", "out.mp4"])
    assert child.code == 0, child.said
    assert np.array_equal(frames_of("out.mp4"), expected)
    assert json.loads(Path("out.json").read_text())["complete"]
    assert not Path("out.run").exists()


def _kills() -> list[tuple[str, float]]:
    chance = random.Random(0)
    names = list(RUNS)
    return [(names[i % len(names)], chance.random()) for i in range(KILLS)]


@pytest.mark.parametrize(("name", "moment"), _kills())
def test_kill_9_at_any_moment_costs_nothing_that_was_saved(name: str, moment: float, unbroken) -> None:
    mode = RUNS[name][0]
    words, expected, calls = unbroken(name)
    child = run(mode, [*words, "--output", "out.mp4"], kill_at(int(moment * calls) + 1))
    assert child.killed, child.said
    assert_goes_on(mode, words, expected)
