"""The run directory from Python: nothing that is there is computed again, and the same bits come out."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load_golden
from torch import Tensor

import skyreels_fast as sf
from skyreels_fast import _keeper, _progress, cli
from skyreels_fast._signals import Stopped, stop
from skyreels_fast.dit.model import DiT
from skyreels_fast.run import Run, RunError
from skyreels_fast.sampling.denoise import State
from skyreels_fast.sampling.unipc import UniPC

TEXT = load_golden("text")
REQUEST = sf.Request(
    context=TEXT["cond"],
    negative_context=TEXT["uncond"],
    height=32,
    width=32,
    num_frames=29,
    base_num_frames=13,
    overlap_history=5,
    inference_steps=3,
    addnoise_condition=20,
    seed=5,
)
ONE_WINDOW = replace(REQUEST, num_frames=13, overlap_history=None, addnoise_condition=None, inference_steps=8)
TEACACHE = {"teacache": True, "teacache_coefficients": (1.0, 0.0), "teacache_thresh": 2.0}


class Stop(Exception):
    pass


class StopAt(sf.Progress):
    """Breaks the run off at its `step`-th row."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every pass through the blocks."""
    calls: list[None] = []
    run_branches = DiT.run_branches

    def counted(*args: object, **options: object) -> list[Tensor]:
        calls.append(None)
        return run_branches(*args, **options)

    monkeypatch.setattr(DiT, "run_branches", counted)
    return calls


@pytest.mark.parametrize("step", [1, 3, 4, 8, 9])
def test_a_broken_off_call_goes_on_where_it_was(
    step: int, pipelines: dict[str, sf.Pipeline], tmp_path: Path, block_calls: list[None]
) -> None:
    whole = pipelines["df"](REQUEST)
    block_calls.clear()
    with pytest.raises(Stop):
        pipelines["df"](REQUEST, run=Run(tmp_path / "run", every_s=0), progress=StopAt(step))
    result = pipelines["df"](REQUEST, run=tmp_path / "run")
    # The row in which it broke off is not saved any more, unless the next began.
    assert len(block_calls) == 9 + 1
    assert torch.equal(result.frames, whole.frames)
    assert all(torch.equal(a, b) for a, b in zip(result.latents, whole.latents, strict=True))
    block_calls.clear()
    assert torch.equal(pipelines["df"](REQUEST, run=tmp_path / "run").frames, whole.frames)
    assert not block_calls


@pytest.mark.parametrize("step", range(1, 8))
def test_teacache_goes_on_from_a_row_that_computes(
    step: int, pipelines: dict[str, sf.Pipeline], tmp_path: Path, block_calls: list[None]
) -> None:
    request = replace(ONE_WINDOW, **TEACACHE)
    whole = pipelines["df"](request)
    assert len(block_calls) == 3  # rows 0, 4 and 7
    with pytest.raises(Stop):
        pipelines["df"](request, run=Run(tmp_path / "run", every_s=0), progress=StopAt(step))
    block_calls.clear()
    result = pipelines["df"](request, run=tmp_path / "run")
    assert torch.equal(result.frames, whole.frames)
    assert len(block_calls) == (3 if step <= 4 else 2)  # row 0 is not worth saving, row 4 is


PLACES = {"the blocks": (DiT, "run_branches"), "the solver, its history overwritten": (UniPC, "step")}


def interrupt(monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    """Ctrl-C at the end of the `call`-th call."""
    owner, name = PLACES[place]
    method, left = getattr(owner, name), [call]

    def interrupted(*args: object, **options: object) -> object:
        done = method(*args, **options)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", [1, 2, 5, 9])
def test_ctrl_c_costs_the_step_in_progress(
    step: int, place: str, pipelines: dict[str, sf.Pipeline], tmp_path: Path, block_calls: list[None]
) -> None:
    whole = pipelines["df"](REQUEST)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, place, step)
        pipelines["df"](REQUEST, run=Run(tmp_path / "run"))
    block_calls.clear()
    result = pipelines["df"](REQUEST, run=tmp_path / "run")
    assert len(block_calls) == 9 - (step - 1)
    assert torch.equal(result.frames, whole.frames)


def test_ctrl_c_amid_reused_steps_goes_on_from_the_one_that_computed(
    pipelines: dict[str, sf.Pipeline], tmp_path: Path, block_calls: list[None]
) -> None:
    request = replace(ONE_WINDOW, **TEACACHE)
    whole = pipelines["df"](request)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "the solver, its history overwritten", 7)
        pipelines["df"](request, run=Run(tmp_path / "run"))
    block_calls.clear()
    assert torch.equal(pipelines["df"](request, run=tmp_path / "run").frames, whole.frames)
    assert len(block_calls) == 2  # rows 4 and 7


def test_what_is_saved_already_is_not_saved_again(pipelines: dict[str, sf.Pipeline], tmp_path: Path) -> None:
    steps, written = tmp_path / "run" / "steps.safetensors", []
    for call in (3, 1):  # the second goes on from the very step in which the first was stopped
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, "the blocks", call)
            pipelines["df"](ONE_WINDOW, run=Run(tmp_path / "run"))
        written.append(steps.stat().st_ino)
    assert written[0] == written[1]


def test_a_long_window_is_saved_now_and_then(pipelines: dict[str, sf.Pipeline], tmp_path: Path) -> None:
    """Each step takes 25 s here; with 60 s between two saves, every third row is saved."""
    now = [0.0]
    saved = []

    class Watch(sf.Progress):
        def step(self) -> None:
            now[0] += 25.0
            steps = tmp_path / "run" / "steps.safetensors"
            saved.append(steps.stat().st_mtime_ns if steps.exists() else 0)

    run = Run(tmp_path / "run", clock=lambda: now[0])
    whole = pipelines["df"](ONE_WINDOW, run=run, progress=Watch())
    assert [saved[i] != saved[i - 1] for i in range(1, 8)] == [False, False, True, False, False, True, False]
    assert not (tmp_path / "run" / "steps.safetensors").exists()
    assert (tmp_path / "run" / "window-00000.safetensors").exists()
    assert torch.equal(pipelines["df"](ONE_WINDOW).frames, whole.frames)


def test_a_run_of_no_seed_goes_on_with_the_one_it_drew(
    pipelines: dict[str, sf.Pipeline], tmp_path: Path, block_calls: list[None]
) -> None:
    request = replace(ONE_WINDOW, seed=None)
    first, again = (pipelines["df"](request, run=tmp_path / "run") for _ in range(2))
    assert torch.equal(first.frames, again.frames)
    assert len(block_calls) == 8
    assert not torch.equal(pipelines["df"](request, run=tmp_path / "other").frames, first.frames)


CHANGES = {
    "seed": ({"seed": 6}, "seed=6: the run in .* was begun with 5; give the same"),
    "context": ({"context": TEXT["cond"] + 1}, "context: differs from what the run"),
    "steps": ({"inference_steps": 4}, "inference_steps=4: .* begun with 3"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_request_is_refused(change: str, pipelines: dict[str, sf.Pipeline], tmp_path: Path) -> None:
    values, named = CHANGES[change]
    pipelines["df"](REQUEST, run=tmp_path / "run")
    with pytest.raises(RunError, match=named) as error:
        pipelines["df"](replace(REQUEST, **values), run=tmp_path / "run")
    assert "\n" not in str(error.value)


def test_another_model_is_refused(pipelines: dict[str, sf.Pipeline], tmp_path: Path) -> None:
    request = sf.Request(**{field: getattr(ONE_WINDOW, field) for field in ("context", "negative_context", "height",
                         "width", "seed")}, num_frames=5, inference_steps=1)  # fmt: skip
    pipelines["df"](request, run=tmp_path / "run")
    with pytest.raises(RunError, match="another model: its model.safetensors differs"):
        other = sf.Pipeline.from_pretrained(pipelines["t2v"].checkpoint.root, "cpu", torch.float32, mode="df")
        other(request, run=tmp_path / "run")


def test_a_folder_of_other_things_is_left_alone(pipelines: dict[str, sf.Pipeline], tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    (tmp_path / ".1.txt").write_text("")
    with pytest.raises(RunError, match="holds other files"):
        pipelines["df"](REQUEST, run=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".1.txt", "photo.png"]


def test_one_process_at_a_time(pipelines: dict[str, sf.Pipeline], tmp_path: Path) -> None:
    first = pipelines["df"](ONE_WINDOW, run=tmp_path / "run", stream=True)
    next(first.frames)
    with pytest.raises(RunError, match="in use"):
        pipelines["df"](ONE_WINDOW, run=tmp_path / "run")
    first.frames.close()
    assert pipelines["df"](ONE_WINDOW, run=tmp_path / "run").frames.shape[0] == 13


def live_bytes() -> int:
    """Memory of all tensors that Python can reach."""
    tensors = (item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Memory(sf.Progress):
    """What is alive whenever a window begins."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def window(self, index: int, count: int, calls: int) -> None:
        gc.collect()
        self.seen.append(live_bytes())


def most_alive(pipe: sf.Pipeline, frames: int, keep_latents: bool) -> int:
    request = replace(REQUEST, height=16, width=16, num_frames=frames, base_num_frames=73, overlap_history=9)
    memory = Memory()
    for _ in pipe(replace(request, inference_steps=1), True, memory, keep_latents=keep_latents).frames:
        pass
    return max(memory.seen)


def test_memory_does_not_grow_with_the_video(pipelines: dict[str, sf.Pipeline]) -> None:
    short, *longer = (most_alive(pipelines["df"], frames, keep_latents=False) for frames in (145, 289, 577))
    window_bytes = 16 * 19 * 2 * 2 * 4
    assert all(abs(most - short) < window_bytes for most in longer)
    assert most_alive(pipelines["df"], 289, keep_latents=True) > short + 1.5 * window_bytes


def test_the_command_holds_no_latents(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    monkeypatch.setattr(_progress.ConsoleProgress, "window", memory.window)
    words = ["--model_id", str(models["df"]), "--device", "cpu", "--height", "16", "--width", "16", "--num_frames"]
    words += ["73", "--base_num_frames", "17", "--overlap_history", "9", "--inference_steps", "1"]
    assert cli.generate_video_df([*words, "--output", str(tmp_path / "out.mp4")]) == 0
    assert len(memory.seen) == 8
    assert max(memory.seen[2:]) - min(memory.seen[2:]) < 16 * 5 * 2 * 2 * 4  # less than one window's latents
    assert json.loads((tmp_path / "out.json").read_text())["frames"] == 73


def test_an_error_costs_the_step_in_progress(
    pipelines: dict[str, sf.Pipeline], tmp_path: Path, block_calls: list[None]
) -> None:
    whole = pipelines["df"](REQUEST)
    with pytest.raises(Stop):
        pipelines["df"](REQUEST, run=Run(tmp_path / "run"), progress=StopAt(6))
    block_calls.clear()
    assert torch.equal(pipelines["df"](REQUEST, run=tmp_path / "run").frames, whole.frames)
    assert len(block_calls) == 9 - 5


def test_a_full_disk_does_not_hide_the_error(
    pipelines: dict[str, sf.Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run(tmp_path / "run")
    monkeypatch.setattr(run, "_save", full)
    with pytest.raises(Stop):
        pipelines["df"](REQUEST, run=run, progress=StopAt(2))


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The rows whose states a device that takes its time has made."""
    rows: set[int] = set()
    monkeypatch.setattr(
        _keeper._Copy, "whole", property(lambda copy: copy.state is not None and copy.state.row in rows)
    )
    monkeypatch.setattr(_keeper, "_SETTLE_S", 0.2)
    return rows


def states(*rows: int) -> Iterator[State]:
    for row in rows:
        yield State(row, torch.full((1, 16, 3, 2, 2), float(row)), (torch.full((1,), -float(row)),))


@pytest.mark.parametrize(("made", "saved"), [({1, 2, 3}, 3), ({1, 2}, 2)])
def test_of_what_is_queued_the_last_that_has_been_made_is_saved(
    made: set[int], saved: int, arrived: set[int], tmp_path: Path
) -> None:
    arrived |= made
    run = Run(tmp_path / "run")
    run.begin({})
    with pytest.raises(KeyboardInterrupt), run.keeper(0, 5, 0) as keep:
        for state in states(1, 2, 3):
            keep(state)
        raise KeyboardInterrupt
    state = run.state(0)
    assert state.row == saved and torch.equal(state.latents, torch.full((1, 16, 3, 2, 2), float(saved)))
    assert torch.equal(state.history[0], torch.tensor([-float(saved)]))


def test_what_is_made_in_a_moment_is_waited_for(arrived: set[int], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin({})
    with pytest.raises(KeyboardInterrupt), run.keeper(0, 5, 0) as keep:
        keep(next(states(2)))
        threading.Timer(0.05, lambda: arrived.add(2)).start()
        raise KeyboardInterrupt
    assert run.state(0).row == 2


def test_a_signal_that_follows_an_error_waits_for_what_is_saved(arrived: set[int], tmp_path: Path) -> None:
    """As torchrun sends one when another process is gone, which this one has noticed itself."""
    run = Run(tmp_path / "run")
    run.begin({})
    old = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped), run.keeper(0, 5, 0) as keep:
            keep(next(states(2)))
            threading.Timer(0.03, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            threading.Timer(0.1, lambda: arrived.add(2)).start()
            raise RuntimeError("connection closed by peer")
    finally:
        signal.signal(signal.SIGTERM, old)
    assert run.state(0).row == 2


def test_nothing_is_taken_once_the_last_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", every_s=0)
    run.begin({})
    with run.keeper(0, 5, 0) as keep:
        for state in states(1, 2):
            keep(state)
        run.save_last()
        for state in states(3, 4):
            keep(state)
    assert run.state(0).row == 2


def test_nothing_is_saved_of_what_has_not_been_made(arrived: set[int], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin({})
    with pytest.raises(KeyboardInterrupt), run.keeper(0, 5, 0) as keep:
        keep(next(states(1)))
        raise KeyboardInterrupt
    assert run.state(0) is None and not run.has_something


@pytest.mark.gpu
def test_states_come_whole_from_a_gpu_that_is_behind(tmp_path: Path) -> None:
    """Although the next row writes over the solver's history, and is queued before this one is made."""
    run = Run(tmp_path / "run", every_s=0)
    run.begin({})
    latents = torch.randn(1, 16, 31, 90, 160, device="cuda")
    history = torch.zeros_like(latents)
    with run.keeper(0, 12, 0) as keep:
        for row in range(1, 13):
            torch.cuda._sleep(50_000_000)
            history.copy_(latents + row)
            keep(State(row, latents * row, (history,)))
            if row in (5, 9):
                saved = run.state(0)
                assert saved.row >= row - 1
                assert torch.equal(saved.latents.cuda(), latents * saved.row)
                assert torch.equal(saved.history[0].cuda(), latents + saved.row)
    saved = run.state(0)
    assert saved.row == 12 and torch.equal(saved.latents.cuda(), latents * 12)


@pytest.mark.gpu
def test_a_signal_saves_what_is_there_whatever_the_device_waits_for(tmp_path: Path) -> None:
    """As when it waits for a process that is gone."""
    run = Run(tmp_path / "run")
    run.begin({})
    latents = torch.randn(1, 16, 3, 8, 8, device="cuda")
    with pytest.raises(KeyboardInterrupt), run.keeper(0, 5, 0) as keep:
        keep(State(2, latents * 2, (latents + 1,)))
        torch.cuda._sleep(20_000_000_000)  # ten seconds of work
        start = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - start < 5
    saved = run.state(0)
    assert saved.row == 2 and torch.equal(saved.latents.cuda(), latents * 2)
    assert torch.equal(saved.history[0].cuda(), latents + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_broken_off_call_goes_on_on_a_gpu(
    step: int, offload: bool, pipelines: dict[str, sf.Pipeline], tmp_path: Path
) -> None:
    """The noise generators' states are those of CUDA there; the bits are the same all the same."""
    pipe = sf.Pipeline.from_pretrained(pipelines["df"].checkpoint.root, "cuda", torch.bfloat16, offload, mode="df")
    whole = pipe(REQUEST)
    with pytest.raises(Stop):
        pipe(REQUEST, run=Run(tmp_path / "run", every_s=0), progress=StopAt(step))
    result = pipe(REQUEST, run=tmp_path / "run")
    assert torch.equal(result.frames, whole.frames)
    assert all(torch.equal(a, b) for a, b in zip(result.latents, whole.latents, strict=True))
