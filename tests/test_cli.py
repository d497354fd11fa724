"""The commands: what a run prints and leaves behind; what was rendered is never lost."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_pipeline import COMMANDS, CPU, FAKE, decoded, sidecar

import skyreels_fast
from skyreels_fast import _flags, _job, _sidecar, cli


@pytest.mark.parametrize("program", COMMANDS)
def test_a_run_leaves_a_video_and_its_settings(fake, capfd, program):
    words = [*CPU, "--prompt", "A fox/dog: 100%", "--seed", "7", "--guidance_scale", "3"]
    assert COMMANDS[program](words) == 0
    folder = {"generate_video_df.py": "diffusion_forcing", "generate_video.py": "video_out"}[program]
    (path,) = Path("result", folder).glob("*.mp4")
    said = capfd.readouterr()
    assert path.name.startswith("A fox_dog: 100%_7_20")
    assert said.out.splitlines()[0] == "plan: 16 frames"
    assert str(path) in said.out.splitlines()[-1]
    assert "Traceback" not in said.err
    assert decoded(path) == 16
    record = sidecar(path)
    assert record["complete"] is True
    assert (record["frames"], record["video"], record["model_id"]) == (16, path.name, "tiny")
    assert record["settings"]["seed"] == 7
    assert record["settings"]["guidance_scale"] == 3
    assert record["settings"]["negative_prompt"]
    assert record["timings_s"]["denoise"] == 1.0
    assert record["timings_s"]["total"] > 0
    assert set(record["versions"]) == {"python", "torch", "cuda", "transformers", "skyreels_fast"}
    assert record["versions"]["skyreels_fast"]
    (opened,) = fake.opened
    assert opened[0] == "tiny"
    assert opened[1] == "cpu"
    assert str(opened[2]) == "torch.float32"
    assert record["vae_dtype"] == "float32"
    assert opened[4] == ("df" if program == "generate_video_df.py" else "t2v")
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".json")])


def test_the_recorded_command_makes_the_same_settings(fake, picture):
    words = [*CPU, *shlex.split("--seed 3 --ar_step 2 --causal_block_size 5 --addnoise_condition 20 --fps 12.5"),
             "--teacache", "--teacache_coefficients", "-1.5,2,1e-07", "--image", picture,
             "--prompt", "it's -- \"a\" fox", "--negative_prompt", "-blur", "--output", "first.mp4"]  # fmt: skip
    assert cli.generate_video_df(words) == 0
    first = sidecar(Path("first.mp4"))
    python, program, *again = shlex.split(first["command"])
    assert (python, program) == ("python", "generate_video_df.py")
    fake.DEFAULTS = {}  # nothing may be left to the model
    assert cli.generate_video_df([*again, "--output", "again.mp4"]) == 0
    assert sidecar(Path("again.mp4"))["settings"] == first["settings"]
    assert first["settings"]["teacache_coefficients"] == [-1.5, 2.0, 1e-07]


def test_output_may_name_a_file_and_replaces_it(fake):
    for seed in ("1", "2"):
        assert cli.generate_video([*CPU, "--output", "folder/out.mp4", "--seed", seed]) == 0
    assert sorted(path.name for path in Path("folder").iterdir()) == ["out.json", "out.mp4"]
    assert sidecar(Path("folder/out.mp4"))["settings"]["seed"] == 2


def test_the_references_empty_paths_mean_none(fake):
    assert cli.generate_video_df([*CPU, "--video_path", "", "--image", "", "--output", "out.mp4"]) == 0
    assert sidecar(Path("out.mp4"))["settings"]["video"] is None


def test_every_flag_of_the_reference_is_there():
    both = ("outdir model_id resolution num_frames image guidance_scale shift inference_steps use_usp offload fps seed "
            "prompt prompt_enhancer teacache teacache_thresh use_ret_steps")  # fmt: skip
    df = "end_image video_path ar_step causal_attention causal_block_size base_num_frames overlap_history "
    df += "addnoise_condition"
    t2v_flags = vars(_flags.parser("generate_video.py", "t2v").parse([]))
    df_flags = vars(_flags.parser("generate_video_df.py", "df").parse([]))
    assert set(both.split()) <= set(t2v_flags)
    assert set(f"{both} {df}".split()) <= set(df_flags)
    assert not set(df.split()) & set(t2v_flags)
    assert (df_flags["outdir"], df_flags["model_id"]) == ("diffusion_forcing", "Skywork/SkyReels-V2-DF-1.3B-540P")
    assert (t2v_flags["outdir"], t2v_flags["model_id"]) == ("video_out", "Skywork/SkyReels-V2-T2V-14B-540P")


def test_examples_name_the_command_that_is_there():
    said = _flags.parser("skyreels-fast-df", "df").format_help()
    assert "    skyreels-fast-df --resume" in said and "generate_video_df.py" not in said
    assert "torchrun --nproc_per_node=8 --no-python skyreels-fast-df --use_usp" in said


@pytest.mark.parametrize("program", COMMANDS)
def test_help_teaches(capsys, program):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[program](["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert "--model_id" in said
    for line in said.splitlines():
        if line.startswith(f"    {program}"):
            _flags.parser(program, "df" if "df" in program else "t2v").parse(shlex.split(line)[1:])


def test_notes_are_passed_on(fake, capfd):
    assert cli.generate_video_df([*CPU, "--num_frames", "20", "--addnoise_condition", "80"]) == 0
    said = capfd.readouterr().err
    assert "generate_video_df.py: note: --num_frames 20: counts as 17" in said
    assert "note: --addnoise_condition 80" in said


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--offload", "--offload has no effect on cpu"),
        ("--teacache_thresh 0.1", "--teacache_thresh has no effect without --teacache"),
        ("--use_ret_steps --teacache_coefficients 1,2", "--use_ret_steps and --teacache_coefficients have no effect "
         "without --teacache"),
        ("--base_num_frames 50", "--base_num_frames 50: counts as 49, since the model makes 4k + 1 frames"),
    ],
)  # fmt: skip
def test_flags_that_do_nothing_are_told(fake, capfd, flags, note):
    assert cli.generate_video_df([*CPU, *flags.split()]) == 0
    assert f"generate_video_df.py: note: {note}" in capfd.readouterr().err.splitlines()


def test_a_crash_keeps_what_was_rendered(fake, capfd):
    fake.error_at_chunk = (3, RuntimeError("kernel went away"))
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert "RuntimeError: kernel went away" in said
    assert said.splitlines()[-1] == "generate_video.py: 12 of 16 frames can be played in out.mp4"
    assert decoded("out.mp4") == 12
    record = sidecar(Path("out.mp4"))
    assert (record["complete"], record["frames"]) == (False, 12)


def test_a_crash_before_the_first_frame_leaves_no_file(fake, capfd):
    fake.error_at_chunk = (0, RuntimeError("kernel went away"))
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    assert "no frame was rendered" in capfd.readouterr().err
    assert not Path("out.mp4").exists()


def test_full_gpu_memory_is_one_line_of_advice(fake, capfd):
    import torch

    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\nmore"
    fake.error_at_chunk = (2, torch.cuda.OutOfMemoryError(text))
    assert cli.generate_video_df([*CPU, "--output", "out.mp4"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "error: GPU memory is full while decoding (it tried to allocate 2.00 GiB): denoising needs about" in said
    assert decoded("out.mp4") == 8


def test_full_host_memory_is_one_line_of_advice(fake, capfd):
    from skyreels_fast.host_memory import HostMemoryError

    fake.error_at_chunk = (0, HostMemoryError("16 MiB of host memory cannot be pinned"))
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "error: host memory is full while decoding: 16 MiB of host memory cannot be pinned: close other" in said


def test_too_little_gpu_memory_is_said_before_loading_and_does_not_stop_it(fake, capfd):
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 0
    assert "warning" not in capfd.readouterr().err
    fake.short_of_memory = True
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "generate_video.py: warning: denoising needs about 34.5 GiB"


def test_a_budget_of_gpu_memory(fake, capfd):
    assert cli.generate_video([*CPU, "--vram", "7.5", "--output", "out.mp4"]) == 0
    assert fake.budgets == [7.5]
    record = sidecar(Path("out.mp4"))
    assert record["vram"] == 7.5 and "--vram 7.5" in record["command"]
    assert cli.generate_video([*CPU, "--vram", "much", "--output", "out.mp4"]) == 2
    assert "--vram: 'much' is not a number of GiB" in capfd.readouterr().err


def test_a_broken_checkpoint_is_one_line(fake, capfd):
    from skyreels_fast.checkpoint import CheckpointError

    fake.error_at_chunk = (0, CheckpointError("model.safetensors: blocks.3.ffn.0.weight is missing"))
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "error: model.safetensors: blocks.3.ffn.0.weight is missing" in said


def test_a_dead_encoder_is_one_line(fake, capfd, monkeypatch):
    from skyreels_fast import media

    def write(self, frames):
        raise media.VideoError("ffmpeg stopped writing out.mp4: No space left on device")

    monkeypatch.setattr(media.VideoWriter, "write", write)
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "No space left on device" in said
    assert said.splitlines()[-1] == "generate_video.py: 0 of 16 frames can be played in out.mp4"


def test_frames_that_never_reached_the_file_are_not_counted(fake, capfd, monkeypatch):
    from skyreels_fast import media

    close = media.VideoWriter.close

    def fail(self):
        close(self)
        with open(self.path, "r+b") as file:
            file.truncate(40)
        raise media.VideoError("ffmpeg stopped writing out.mp4: No space left on device")

    monkeypatch.setattr(media.VideoWriter, "close", fail)
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    assert "0 of 16 frames can be played in out.mp4" in capfd.readouterr().err
    record = sidecar(Path("out.mp4"))
    assert (record["complete"], record["frames"]) == (False, 0)


def started(tmp_path):
    """A long run in a process of its own, some frames of it in out.mp4."""
    (tmp_path / "fake_pipeline.py").write_text(FAKE + "\nchunks, pause_s = 400, 0.02\n")
    code = (
        "import sys, fake_pipeline; sys.modules['skyreels_fast.pipeline'] = fake_pipeline\n"
        "from skyreels_fast import cli\n"
        "sys.exit(cli.generate_video_df(['--device', 'cpu', '--output', 'out.mp4', '--seed', '5']))"
    )
    out = tmp_path / "out.mp4"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    return child, out


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_leaves_a_playable_file(tmp_path, number, code, word):
    child, out = started(tmp_path)
    os.killpg(child.pid, number)  # as a terminal does: to all processes in the foreground
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    record = sidecar(out)
    assert record["complete"] is False
    assert 0 < record["frames"] < 1600
    assert record["frames"] % 4 == 0
    assert decoded(out) == record["frames"]
    assert "Traceback" not in said
    assert said.splitlines()[-2:] == [
        f"generate_video_df.py: {word}",
        f"generate_video_df.py: {record['frames']} of 1600 frames can be played in out.mp4",
    ]


def test_a_signal_that_follows_an_error_leaves_the_end_alone(fake, capfd, monkeypatch):
    """As torchrun sends one when another process is gone."""
    fake.error_at_chunk, explain = (1, RuntimeError("boom")), _job._explain

    def explain_amid_signals(*args):
        signal.raise_signal(signal.SIGTERM)
        return explain(*args)

    monkeypatch.setattr(_job, "_explain", explain_amid_signals)
    assert cli.generate_video([*CPU, "--output", "out.mp4"]) == 1
    assert "4 of 16 frames can be played in out.mp4" in capfd.readouterr().err
    assert sidecar(Path("out.mp4"))["frames"] == 4


def test_a_killed_run_leaves_no_older_record(tmp_path):
    (tmp_path / "out.json").write_text('{"complete": true, "settings": {"seed": 1}}')
    child, out = started(tmp_path)
    child.kill()
    child.communicate(timeout=60)
    record = sidecar(out)
    assert (record["complete"], record["frames"], record["settings"]["seed"]) == (False, 0, 5)


def test_the_record_is_there_while_rendering_and_goes_back_if_nothing_comes_of_it(fake, monkeypatch):
    seen = []

    def call(self, plan, **options):
        seen.append(sidecar(Path("folder/out.mp4")))
        raise RuntimeError("kernel went away")

    monkeypatch.setattr(fake.Pipeline, "__call__", call)
    words = [*CPU, "--output", "folder/out.mp4"]
    assert cli.generate_video(words) == 1
    assert (seen[0]["complete"], seen[0]["frames"]) == (False, 0)
    assert not Path("folder").exists()
    Path("folder").mkdir()
    Path("folder/out.json").write_text("older")
    assert cli.generate_video(words) == 1
    assert Path("folder/out.json").read_text() == "older"


def test_ctrl_c_before_rendering(fake, capfd):
    fake.error_at_open = KeyboardInterrupt()
    assert cli.generate_video([*CPU]) == 130
    assert capfd.readouterr().err == "generate_video.py: interrupted\n"


def test_the_enhanced_prompt_is_rendered_and_both_are_recorded(fake, capfd, monkeypatch):
    import skyreels_fast.enhance

    asked = []

    def enhance(prompt, device, seed):
        asked.append((prompt, device, seed))
        return "A red fox in deep snow."

    monkeypatch.setattr(skyreels_fast.enhance, "enhance", enhance)
    assert cli.generate_video([*CPU, "--prompt_enhancer", "--prompt", "fox", "--output", "out.mp4"]) == 0
    record = sidecar(Path("out.mp4"))
    assert (record["original_prompt"], record["settings"]["prompt"]) == ("fox", "A red fox in deep snow.")
    assert asked == [("fox", "cpu", record["settings"]["seed"])]
    assert "--prompt_enhancer" not in record["command"]
    assert "enhanced prompt: A red fox in deep snow." in capfd.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_shows_both_bars(fake):
    from skyreels_fast._progress import ConsoleProgress

    stream = Terminal()
    progress = ConsoleProgress(6, stream)
    progress.stage("load")
    for index in range(2):
        progress.window(index, 2, 3)
        for _ in range(3):
            progress.step()
        progress.stage("decode")
        progress.stage("decode")
    progress.close()
    text = stream.getvalue()
    for part in ("loading the model", "window 1/2", "window 2/2, decoding", "in total", "3/3", "6/6", "s a step"):
        assert part in text


def test_progress_in_a_log_is_a_line_now_and_then(fake):
    from skyreels_fast._progress import ConsoleProgress

    stream = io.StringIO()
    progress = ConsoleProgress(100, stream)
    for name in ("text", "image", "load", "encode", "denoise"):
        progress.stage(name)
    progress.window(0, 1, 100)
    for _ in range(100):
        progress.step()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["reading the prompt ...", "loading the model ...", "window 1/1: 100 steps"]
    assert len(lines) == 5
    assert lines[3].startswith("window 1/1: step 100/100, ")
    assert "left" not in lines[3]
    assert lines[4] == "window 1/1: decoding ..."
    eager = ConsoleProgress(100, stream, interval_s=0.0)
    eager.window(0, 1, 100)
    eager.step()
    assert stream.getvalue().splitlines()[-1].startswith("window 1/1: step 1/100, ")


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_the_pace_is_that_of_denoising(fake, kind):
    from skyreels_fast._progress import ConsoleProgress

    now, stream = [0.0], kind()
    progress = ConsoleProgress(6, stream, interval_s=0.0, clock=lambda: now[0])
    for index in range(2):
        progress.window(index, 2, 3)
        for _ in range(3):
            now[0] += 2
            progress.step()
        progress.stage("decode")
        now[0] += 100
    progress.close()
    text = stream.getvalue()
    assert "2.00 s a step, 00:10 left" in text or kind is Terminal
    assert {line.split(" s a step")[0].split()[-1] for line in text.split("\n") if " s a step" in line} == {"2.00"}
    assert "00:00 left" not in text
    if kind is io.StringIO:  # two steps of the second window, and a decoding as long as the first
        assert "window 2/2: step 1/3, 2.00 s a step, 01:44 left" in text


def test_a_sidecar_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    _sidecar.write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        _sidecar.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_package_knows_its_version():
    assert _sidecar._version("skyreels_fast") == skyreels_fast.__version__
    assert _sidecar._version("no-such-package") is None
