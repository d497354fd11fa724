"""A film of takes: plays while it grows, goes on from any cut, and is the same film however often it was taken up."""

from __future__ import annotations

import re
import resource
import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import skyreels_fast as sf
from skyreels_fast import _encoder, media
from skyreels_fast import film as film_module
from skyreels_fast._encoder import VideoError
from skyreels_fast.film import Film, Mark, _in_fragments


def noisy(count: int) -> np.ndarray:
    """Grey frames that drift: each its own, none easy to encode."""
    steps = np.random.default_rng(0).integers(-3, 4, (count, 64, 96, 1))
    return np.repeat(np.cumsum(steps, 0) + 128, 3, axis=3).clip(0, 255).astype(np.uint8)


FRAMES = noisy(90)
CUTS = (36, 40, 72)


def film_in(folder: Path, fps: float = 24) -> Film:
    return Film(folder / "out.mp4", fps, 64, 96, folder)


def write(film: Film, start: int, stop: int) -> list[Mark]:
    """Frames `start` to `stop`, four at a time, cut where a take ends."""
    marks = []
    for at in range(start, stop, 4):
        film.write(FRAMES[at : min(at + 4, stop)])
        if at + 4 in CUTS:
            marks.append(film.cut())
    return marks


def shown(path: Path) -> np.ndarray:
    return np.stack(list(media.VideoSource(path)))


def times(path: Path) -> tuple[list[int], str]:
    """When each frame is shown, in ticks, and what ffmpeg says of the file."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    said = subprocess.run(
        [program, "-i", str(path), "-vf", "showinfo", "-f", "null", "-"], capture_output=True, text=True
    ).stderr
    return [int(ticks) for ticks in re.findall(r" pts: *(-?\d+)", said)], said


@pytest.mark.parametrize("fps", [24, 30000 / 1001, 12.5])
def test_takes_follow_each_other_without_a_gap(tmp_path: Path, fps: float) -> None:
    film = film_in(tmp_path, fps)
    marks = write(film, 0, 90)
    assert [mark.frames for mark in marks] == [*CUTS]
    film.close()
    growing = shown(tmp_path / "out.mp4")
    assert growing.shape == FRAMES.shape
    assert np.abs(growing.astype(int) - FRAMES).mean() < 3
    for _ in range(2):  # of fragments, then with one index
        ticks, said = times(tmp_path / "out.mp4")
        assert len(ticks) == 90
        assert set(np.diff(ticks)) == {ticks[1]}
        assert (ticks[0], "start: 0.000000" in said) == (0, True)
        assert not re.search("error|invalid|non.?monoton", said, re.IGNORECASE)
        film.make_plain()
        assert np.array_equal(shown(tmp_path / "out.mp4"), growing)
    assert b"moof" not in (tmp_path / "out.mp4").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("cut", range(3))
def test_a_film_taken_up_at_a_cut_is_the_same_film(tmp_path: Path, cut: int) -> None:
    whole = film_in(tmp_path)
    mark = write(whole, 0, 90)[cut]
    whole.close()
    expected = (tmp_path / "out.mp4").read_bytes()
    # What came after the cut is another's; it is dropped with the first write and plays until then.
    film = film_in(tmp_path)
    assert film.go_on(mark)
    assert (film.begun, film.frames) == (True, CUTS[cut])
    assert (tmp_path / "out.mp4").read_bytes() == expected
    write(film, CUTS[cut], 90)
    film.close()
    assert (tmp_path / "out.mp4").read_bytes() == expected


def test_it_plays_while_it_grows(tmp_path: Path) -> None:
    film = film_in(tmp_path)
    seen = []
    for at in range(0, 90, 6):
        film.write(FRAMES[at : at + 6])
        if at + 6 in CUTS:
            film.cut()
        seen.append(media.playable_frames(tmp_path / "out.mp4"))
    film.close()
    assert seen == sorted(seen)
    assert seen[5] == 36 and seen[11] == 72
    assert media.playable_frames(tmp_path / "out.mp4") == 90


def test_an_older_file_is_replaced_and_a_shorter_one_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"older" * 100_000)
    film = film_in(tmp_path)
    assert (film.begun, film.cut()) == (False, Mark())
    (mark, *_) = write(film, 0, 40)
    film.close()
    assert len(shown(tmp_path / "out.mp4")) == 40
    (tmp_path / "out.mp4").write_bytes((tmp_path / "out.mp4").read_bytes()[: mark.bytes - 1])
    assert not film_in(tmp_path).go_on(mark)
    (tmp_path / "out.mp4").unlink()
    assert not film_in(tmp_path).go_on(mark)


def test_pictures_of_another_encoder_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = film_in(tmp_path)
    (mark, *_) = write(film, 0, 36)
    film.close()
    monkeypatch.setattr("skyreels_fast._encoder.frame_rate", lambda fps: 25)
    other = film_in(tmp_path)
    other.go_on(mark)
    with pytest.raises(media.VideoError, match="begun by another ffmpeg"):
        write(other, 36, 90)
        other.close()
    assert len(shown(tmp_path / "out.mp4")) == 36


def test_a_full_disk_leaves_whole_fragments(tmp_path: Path) -> None:
    film = film_in(tmp_path)
    write(film, 0, 36)
    size = (tmp_path / "out.mp4").stat().st_size
    film.write(FRAMES[36:72])
    film._writer.close()  # the take is whole; the film has no room for it
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            film.cut()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.mp4").stat().st_size == size
    assert len(shown(tmp_path / "out.mp4")) == 36


def test_a_plain_film_stays_as_it_is(tmp_path: Path) -> None:
    film = film_in(tmp_path)
    write(film, 0, 90)
    film.close()
    path = tmp_path / "out.mp4"
    grown = path.read_bytes()
    film.make_plain()
    plain = path.read_bytes()
    assert b"moof" in grown and b"moof" not in plain and np.array_equal(shown(path), shown_in(grown, tmp_path))
    film.make_plain()
    assert path.read_bytes() == plain
    # The payload of a long video has its size in 64 bits, or none where it is the last box.
    for box in ((1).to_bytes(4, "big") + b"mdat" + (24).to_bytes(8, "big") + bytes(8), bytes(4) + b"mdatmoof"):
        path.write_bytes(box)
        assert not _in_fragments(path)
    path.write_bytes((1).to_bytes(4, "big") + b"mdat" + (16).to_bytes(8, "big") + (8).to_bytes(4, "big") + b"moof")
    assert _in_fragments(path)


def test_a_copy_that_ends_too_early_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ffmpeg 4 gives the last frame no time, and readers then leave it out."""
    film = film_in(tmp_path)
    write(film, 0, 9)
    film.close()
    path = tmp_path / "out.mp4"
    grown, copy = path.read_bytes(), film_module.make_plain

    def shortened(source: Path, target: Path) -> None:
        copy(source, target)
        data = bytearray(target.read_bytes())
        at = data.index(b"mdhd") + 4
        ticks = struct.unpack_from(">I", data, at + 16)[0]
        struct.pack_into(">I", data, at + 16, ticks - ticks // 9)
        target.write_bytes(data)

    monkeypatch.setattr(film_module, "make_plain", shortened)
    with pytest.raises(VideoError, match="all but the last frame's time"):
        film.make_plain()
    assert path.read_bytes() == grown
    monkeypatch.undo()
    film.make_plain()
    assert b"moof" not in path.read_bytes()


def shown_in(data: bytes, folder: Path) -> np.ndarray:
    (folder / "other.mp4").write_bytes(data)
    return shown(folder / "other.mp4")


def test_a_source_that_breaks_off_is_told(tmp_path: Path, pipelines: dict[str, sf.Pipeline]) -> None:
    film = film_in(tmp_path, 12)
    write(film, 0, 90)
    film.close()
    film.make_plain()
    path = tmp_path / "out.mp4"
    context = {"context": torch.zeros(4, 64), "negative_context": torch.zeros(4, 64)}
    request = {"overlap_history": 5, "num_frames": 13, "height": 32, "width": 48, **context}
    whole = pipelines["df"].plan(sf.Request(video=path, **request))
    assert (whole.source_frames, whole.notes) == (90, ())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    broken = pipelines["df"].plan(sf.Request(video=path, **request))
    assert 5 < broken.source_frames < 60
    fault = f"is broken off or damaged after {broken.source_frames} of about 90 frames, and is extended from there"
    assert broken.notes == (f"video={str(path)!r}: {fault}",)


def test_an_encoder_that_outlives_its_program_disturbs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may even open its file when another one is at work already."""
    late = tmp_path / "late"
    late.write_text(f'#!/bin/sh\nwhile [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done\n'
                    f'exec "{imageio_ffmpeg.get_ffmpeg_exe()}" "$@"\n')  # fmt: skip
    late.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(_encoder, "check_encoder", lambda: str(late))
        killed = film_in(tmp_path)
        killed.write(FRAMES[:4])
    film = film_in(tmp_path)
    write(film, 0, 32)
    (tmp_path / "go").touch()
    killed._writer.close()
    write(film, 32, 36)
    film.close()
    write(unbroken := Film(tmp_path / "unbroken.mp4", 24, 64, 96, tmp_path), 0, 36)
    unbroken.close()
    assert np.array_equal(shown(film.path), shown(unbroken.path))
