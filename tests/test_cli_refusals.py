"""The commands: bad input is one line and exit code 2 before any model is opened."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

# A pipeline that renders grey frames of a tiny size, here or in a process of its own.
from fake_pipeline import COMMANDS, CPU

from skyreels_fast import cli
from skyreels_fast._flags import with_flags

NUMBER_FLAGS = {
    "--num_frames": ("0", "-5", "abc", "9.5", "nan", "-inf"),
    "--inference_steps": ("0", "-1", "1001", "x"),
    "--guidance_scale": ("-1", "nan", "inf", "-inf", "high"),
    "--shift": ("0", "-8", "nan", "inf"),
    "--fps": ("0", "-24", "241", "nan"),
    "--seed": ("-1", "9223372036854775808", "1.5", "x"),
    "--height": ("0", "-16", "540", "x"),
    "--width": ("0", "959"),
    "--teacache_thresh": ("-0.1", "nan", "x"),
}
DF_NUMBER_FLAGS = {
    "--ar_step": ("-1", "x"),
    "--causal_block_size": ("0", "-2", "1.5"),
    "--base_num_frames": ("0", "x"),
    "--overlap_history": ("0", "-17"),
    "--addnoise_condition": ("-1", "1000", "nan"),
}
BAD_FLAGS = [
    *[(program, flag, bad) for program in COMMANDS for flag, values in NUMBER_FLAGS.items() for bad in values],
    *[("generate_video_df.py", flag, bad) for flag, values in DF_NUMBER_FLAGS.items() for bad in values],
    *[
        (program, flag, bad)
        for program in COMMANDS
        for flag, bad in (
            ("--resolution", "1080P"),
            ("--resolution", ""),
            ("--image", "missing.png"),
            ("--image", "."),
            ("--image", "fake.png"),
            ("--device", "gpu"),
            ("--device", "cuda:99"),
            ("--dtype", "int8"),
            ("--vae_dtype", "int8"),
            ("--teacache_coefficients", "1,x"),
            ("--teacache_coefficients", "1,nan"),
            ("--teacache_coefficients", ""),
            ("--output", "video.avi"),
            ("--output", "."),
            ("--output", "fake.png/video.mp4"),
        )
    ],
    ("generate_video_df.py", "--end_image", "fake.png"),
    ("generate_video_df.py", "--video_path", "fake.png"),
]


@pytest.mark.parametrize(("program", "flag", "bad"), BAD_FLAGS)
def test_bad_values_are_refused(fake, capfd, program, flag, bad):
    Path("fake.png").write_text("no picture\n")
    # What the flag needs beside it must not be what is missing.
    beside = {"--height": ["--width", "96"], "--width": ["--height", "64"], "--video_path": ["--overlap_history", "5"]}
    assert COMMANDS[program]([flag, bad, *beside.get(flag, [])]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{program}: error: ")
    assert flag in said.err or (flag == "--output" and bad in said.err)
    assert len(said.err.splitlines()) == 1
    assert fake.opened == []


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("generate_video.py", "--height 64", "--height 64: needs --width as well"),
        ("generate_video_df.py", "--end_image picture.png", "--end_image 'picture.png': needs --image as well"),
        ("generate_video_df.py", "--video_path picture.png", "--video_path 'picture.png': needs --overlap_history (17"),
        (
            "generate_video_df.py",
            "--video_path missing.mp4 --overlap_history 17",
            "--video_path 'missing.mp4': no such",
        ),
        (
            "generate_video_df.py",
            "--video_path picture.png --overlap_history 17",
            "--video_path 'picture.png': is a single picture: give --image instead",
        ),
        ("generate_video_df.py", "--image picture.png --end_image picture.png --causal_attention", "--end_image"),
        ("generate_video_df.py", "--output picture.png", "--output 'picture.png': must end in .mp4"),
        ("generate_video.py", "--numframes 17", "unknown argument --numframes; did you mean --num_frames?"),
        ("generate_video.py", "--ar_step 5", "unknown argument --ar_step; generate_video_df.py has it"),
        ("generate_video.py", "prompt", "unknown argument prompt; generate_video.py --help lists the flags"),
        ("generate_video.py", "--seed", "argument --seed: expected one argument"),
        ("generate_video.py", "--device cpu --attention fa3", "error: --attention fa3: backend 'fa3' is not available"),
        ("generate_video.py", "--device cpu --attention fa9", "error: --attention fa9: there is no backend 'fa9'"),
        (
            "generate_video_df.py",
            "--resume nope.run",
            "--resume 'nope.run': no folder nope.run: give the NAME.run that lies beside a broken-off NAME.mp4",
        ),
        ("generate_video_df.py", "--resume nope.mp4", "--resume 'nope.mp4': no folder nope.run: give"),
        ("generate_video.py", "--use_usp", "--use_usp needs --seed"),
        ("generate_video.py", "--use_usp --seed 1 --prompt_enhancer", "--use_usp and --prompt_enhancer exclude"),
        ("generate_video_df.py", "--use_usp --seed 1 --ring_degree x", "--ring_degree 'x': must be a whole"),
    ],
)
def test_what_does_not_go_together_is_refused(fake, capfd, picture, program, words, message):
    assert COMMANDS[program](words.split()) == 2
    said = capfd.readouterr()
    assert said.err.startswith(f"{program}: error: ")
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert fake.opened == []


def test_a_video_is_not_written_over_its_source(fake, capfd):
    assert cli.generate_video_df([*CPU, "--output", "clip.mp4"]) == 0
    before = Path("clip.mp4").read_bytes()
    assert (
        cli.generate_video_df([*CPU, *shlex.split("--video_path clip.mp4 --overlap_history 5 --output ./clip.mp4")])
        == 2
    )
    assert "--output './clip.mp4': is the input of --video_path" in capfd.readouterr().err
    assert Path("clip.mp4").read_bytes() == before


@pytest.mark.parametrize("words", ["--image missing.png", "--height 64", "--output x/a.avi"])
def test_a_refused_run_leaves_no_folder(fake, words):
    assert cli.generate_video([*CPU, *words.split()]) == 2
    fake.error_at_plan = ValueError("seed=1: no")
    assert cli.generate_video(CPU) == 2
    assert list(Path().iterdir()) == []


def test_an_outdir_that_is_a_file_is_refused(fake, capfd):
    Path("result").mkdir()
    Path("result/clips").write_text("kept")
    assert cli.generate_video([*CPU, "--outdir", "clips"]) == 2
    said = capfd.readouterr().err
    assert "error: --outdir 'clips': cannot write " in said
    assert "result/clips is a file, not a folder" in said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("num_frames=98: use 97 with overlap_history=5", "--num_frames 98: use 97 with --overlap_history 5"),
        ("image: this model makes a video from an image", "--image: this model makes a video from an image"),
        ("prompt='needs image, seed=3': must be", "--prompt 'needs image, seed=3': must be"),
        ("video='end_image/num_frames.mp4': no", "--video_path 'end_image/num_frames.mp4': no"),
        ("resolution='1P': must be 540P, or give height and width", "--resolution '1P': must be 540P, or give --height "
         "and --width"),
        ("generation_config.json num_frames=0: must be", "generation_config.json num_frames=0: must be"),
        ("use_ret_steps and teacache_thresh have no effect without teacache", "--use_ret_steps and --teacache_thresh "
         "have no effect without --teacache"),
    ],
)  # fmt: skip
def test_messages_name_flags(message, said):
    assert with_flags(message) == said


@pytest.mark.parametrize(("called", "said"), [("skyreels-fast-df", "skyreels-fast-df"), ("x", "generate_video_df.py")])
def test_the_command_goes_by_the_name_it_was_called(fake, capfd, monkeypatch, called, said):
    monkeypatch.setattr("sys.argv", [f"/usr/bin/{called}"])
    assert cli.generate_video_df(["--fps", "0"]) == 2
    assert capfd.readouterr().err.startswith(f"{said}: error: --fps 0.0: ")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x/config.json is missing"),
        FileNotFoundError(2, "No such file or directory", "x"),
        OSError("cannot reach the hub\nafter many tries"),
    ],
)
@pytest.mark.parametrize("where", ["error_at_open", "error_at_plan"])
def test_a_model_that_cannot_be_used_is_one_line(fake, capfd, error, where):
    setattr(fake, where, error)
    assert cli.generate_video([*CPU]) == 2
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 1
    assert str(error).split("\n")[0] in said.err
    assert fake.loaded == []


def test_errors_of_the_plan_name_the_flag(fake, capfd):
    fake.error_at_plan = ValueError("num_frames=98 leaves a block unfinished")
    assert cli.generate_video([*CPU]) == 2
    assert "error: --num_frames 98 leaves a block unfinished" in capfd.readouterr().err


def test_mode_errors_name_the_flag(fake, capfd, picture):
    assert cli.generate_video([*CPU, "--image", picture]) == 2
    said = capfd.readouterr().err
    assert f"error: --image '{picture}': this model takes no image: use generate_video_df.py" in said
    assert fake.loaded == []
