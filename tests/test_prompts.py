"""Prompts over time: what a file may say, which window gets which prompt, and what is encoded and kept for it."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

import skyreels_fast as sf
from skyreels_fast import cli
from skyreels_fast.dit.context import Context
from skyreels_fast.encoders.text import TextEncoder
from skyreels_fast.prompts import checked_prompts, delayed, first_frames, read_prompts, unused, window_prompts
from skyreels_fast.request import RequestError
from skyreels_fast.sampling.windows import plan_windows

WINDOWS = plan_windows(145, 49, 17)  # new frames from 0, 49, 81, 113


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "story.txt", "\ufeff# a story\n\n  a fox: red  \r\na 龙\n\n#end")
    assert read_prompts(path) == ("a fox: red", "a 龙")


def test_a_file_may_say_from_which_frame_on(tmp_path: Path) -> None:
    path = written(tmp_path / "story.txt", "0: a fox\n\n# later\n 97 :a hare: white\n")
    assert read_prompts(path) == ((0, "a fox"), (97, "a hare: white"))


BAD = {
    "empty": ("# nothing\n\n", "holds no prompt: write one a line"),
    "mixed": ("0: a fox\na hare\n", "line 2 has no frame, line 1 has: write FRAME: PROMPT in all or in none"),
    "late start": ("\n5: a fox\n", "line 2: the first prompt begins at frame 5: let it begin at 0"),
    "order": ("0: a\n8: b\n8: c\n", "line 3: frame 8 is not after 8: write them in ascending order"),
    "no text": ("0: a\n#\n8:\n", "line 3: frame 8 has no prompt: write one after the colon"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_line_and_the_fix(name: str, tmp_path: Path) -> None:
    text, said = BAD[name]
    path = written(tmp_path / "story.txt", text)
    with pytest.raises(RequestError) as error:
        read_prompts(path)
    assert str(error.value) == f"prompts={str(path)!r}: {said}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(RequestError, match=r"no UTF-8 text \(byte 2\)"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(RequestError, match="No such file"):
        read_prompts(tmp_path / "none.txt")


def test_each_window_takes_its_prompt() -> None:
    assert first_frames(WINDOWS, 0) == [0, 49, 81, 113]
    assert window_prompts(("a", "b"), WINDOWS, 0) == ("a", "b", "b", "b")
    assert window_prompts(((0, "a"), (49, "b"), (82, "c")), WINDOWS, 0) == ("a", "b", "b", "c")
    # An extended video's own 30 frames come first.
    assert window_prompts(((0, "a"), (100, "b")), WINDOWS, 30) == ("a", "a", "b", "b")
    with pytest.raises(RequestError, match="5 prompts for 4 windows: leave out 1"):
        window_prompts(tuple("abcde"), WINDOWS, 0)
    with pytest.raises(RequestError, match="frame 145 is past the last frame, 144"):
        window_prompts(((0, "a"), (145, "b")), WINDOWS, 0)


def test_prompts_that_no_window_takes_are_told() -> None:
    assert unused(((0, "a"), (49, "b"), (50, "c"), (60, "d"), (114, "e")), WINDOWS, 0) == [50, 114]
    assert unused(("a",), WINDOWS, 0) == []


def test_prompts_that_wait_for_their_window_are_told() -> None:
    assert delayed(((0, "a"), (30, "b"), (81, "c"), (90, "d"), (91, "e")), WINDOWS, 0) == [(30, 49), (91, 113)]
    assert delayed(((0, "a"), (49, "b")), WINDOWS, 0) == []
    assert delayed(((0, "a"), (40, "b")), WINDOWS, 30) == [(40, 79)]
    assert delayed(("a", "b"), WINDOWS, 0) == []


@pytest.mark.parametrize("value", ["a fox", [], [3], ["a", (3, "b")], [(0, "a"), (True, "b")], [(0, "a"), ("4", "b")]])
def test_requests_refuse_other_values(value: object) -> None:
    with pytest.raises(RequestError, match="^prompts"):
        checked_prompts(value)


def test_prompts_exclude_a_prompt_and_are_for_diffusion_forcing(pipelines: dict[str, sf.Pipeline]) -> None:
    with pytest.raises(RequestError, match="do not give prompt"):
        sf.Request(prompt="a", prompts=["b"])
    with pytest.raises(RequestError, match="do not give context"):
        sf.Request(context=torch.zeros(1, 8), prompts=["b"])
    with pytest.raises(RequestError, match="only diffusion forcing"):
        pipelines["t2v"].plan(sf.Request(prompts=["b"], height=32, width=32))


@pytest.fixture
def pipe(models: dict[str, Path]) -> sf.Pipeline:
    return sf.Pipeline.from_pretrained(models["df"], device="cpu", dtype=torch.float32)


LONG = {"height": 32, "width": 32, "base_num_frames": 9, "overlap_history": 5, "inference_steps": 1, "seed": 3}


def test_windows_are_denoised_with_their_prompts(pipe: sf.Pipeline) -> None:
    """The first window is that of a run with the first prompt alone; with one prompt all the way it is that run."""
    story = pipe(sf.Request(prompts=["a red circle", "a blue star"], num_frames=17, **LONG))
    fox = pipe(sf.Request(prompt="a red circle", num_frames=17, **LONG))
    assert story.settings.prompt == "a red circle"
    assert torch.equal(story.latents[0], fox.latents[0])
    assert not torch.equal(story.latents[1], fox.latents[1])
    same = pipe(sf.Request(prompts=[(0, "a red circle"), (9, "a red circle")], num_frames=17, **LONG))
    assert torch.equal(same.frames, fox.frames)


def test_prompts_are_encoded_once_and_only_those_in_use_are_kept(
    pipe: sf.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    alive: list[weakref.ref] = []
    most = [0]
    encode, init = TextEncoder.encode, Context.__init__

    def encode_and_tell(self: TextEncoder, prompts: list[str]) -> list[torch.Tensor]:
        encoded.extend(prompts)
        return encode(self, prompts)

    def init_and_tell(self: Context, *args: object) -> None:
        init(self, *args)
        alive.append(weakref.ref(self))
        gc.collect()
        most[0] = max(most[0], sum(ref() is not None for ref in alive))

    monkeypatch.setattr(TextEncoder, "encode", encode_and_tell)
    monkeypatch.setattr(Context, "__init__", init_and_tell)
    prompts = ["a red circle", "a blue star", "a red circle", "a green square", "a green square"]
    request = sf.Request(prompts=prompts, negative_prompt="blur", num_frames=25, **LONG)
    pipe(request)
    assert encoded == ["a red circle", "a blue star", "a green square", "blur"]
    assert len(alive) == 4 + 1  # fox, hare, fox again, hen; the negative one throughout
    assert most[0] == 2


def test_the_command_records_them_and_repeats_them(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "story.txt", "0: a red circle\n8: a blue star\n9: a green square\n10: a red square\n")
    words = ["--model_id", str(models["df"]), "--device", "cpu", "--prompt_file", "story.txt", "--num_frames", "17"]
    words += [word for name, value in LONG.items() for word in (f"--{name}", str(value))]
    assert cli.generate_video_df([*words, "--output", "out.mp4"]) == 0
    said = capsys.readouterr()
    assert "3 prompts, " in said.out
    assert "note: --prompt_file: the prompt of frame 10 takes effect at frame 13, where the next window" in said.err
    assert "note: --prompt_file: no window begins while that of frame 8 holds, so it is never used" in said.err
    record = json.loads(Path("out.json").read_text())
    assert record["settings"]["prompts"] == [[0, "a red circle"], [8, "a blue star"], [9, "a green square"],
                                             [10, "a red square"]]  # fmt: skip
    assert "--prompt_file story.txt" in record["command"] and "--prompt " not in record["command"]
    written(tmp_path / "story.txt", "a\nb\nc\nd\n")
    assert cli.generate_video_df([*words, "--output", "out.mp4"]) == 2
    assert "--prompt_file: 4 prompts for 3 windows: leave out 1" in capsys.readouterr().err
    assert cli.generate_video_df([*words, "--prompt_enhancer"]) == 2
    assert "enhance the lines of --prompt_file beforehand" in capsys.readouterr().err
