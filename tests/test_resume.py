"""Runs that break off at any moment: what was done is kept, and going on gives the frames of an unbroken run."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from skyreels_fast import _job, cli, media
from skyreels_fast.dit.model import DiT
from skyreels_fast.film import Film
from skyreels_fast.run import Run

SIZE = ["--height", "32", "--width", "32", "--device", "cpu", "--save_every", "0"]
LONG = ["--num_frames", "29", "--base_num_frames", "13", "--overlap_history", "5"]
QUICK = ["--inference_steps", "3", "--seed", "1", "--guidance_scale", "3"]
STORY = "a red circle\n# no prompt\n\na blue star\n"
KILLS = 20
QUICK_KILLS = 6  # one of each kind of run; the others are for those who can wait
# Everything that has a state of its own, in few runs.
RUNS: dict[str, tuple[str, list[str]]] = {
    "prompts over time, noised overlap": ("df", [*LONG, "--prompt_file", "story.txt", "--addnoise_condition", "20"]),
    "staggered": ("df", [*LONG, "--ar_step", "1"]),
    "TeaCache": ("df", [*LONG, "--teacache", "--teacache_coefficients", "1,0", "--teacache_thresh", "2",
                        "--inference_steps", "6"]),
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
    said, output = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            before()
            code = command(words)
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(output)
    with os.fdopen(said, errors="replace") as pipe:
        text = pipe.read()
    return Child(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text)


def count_calls(path: Path) -> Callable[[], None]:
    """Write to `path` how many calls Python makes in the child until the command ends."""

    def begin() -> None:
        calls = [0]
        finish = _job._finish

        def finish_and_tell(*args: object) -> int:
            code = finish(*args)
            sys.setprofile(None)
            path.write_text(str(calls[0]))
            return code

        def tick(*_: object) -> None:
            calls[0] += 1

        _job._finish = finish_and_tell
        sys.setprofile(tick)

    return begin


def kill_at(call: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Kill the child with its ffmpeg, or without, at its call number `call`: in the midst of anything."""

    def begin() -> None:
        left = [call]

        def tick(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

        sys.setprofile(tick)

    return begin


def frames_of(path: str | Path) -> np.ndarray:
    return np.stack(list(media.VideoSource(path)))


@pytest.fixture(scope="module")
def unbroken(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """(command line, frames, calls) of a run that nothing disturbs; each is made once."""
    made: dict[str, tuple] = {}
    folder = tmp_path_factory.mktemp("unbroken")
    warm_up = [*SIZE, *QUICK, "--num_frames", "5", "--output", str(folder / "warm_up.mp4")]
    assert cli.generate_video_df(["--model_id", str(models["df"]), *warm_up]) == 0  # imports what children would

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


def _kills() -> list:
    chance = random.Random(0)
    kills = [(name, chance.random()) for name in itertools.islice(itertools.cycle(RUNS), KILLS)]
    slow = [pytest.param(*kill, marks=pytest.mark.slow) for kill in kills[QUICK_KILLS:]]
    return kills[:QUICK_KILLS] + slow


@pytest.mark.parametrize(("name", "moment"), _kills())
def test_kill_9_at_any_moment_costs_nothing_that_was_saved(name: str, moment: float, unbroken) -> None:
    mode = RUNS[name][0]
    words, expected, calls = unbroken(name)
    child = run(mode, [*words, "--output", "out.mp4"], kill_at(int(moment * calls) + 1))
    assert child.killed, child.said
    assert_goes_on(mode, words, expected)


@pytest.mark.parametrize(("name", "moment"), _kills())
def test_a_signal_at_any_moment_costs_nothing_that_was_computed(name: str, moment: float, unbroken) -> None:
    mode = RUNS[name][0]
    words, expected, calls = unbroken(name)
    words = [*words, "--save_every", "60"]
    child = run(mode, [*words, "--output", "out.mp4"], kill_at(int(moment * calls) + 1, signal.SIGINT))
    assert child.code == 130, child.said
    assert_goes_on(mode, words, expected)


def stop_at_row(row: int, number: int) -> Callable[[], None]:
    """Send the child a signal in the midst of a schedule row, counted over all windows."""

    def begin() -> None:
        left, run_branches = [row], DiT.run_branches

        def run_or_stop(*args: object, **options: object) -> list[torch.Tensor]:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return run_branches(*args, **options)

        DiT.run_branches = run_or_stop

    return begin


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_first_window_saves_its_steps(number: int, code: int, unbroken) -> None:
    words, expected, _ = unbroken(STORY_RUN)
    words = [*words, "--save_every", "60", "--output", "out.mp4"]
    child = run("df", words, stop_at_row(3, number))
    assert child.code == code, child.said
    assert child.said.splitlines()[-2:] == [
        "generate_video_df.py: no frame is finished yet; 2 of 9 steps are saved",
        "generate_video_df.py: go on with: python generate_video_df.py --resume out.run",
    ]
    assert_goes_on("df", words, expected)


def test_a_second_ctrl_c_does_not_wait_for_the_steps_to_be_saved(unbroken) -> None:
    words, _, _ = unbroken(STORY_RUN)

    def stop_twice() -> None:
        stop_at_row(3, signal.SIGINT)()
        save = Run._save

        def save_or_stop(*args: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            save(*args)

        Run._save = save_or_stop

    child = run("df", [*words, "--save_every", "60", "--output", "out.mp4"], stop_twice)
    assert child.code == 130, child.said
    assert "no frame was rendered, no file written" in child.said
    assert not Path("out.run").exists()


def test_steps_that_cannot_be_read_are_one_line(unbroken) -> None:
    words, _, _ = unbroken(STORY_RUN)
    assert run("df", [*words, "--output", "out.mp4"], stop_at_row(3, signal.SIGINT)).code == 130
    Path("out.run/steps.safetensors").write_bytes(b"")
    child = run("df", ["--resume", "out.run"])
    assert child.code == 1
    assert "Traceback" not in child.said
    assert "out.run/steps.safetensors cannot be read" in child.said


def limit_files(size: int) -> Callable[[], None]:
    """No file of the child or its ffmpeg may grow beyond `size` bytes: to them the disk is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def kill_encoder(write: int) -> Callable[[], None]:
    """Kill ffmpeg before the `write`-th chunk is handed to it."""

    def begin() -> None:
        count, write_on = [0], Film.write

        def write_or_kill(film: Film, frames: torch.Tensor) -> None:
            count[0] += 1
            if count[0] == write:
                film._writer._process.kill()
                film._writer._process.wait()
            write_on(film, frames)

        Film.write = write_or_kill

    return begin


def interrupt(write: int) -> Callable[[], None]:
    """Ctrl-C at the `write`-th chunk."""

    def begin() -> None:
        count, write_on = [0], Film.write

        def write_and_stop(film: Film, frames: torch.Tensor) -> None:
            count[0] += 1
            write_on(film, frames)
            if count[0] == write:
                os.kill(os.getpid(), signal.SIGINT)

        Film.write = write_and_stop

    return begin


FAULTS: dict[str, tuple[Callable[[], None], int, str, int]] = {
    # (what happens, exit code, what is said, windows that are out)
    "disk full at a window's end": (limit_files(50_000), 1, "File too large", 0),
    "encoder killed in the first window": (kill_encoder(2), 1, "ffmpeg stopped writing", 0),
    "encoder killed in the last window": (kill_encoder(8), 1, "ffmpeg stopped writing", 2),
    "Ctrl-C": (interrupt(6), 130, "interrupted", 1),
}
STORY_RUN = "prompts over time, noised overlap"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_a_playable_file_and_the_command_that_goes_on(fault: str, unbroken) -> None:
    before, code, named, windows = FAULTS[fault]
    words, expected, _ = unbroken(STORY_RUN)
    child = run("df", [*words, "--output", "out.mp4"], before)
    assert child.code == code, child.said
    assert named in child.said
    assert "Traceback" not in child.said
    played = frames_of("out.mp4")[: len(expected)] if media.playable_frames("out.mp4") else expected[:0]
    assert np.array_equal(played, expected[: len(played)])
    assert f"{len(played)} of {len(expected)} frames can be played in out.mp4" in child.said
    last = child.said.splitlines()[-1]
    assert last == "generate_video_df.py: go on with: python generate_video_df.py --resume out.run"
    assert json.loads(Path("out.run/run.json").read_text())["windows"] == windows
    assert json.loads(Path("out.json").read_text())["complete"] is False
    assert_goes_on("df", words, expected)


def test_a_disk_that_holds_nothing_is_one_line(unbroken) -> None:
    words, _, _ = unbroken(STORY_RUN)
    child = run("df", [*words, "--output", "out.mp4"], limit_files(100))
    assert child.code == 2
    assert "File too large" in child.said.splitlines()[-1]
    assert not Path("out.mp4").exists()
    assert not Path("out.run").exists()


@pytest.fixture
def broken(unbroken) -> tuple[list[str], np.ndarray]:
    """A run whose encoder died in the last of three windows: (command line, the frames it should have made)."""
    words, expected, _ = unbroken(STORY_RUN)
    assert run("df", [*words, "--output", "out.mp4"], kill_encoder(8)).code == 1
    return words, expected


def no_model() -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("what was saved is computed again")

    DiT.run_branches = refuse


def said_without_the_model(expected: np.ndarray) -> str:
    """What is said on going on to the end, which needs nothing to be computed again."""
    child = run("df", ["--resume", "out.run"], no_model)
    assert child.code == 0, child.said
    assert np.array_equal(frames_of("out.mp4"), expected)
    return child.said


def test_what_was_saved_is_not_computed_again(broken) -> None:
    _, expected = broken
    assert "21 of 29 frames are there already" in said_without_the_model(expected)


def test_a_lost_video_is_made_again_from_its_latents(broken) -> None:
    _, expected = broken
    Path("out.mp4").write_bytes(b"")
    assert "note: out.mp4 is not as the run left it" in said_without_the_model(expected)


@pytest.mark.parametrize("when", ["before the video got its index", "before the folder was removed"])
def test_a_run_killed_while_it_was_cleared_away_is_finished(when: str, broken) -> None:
    _, expected = broken

    def kill_at_the_end() -> None:
        owner, method = (Film, "make_plain") if "index" in when else (Run, "remove")
        setattr(owner, method, lambda _: os.kill(os.getpid(), signal.SIGKILL))

    assert run("df", ["--resume", "out.run"], kill_at_the_end).killed
    assert np.array_equal(frames_of("out.mp4"), expected)
    child = run("df", ["--resume", "out.run"], no_model)
    assert child.code == 0, child.said
    assert np.array_equal(frames_of("out.mp4"), expected)
    assert not Path("out.run").exists()
    record = json.loads(Path("out.json").read_text())
    assert (record["complete"], record["frames"], record["resumed"]) == (True, 29, True)


def test_a_run_killed_before_anything_was_saved_gives_way_to_another(unbroken) -> None:
    words, expected, _ = unbroken(STORY_RUN)

    def kill() -> None:
        DiT.embed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert run("df", [*words, "--output", "out.mp4", "--seed", "7"], kill).killed
    assert Path("out.run/run.json").exists()
    child = run("df", [*words, "--output", "out.mp4"])
    assert child.code == 0, child.said
    assert np.array_equal(frames_of("out.mp4"), expected)


def test_the_folder_can_be_moved_with_its_video(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = broken
    Path("elsewhere").mkdir()
    for name in ("out.run", "out.mp4", "out.json"):
        Path(name).rename(Path("elsewhere") / name)
    monkeypatch.chdir("elsewhere")
    assert run("df", ["--resume", "out.mp4"]).code == 0
    assert np.array_equal(frames_of("out.mp4"), expected)


CHANGES: dict[str, tuple[list[str], str]] = {
    "seed": (["--seed", "2"], "--seed 2: the run in out.run was begun with 1; give the same"),
    "steps": (["--inference_steps", "4"], "--inference_steps 4: the run in out.run was begun with 3; give the same"),
    "size": (["--height", "48"], "--height 48: the run in out.run was begun with 32; give the same"),
    "precision": (["--dtype", "bfloat16"], "dtype='bfloat16': the run in out.run was begun with 'float32'"),
    "output": (["--output", "new.mp4"], "leave out --output"),
    "prompt": (["--prompt", "a fox"], "--prompt_file: stands in place of one for all windows: leave it out, or do not"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_refused(change: str, broken) -> None:
    flags, named = CHANGES[change]
    before = sorted(Path("out.run").iterdir()), Path("out.mp4").read_bytes()
    child = run("df", ["--resume", "out.run", *flags])
    assert child.code == 2
    assert named in child.said.splitlines()[-1]
    assert (sorted(Path("out.run").iterdir()), Path("out.mp4").read_bytes()) == before


def test_changed_prompts_and_models_are_refused(broken, models: dict[str, Path]) -> None:
    Path("story.txt").write_text(STORY.replace("star", "square"))
    child = run("df", ["--resume", "out.run"])
    assert (child.code, "--prompt_file: number 2 differs" in child.said) == (2, True), child.said
    Path("story.txt").write_text(STORY)
    child = run("df", ["--resume", "out.run", "--model_id", str(models["t2v"])])
    assert (child.code, "begun with another model: its " in child.said) == (2, True), child.said


def test_what_cannot_be_gone_on_with_says_why(broken) -> None:
    words, _ = broken
    again = run("df", [*words, "--output", "out.mp4"])
    assert again.code == 2
    assert "an unfinished run lies beside it: go on with --resume out.run" in again.said
    assert "is one of generate_video_df.py: go on with that" in run("t2v", ["--resume", "out.run"]).said
    Path("empty.run").mkdir()
    assert "it holds no run.json" in run("df", ["--resume", "empty.run"]).said
    import fcntl

    with open("out.run/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = run("df", ["--resume", "out.run"])
        assert (busy.code, "another process is rendering this run" in busy.said) == (2, True), busy.said
    assert run("df", ["--resume", "out.run"]).code == 0
    done = run("df", ["--resume", "out.run"])
    assert (done.code, "this run is finished: out.mp4" in done.said) == (2, True), done.said


def test_a_run_that_has_done_nothing_leaves_no_folder(unbroken) -> None:
    words, _, _ = unbroken(STORY_RUN)

    def stop() -> None:
        DiT.embed = lambda *_: os.kill(os.getpid(), signal.SIGINT)

    child = run("df", [*words, "--output", "out.mp4"], stop)
    assert child.code == 130
    assert "no frame was rendered" in child.said
    assert sorted(path.name for path in Path().iterdir()) == ["source.mp4", "story.txt"]
