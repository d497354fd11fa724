"""The commands under torchrun: what they write, what they refuse, what is left when a process dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from fake_pipeline import decoded, sidecar
from PIL import Image
from safetensors import safe_open

from skyreels_fast import cli
from skyreels_fast._resume import resume_line
from skyreels_fast.parallel import meeting

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--model_id", "tiny"]
SMALL = [*TINY, "--height", "48", "--width", "80", "--base_num_frames", "9", "--overlap_history", "5", "--seed", "3"]


COMMAND = ROOT / "generate_video_df.py"


def torchrun(directory: Path, count: int, *flags: str, script: Path = COMMAND) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    return subprocess.Popen(
        [*launcher, str(script), *SMALL, "--output", "out.mp4", *flags],
        cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@contextlib.contextmanager
def started(directory: Path, *flags: str, script: Path = COMMAND) -> Iterator[subprocess.Popen]:
    """Two processes by `torchrun`, of which nothing is left."""
    run = torchrun(directory, 2, *flags, script=script)
    try:
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def rank_of(pid: int) -> str | None:
    try:
        found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None
    return found[1].decode() if found else None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def second(run: subprocess.Popen) -> int:
    """The process of rank 1."""
    (found,) = [pid for pid in children(run.pid) if rank_of(pid) == "1"]
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a process in /proc")


@needs_proc
def test_a_process_that_dies_ends_the_run_which_one_process_goes_on_with(tmp_path: Path) -> None:
    with started(tmp_path, "--use_usp", "--num_frames", "13", "--inference_steps", "150") as run:
        said = []
        for line in run.stderr:
            said.append(line)
            if line.startswith("window 2/2"):
                break
        os.kill(second(run), signal.SIGKILL)
        killed = time.monotonic()
        out, rest = run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - killed < 60
    assert "9 of 13 frames can be played" in rest
    assert "another process of this run has ended" in rest or "stopped by SIGTERM" in rest
    assert "2 processes: ulysses 1 x ring 1 in each guidance branch" in out
    assert decoded(tmp_path / "out.mp4") == 9
    record = sidecar(tmp_path / "out.mp4")
    assert record["complete"] is False and record["frames"] == 9
    assert record["parallel"] == {"processes": 2, "ulysses": 1, "ring": 1, "branches": 2}
    assert record["command"].startswith("torchrun --nproc_per_node=2 generate_video_df.py ")
    assert "--use_usp" in record["command"]
    assert "Traceback" not in "".join(said)
    assert "go on with: torchrun --nproc_per_node=2 generate_video_df.py --use_usp --resume out.run" in rest

    alone = [sys.executable, str(ROOT / "generate_video_df.py"), "--resume", "out.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    resumed = subprocess.run(alone, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "9 of 13 frames are there already" in resumed.stdout
    assert decoded(tmp_path / "out.mp4") == 13
    record = sidecar(tmp_path / "out.mp4")
    assert record["complete"] is True and "parallel" not in record and "--use_usp" not in record["command"]


@needs_proc
def test_a_process_that_hangs_keeps_no_signal_from_saving_what_is_there(tmp_path: Path) -> None:
    """The first process waits for it in an exchange, and no Python runs there."""
    with started(tmp_path, "--use_usp", "--num_frames", "13", "--inference_steps", "1000") as run:
        for line in run.stderr:
            if line.startswith("window 1/2"):
                break
        time.sleep(2)
        victim = second(run)
        os.kill(victim, signal.SIGSTOP)
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        said = []
        for line in run.stderr:
            said.append(line)
            if "go on with" in line:
                break
        os.kill(victim, signal.SIGKILL)
        run.communicate(timeout=60)
    own = [line for line in said if line.startswith("generate_video_df.py: ")]
    assert own[0] == "generate_video_df.py: stopped by SIGTERM\n"
    steps = re.search(r"no frame is finished yet; (\d+) of 2000 steps are saved", own[1])
    assert steps and int(steps[1]) > 0
    assert "go on with: torchrun --nproc_per_node=2 generate_video_df.py --use_usp --resume out.run" in own[2]
    with safe_open(tmp_path / "out.run" / "steps.safetensors", "pt") as saved:
        assert saved.metadata() == {"window": "0", "row": steps[1]}


_ELSEWHERE = """
import os
os.makedirs(f"host{os.environ['RANK']}", exist_ok=True)
os.chdir(f"host{os.environ['RANK']}")
from skyreels_fast import cli
raise SystemExit(cli.generate_video_df())
"""


@pytest.mark.parametrize("lacking", [0, 1])
def test_what_one_process_refuses_all_do_and_say_why(lacking: int, tmp_path: Path) -> None:
    """As on two hosts, of which one has the image."""
    (tmp_path / "run.py").write_text(_ELSEWHERE)
    there = tmp_path / f"host{1 - lacking}"
    there.mkdir()
    Image.new("RGB", (80, 48)).save(there / "first.png")
    flags = ["--use_usp", "--num_frames", "9", "--image", "first.png"]
    run = torchrun(tmp_path, 2, *flags, script=tmp_path / "run.py")
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0
    assert len(re.findall(r"error: --image 'first\.png': .*", said)) == 1
    assert [file.name for file in there.iterdir()] == ["first.png"]


def test_bad_flags_are_said_once(tmp_path: Path) -> None:
    run = torchrun(tmp_path, 2, "--use_usp", "--num_frames", "9", "--ulysses_degree", "3")
    _, said = run.communicate(timeout=120)
    assert said.count("--ulysses_degree 3: does not fit 4 heads and 2 processes") == 1
    assert not list(tmp_path.iterdir())


def test_a_rank_that_torchrun_has_not_given_changes_nothing(monkeypatch, capsys, tmp_path: Path) -> None:
    """As some clusters set it in every container."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert cli.generate_video_df([*SMALL, "--output", "out.avi"]) == 2
    assert "--output 'out.avi': must end in .mp4" in capsys.readouterr().err


def test_processes_that_never_come_are_told_from_those_that_end(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meeting, "STEP_TIMEOUT", timedelta(seconds=1))
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.generate_video_df([*SMALL, "--use_usp", "--num_frames", "9", "--output", "out.mp4"]) == 2
    said = capsys.readouterr().err
    assert f"error: --use_usp: 2 processes have not met at 127.0.0.1:{given['MASTER_PORT']}: start the command" in said
    assert not list(tmp_path.iterdir())


# The first process has begun its run by then.
_LATE = """
import os, signal, time
from skyreels_fast import cli, pipeline

def plan(self, request, plan=pipeline.Pipeline.plan):
    if os.environ["RANK"] == "1":
        time.sleep(3)
        {act}
    return plan(self, request)

pipeline.Pipeline.plan = plan
raise SystemExit(cli.generate_video_df())
"""


def test_a_process_that_ends_while_the_first_has_begun_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(_LATE.format(act='raise RuntimeError("boom")'))
    (tmp_path / "here").mkdir()
    flags = ["--use_usp", "--num_frames", "9", "--output", "here/out.mp4"]
    run = torchrun(tmp_path, 2, *flags, script=tmp_path / "run.py")
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0 and "boom" in said
    assert not list((tmp_path / "here").iterdir())


@needs_proc
def test_a_signal_while_another_process_hangs_before_it_begins_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(_LATE.format(act="os.kill(os.getpid(), signal.SIGSTOP)"))
    (tmp_path / "here").mkdir()
    flags = ["--use_usp", "--num_frames", "9", "--output", "here/out.mp4"]
    with started(tmp_path, *flags, script=tmp_path / "run.py") as run:
        end = time.monotonic() + 60
        while not (tmp_path / "here" / "out.run" / "run.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        victim = second(run)
        while ") T " not in Path(f"/proc/{victim}/stat").read_text() and time.monotonic() < end:
            time.sleep(0.1)
        assert (tmp_path / "here" / "out.run").exists()
        run.send_signal(signal.SIGTERM)
        said = next(line for line in run.stderr if "stopped by" in line)
        os.kill(victim, signal.SIGKILL)
        run.communicate(timeout=60)
    assert said == "generate_video_df.py: stopped by SIGTERM\n"
    assert not list((tmp_path / "here").iterdir())


def test_several_hosts_are_in_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node7"}.items():
        monkeypatch.setenv(name, value)
    assert resume_line("generate_video_df.py", Path("a.run")) == (
        "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=node7:29500 --rdzv_id=1 --nproc_per_node=8 "
        "generate_video_df.py --use_usp --resume a.run"
    )


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, "--use_usp --seed 1", "start the command with torchrun --nproc_per_node=N"),
        ({}, "--ulysses_degree 2", "--ulysses_degree needs --use_usp"),
        ({}, "--no_cfg_parallel", "--no_cfg_parallel needs --use_usp"),
        ({}, "--use_usp --seed 1 --cfg_parallel --no_cfg_parallel", "exclude each other"),
        ({"LOCAL_WORLD_SIZE": "2"}, "--seed 1", "2 processes would each render the same video"),
    ],
)
def test_refusals(environment: dict[str, str], flags: str, message: str, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.generate_video_df([*TINY, *flags.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())
