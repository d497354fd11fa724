"""The commands under torchrun: what they write, what they refuse, what is left when a process dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_pipeline import decoded, sidecar
from PIL import Image

from skyreels_fast import cli
from skyreels_fast._resume import resume_line

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--model_id", "tiny"]
SMALL = [*TINY, "--height", "48", "--width", "80", "--base_num_frames", "9", "--overlap_history", "5", "--seed", "3"]


def torchrun(directory: Path, count: int, *flags: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    return subprocess.Popen(
        [*launcher, str(ROOT / "generate_video_df.py"), *SMALL, "--output", "out.mp4", *flags],
        cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def rank_of(pid: int) -> str | None:
    try:
        found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None
    return found[1].decode() if found else None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process to kill in /proc")
def test_a_process_that_dies_ends_the_run_which_one_process_goes_on_with(tmp_path: Path) -> None:
    run = torchrun(tmp_path, 2, "--use_usp", "--num_frames", "13", "--inference_steps", "150")
    try:
        said = []
        for line in run.stderr:
            said.append(line)
            if line.startswith("window 2/2"):
                break
        (victim,) = [pid for pid in children(run.pid) if rank_of(pid) == "1"]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        out, rest = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
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


_ELSEWHERE = """
import os, sys
sys.path.insert(0, sys.argv[1])
os.makedirs(f"host{os.environ['RANK']}", exist_ok=True)
os.chdir(f"host{os.environ['RANK']}")
from skyreels_fast import cli
raise SystemExit(cli.generate_video_df(sys.argv[2:]))
"""


@pytest.mark.parametrize("lacking", [0, 1])
def test_what_one_process_refuses_all_do_and_say_why(lacking: int, tmp_path: Path) -> None:
    """As on two hosts, of which one has the image."""
    (tmp_path / "run.py").write_text(_ELSEWHERE)
    there = tmp_path / f"host{1 - lacking}"
    there.mkdir()
    Image.new("RGB", (80, 48)).save(there / "first.png")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    flags = ["--use_usp", "--num_frames", "9", "--image", "first.png", "--output", "out.mp4"]
    words = [*launcher, str(ROOT / "python"), *SMALL, *flags]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert len(re.findall(r"error: --image 'first\.png': .*", done.stderr)) == 1
    assert [file.name for file in there.iterdir()] == ["first.png"]


def test_bad_flags_are_said_once(tmp_path: Path) -> None:
    run = torchrun(tmp_path, 2, "--use_usp", "--num_frames", "9", "--ulysses_degree", "3")
    _, said = run.communicate(timeout=120)
    assert said.count("--ulysses_degree 3: does not fit 4 heads and 2 processes") == 1
    assert not list(tmp_path.iterdir())


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
