"""Both commands from end to end, on golden models: every mode ends in a video of the frames promised."""

from __future__ import annotations

import json
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import GOLDEN, golden_directory

from skyreels_fast import cli, media
from skyreels_fast.checkpoint import Checkpoint

SIZE = ["--height", "48", "--width", "64"]
QUICK = ["--device", "cpu", "--inference_steps", "2", "--seed", "1", "--prompt", "a red circle"]
COMMANDS = {"generate_video_df": cli.generate_video_df, "generate_video": cli.generate_video}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A video of 9 frames at 12 frames a second."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)
    with media.VideoWriter(tmp_path / "source.mp4", 12, 48, 64) as writer:
        writer.write(noise)
    return tmp_path / "source.mp4"


def decoded(path: Path) -> tuple[int, dict]:
    """Frames that ffmpeg decodes, and what it says of the file."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    return sum(1 for _ in reader), meta


FIRST = ["--image", str(GOLDEN / "first.png")]
LAST = ["--end_image", str(GOLDEN / "last.png")]
MODES: dict[str, tuple[str, list[str], int]] = {
    "short": ("df", ["--num_frames", "9"], 9),
    "fps 16": ("df", ["--num_frames", "9", "--fps", "16"], 9),
    "guidance 1": ("df", ["--num_frames", "9", "--guidance_scale", "1"], 9),
    "async": ("df", ["--num_frames", "13", "--ar_step", "1", "--causal_block_size", "2"], 13),
    "causal": ("df", ["--num_frames", "13", "--causal_block_size", "2", "--causal_attention"], 13),
    "image": ("df", ["--num_frames", "9", *FIRST], 9),
    "image and end image": ("df", ["--num_frames", "9", *FIRST, *LAST], 9),
    "image async": ("df", ["--num_frames", "13", "--ar_step", "1", "--causal_block_size", "2", *FIRST], 13),
    "long": ("df", ["--num_frames", "17", "--base_num_frames", "9", "--overlap_history", "5"], 17),
    "long async": (
        "df",
        ["--num_frames", "17", "--base_num_frames", "9", "--overlap_history", "5", "--ar_step", "1"],
        17,
    ),
    "noised overlap": (
        "df",
        ["--num_frames", "17", "--base_num_frames", "9", "--overlap_history", "5", "--addnoise_condition", "20"],
        17,
    ),
    "teacache": ("df", ["--num_frames", "9", "--teacache", "--teacache_coefficients", "1,0"], 9),
    "offload": ("df", ["--num_frames", "9", "--offload"], 9),
    "T2V": ("t2v", ["--num_frames", "9"], 9),
    "I2V": ("i2v", ["--num_frames", "9", *FIRST], 9),
    "single image": ("t2v", ["--num_frames", "1"], 1),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_ends_in_a_video(
    name: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mode, flags, frames = MODES[name]
    command = cli.generate_video_df if mode == "df" else cli.generate_video
    path = tmp_path / "out.mp4"
    assert command(["--model_id", str(models[mode]), "--output", str(path), *SIZE, *QUICK, *flags]) == 0
    found, meta = decoded(path)
    assert (found, meta["size"]) == (frames, (64, 48))
    assert meta["fps"] == (16 if name == "fps 16" else 24)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["complete"] and record["frames"] == frames
    assert f" ({frames} frame{'' if frames == 1 else 's'}, " in capsys.readouterr().out


def test_a_video_is_extended_at_its_own_rate(models: dict[str, Path], source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    flags = ["--video_path", str(source), "--overlap_history", "5", "--num_frames", "13", "--base_num_frames", "9"]
    assert cli.generate_video_df(["--model_id", str(models["df"]), "--output", str(path), *SIZE, *QUICK, *flags]) == 0
    found, meta = decoded(path)
    assert (found, meta["fps"]) == (9 + 8, 12)


def test_the_recorded_command_makes_the_same_video(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    flags = ["--model_id", str(models["df"]), "--device", "cpu", "--num_frames", "9", "--inference_steps", "2", *SIZE]
    assert cli.generate_video_df([*flags, "--output", "first.mp4"]) == 0
    record = json.loads(Path("first.json").read_text())
    words = shlex.split(record["command"])
    assert cli.generate_video_df([*words[2:], "--output", "second.mp4"]) == 0
    assert Path("first.mp4").read_bytes() == Path("second.mp4").read_bytes()


BAD: dict[str, tuple[str, str, list[str], str]] = {
    "unknown directory": ("generate_video_df", "/nowhere/at/all", [], "/nowhere/at/all"),
    "empty directory": ("generate_video_df", "EMPTY", [], "config.json"),
    "no VAE": ("generate_video_df", "NO VAE", [], "Wan2.1_VAE.pth"),
    "no text encoder": ("generate_video_df", "NO TEXT", [], "models_t5_umt5-xxl-enc-bf16.pth"),
    "block": ("generate_video_df", "df", ["--num_frames", "17", "--causal_block_size", "2"], "13 or 21"),
    "overlap of a whole window": (
        "generate_video_df",
        "df",
        ["--num_frames", "41", "--base_num_frames", "17", "--overlap_history", "17"],
        "--overlap_history",
    ),
    "long without overlap": ("generate_video_df", "df", ["--num_frames", "101"], "overlap_history"),
    "end image alone": ("generate_video_df", "df", LAST, "--end_image"),
    "I2V without image": ("generate_video", "i2v", [], "--image"),
    "I2V as DF": ("generate_video_df", "i2v", FIRST, "generate_video.py"),
    "T2V with image": ("generate_video", "t2v", FIRST, "--image"),
    "USP without seed": ("generate_video_df", "df", ["--use_usp"], "--seed"),
    "TeaCache of a model without coefficients": ("generate_video_df", "df", ["--teacache"], "--teacache_coefficients"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_weight_is_loaded(
    name: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    for loader in ("load_transformer", "load_vae", "load_text_encoder", "load_image_encoder"):
        monkeypatch.setattr(Checkpoint, loader, refuse)
    monkeypatch.chdir(tmp_path)
    command, model, flags, named = BAD[name]
    seed = [] if name == "USP without seed" else ["--seed", "1"]
    words = ["--model_id", _model(model, models, tmp_path), "--device", "cpu", "--prompt", "x", *seed, *SIZE, *flags]
    assert COMMANDS[command](words) == 2
    said = capsys.readouterr().err.strip()
    assert named in said and "\n" not in said


def _model(name: str, models: dict[str, Path], tmp_path: Path) -> str:
    if name not in ("EMPTY", "NO VAE", "NO TEXT"):
        return str(models.get(name, name))
    directory = tmp_path / "model"
    if name == "EMPTY":
        directory.mkdir()
        return str(directory)
    golden_directory("df", directory)
    if name == "NO VAE":
        (directory / "Wan2.1_VAE.pth").unlink()
    return str(directory)
