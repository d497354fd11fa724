"""Images fit, videos survive: what goes in comes out, and a killed writer leaves a playable file."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from skyreels_fast import _encoder, media

NOW = datetime.datetime(2025, 5, 16, 12, 34, 56)


def moving(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames that all differ: a smooth gradient that brightens, [n, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 2, y * 2, (x + y)], -1)
    return np.stack([(base * 0.5 + 2 * (i % 60)).clip(0, 255) for i in range(count)]).astype(np.uint8)


def decoded(path) -> int:
    """How many frames ffmpeg decodes; 0 where it makes nothing of the file."""
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run([exe, "-i", str(path), "-f", "null", "-"], capture_output=True, text=True)
    found = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("frame=")]
    return int(found[-1].split("=")[1].split()[0]) if done.returncode == 0 and found else 0


def eventually(condition, timeout_s: float = 15.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_to_uint8_rounds_and_clamps():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    values = torch.cat([levels + 0.49 / 127.5, levels - 0.49 / 127.5, torch.tensor([-3.0, 3.0])]).float()
    out = media.to_uint8(values.expand(3, 1, 2, -1))
    assert out.shape == (1, 2, 514, 3)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert out[0, 0, :512, 0].tolist() == [*range(256), *range(256)]
    assert out[0, 0, 512:, 2].tolist() == [0, 255]


def test_uint8_and_back_is_exact():
    frames = torch.from_numpy(moving(3))
    video = media.from_uint8(frames)
    assert video.shape == (1, 3, 3, 64, 96)
    assert (video.min() >= -1) and (video.max() <= 1)
    assert torch.equal(media.to_uint8(video[0]), frames)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("floats", [True, False])
def test_chunks_come_to_the_host_in_order(device, floats):
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.rand(1, 3, n, 64, 96, generator=generator) * 2.2 - 1.1 for n in (1, 4, 4, 2)]
    arrived = list(media.to_host((chunk.to(device) for chunk in chunks), floats=floats))
    assert len(arrived) == len(chunks)
    for chunk, (kept, frames) in zip(chunks, arrived, strict=True):
        assert frames.device.type == "cpu" and torch.equal(frames, media.to_uint8(chunk[0]))
        assert torch.equal(kept, chunk) if floats else kept is None
    assert list(media.to_host([], floats=floats)) == []


def test_an_image_of_the_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    out = media.fit_image(Image.fromarray(pixels), 64, 96)
    assert out.shape == (3, 1, 64, 96)
    assert torch.equal(out[:, 0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize(
    ("size", "target", "box"),
    [
        ((200, 64), (64, 96), (52, 0, 148, 64)),  # wide: its sides go
        ((96, 100), (64, 96), (0, 18, 96, 82)),  # tall: top and bottom go
        ((97, 64), (64, 96), (0, 0, 96, 64)),  # a box between pixels is cut at whole ones
    ],
)
def test_an_image_is_cropped_around_its_centre(size, target, box):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = media.fit_image(Image.fromarray(pixels), *target)
    left, top, right, bottom = box
    expected = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[:, None] / 127.5 - 1
    assert torch.equal(out, expected)


def test_fitting_keeps_proportions():
    y, x = np.mgrid[:300, :700]
    disc = ((x - 350) ** 2 + (y - 150) ** 2 < 100**2).astype(np.uint8) * 255
    out = media.fit_image(Image.fromarray(disc).convert("RGB"), 96, 96)[0, 0] > 0
    rows, columns = out.any(1).sum().item(), out.any(0).sum().item()
    assert abs(rows - 64) <= 1
    assert abs(columns - 64) <= 1


def test_load_image_drops_alpha_and_turns_upright(tmp_path):
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(path, exif=exif)
    assert media.load_image(path).size == (60, 80)
    assert media.load_image(Image.new("RGBA", (8, 4))).mode == "RGB"
    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        media.load_image(tmp_path / "missing.png")


@pytest.mark.parametrize("mode", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled(tmp_path, mode):
    levels = np.array([[0, 257, 32896, 65535], [128, 129, 40000, 300]])
    path, image = tmp_path / "grey.png", Image.fromarray(levels.astype(mode))
    image.save(path)
    for source in (path, image):
        pixels = np.asarray(media.load_image(source))
        assert np.array_equal(pixels, np.repeat(np.rint(levels / 257).astype(np.uint8)[..., None], 3, -1))


def test_an_array_is_no_image():
    with pytest.raises(ValueError, match="must be a PIL image or the path"):
        media.load_image(np.zeros((4, 4, 3), np.uint8))


def test_playable_frames(tmp_path):
    path = tmp_path / "out.mp4"
    assert media.playable_frames(path) == 0
    with media.VideoWriter(path, 24, 64, 96) as writer:
        writer.write(moving(9))
    assert media.playable_frames(path) == 9
    path.write_bytes(b"no video")
    assert media.playable_frames(path) == 0


def test_a_video_comes_back_as_it_went_in(tmp_path):
    path, frames = tmp_path / "out.mp4", moving(50)
    with media.VideoWriter(path, 24, 64, 96) as writer:
        writer.write(torch.from_numpy(frames[:1]))
        for start in range(1, 50, 4):
            writer.write(frames[start : start + 4])
    assert writer.frames == decoded(path) == 50
    source = media.VideoSource(path)
    assert (source.height, source.width, source.fps, source.frame_count) == (64, 96, 24, 50)
    read = np.stack(list(source))
    assert np.abs(read.astype(int) - frames).mean() < 3  # chroma is halved, colours are lossy
    assert len(np.unique(read.mean((1, 2, 3)).round(1))) > 45  # each frame is its own


def test_the_file_is_h264_yuv420p_and_starts_at_zero(tmp_path):
    path = tmp_path / "a name: with % and 'quotes'.mp4"
    with media.VideoWriter(path, 30000 / 1001, 64, 96) as writer:
        writer.write(moving(31))
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", f"file:{path}"], capture_output=True, text=True
    ).stderr
    assert "Video: h264" in said
    assert "yuv420p" in said
    assert "29.97 fps" in said
    assert "start: 0.000000" in said


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(24, 24), (12.5, Fraction(25, 2)), (29.97, Fraction(30000, 1001)), (23.976, Fraction(24000, 1001))],
)
def test_frame_rates_are_exact(fps, rate):
    assert _encoder.frame_rate(fps) == rate


def test_the_writer_refuses_other_frames(tmp_path):
    with pytest.raises(ValueError, match="even"):
        media.VideoWriter(tmp_path / "odd.mp4", 24, 63, 96)
    with media.VideoWriter(tmp_path / "out.mp4", 24, 64, 96) as writer:
        for bad in (np.zeros((1, 64, 96, 3)), np.zeros((1, 96, 64, 3), np.uint8), np.zeros((64, 96, 3), np.uint8)):
            with pytest.raises(ValueError, match="is not uint8"):
                writer.write(bad)
        writer.write(moving(2))
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(moving(1))


def test_a_dead_ffmpeg_is_reported(tmp_path):
    writer = media.VideoWriter(tmp_path / "out.mp4", 24, 64, 96)
    writer.write(moving(4))
    writer._process.kill()
    with pytest.raises(media.VideoError, match="ffmpeg stopped writing"):
        for _ in range(100):
            writer.write(moving(4))
            time.sleep(0.01)


def test_ffmpegs_last_words_are_passed_on(tmp_path):
    writer = media.VideoWriter(tmp_path / "no" / "such" / "folder.mp4", 24, 64, 96)
    with pytest.raises(media.VideoError, match=r"folder\.mp4: .*(No such file|opening output)") as error:
        writer.close()
    assert "\n" not in str(error.value)


def test_missing_ffmpeg_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    _encoder.check_encoder.cache_clear()
    with pytest.raises(media.VideoError, match="IMAGEIO_FFMPEG_EXE"):
        media.check_encoder()
    monkeypatch.undo()
    assert media.check_encoder() == imageio_ffmpeg.get_ffmpeg_exe()


WRITER = """
import sys, time, numpy as np
from skyreels_fast.media import VideoWriter
writer = VideoWriter(sys.argv[1], 12, 64, 96)
rng = np.random.default_rng(0)
for _ in range(60):
    writer.write(rng.integers(0, 255, (4, 64, 96, 3), dtype=np.uint8))
while writer.frames < 240:
    time.sleep(0.01)
print(writer._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("victims", ["writer", "writer and ffmpeg"])
def test_kill_9_leaves_a_playable_file(tmp_path, victims):
    path = tmp_path / "out.mp4"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    ffmpeg = int(child.stdout.readline())
    if victims == "writer":  # ffmpeg sees its input end, and ends the file
        child.kill()
        child.wait()
        assert eventually(lambda: not alive(ffmpeg))
        assert decoded(path) == 240
    else:  # what was in ffmpeg's hands is lost, not what was before
        assert eventually(lambda: decoded(path) > 100), "frames reach the file while it is written"
        os.kill(ffmpeg, signal.SIGKILL)
        child.kill()
        child.wait()
        assert decoded(path) > 100
    child.stdout.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_video_source_of_an_array():
    frames = moving(19, 80, 120)
    source = media.VideoSource(torch.from_numpy(frames))
    assert (source.height, source.width, source.fps, source.frame_count) == (80, 120, None, 19)
    chunks = list(source.fitted(80, 120))
    assert [len(chunk) for chunk in chunks] == [8, 8, 3]
    assert torch.equal(torch.cat(chunks), torch.from_numpy(frames))
    small = torch.cat(list(source.fitted(32, 64)))
    assert small.shape == (19, 32, 64, 3)
    alone = media.to_uint8(media.fit_image(Image.fromarray(frames[7]), 32, 64))
    assert torch.equal(small[7:8], alone)


def test_video_source_refuses_what_is_none(tmp_path):
    with pytest.raises(ValueError, match="is not uint8"):
        media.VideoSource(np.zeros((2, 8, 8, 3), np.float32))
    fake = tmp_path / "fake.mp4"
    fake.write_text("no")
    with pytest.raises(ValueError, match=r"fake\.mp4: is not a readable video") as error:
        media.VideoSource(fake)
    assert "\n" not in str(error.value)


def test_a_long_video_is_not_read_whole(tmp_path):
    path = tmp_path / "long.mp4"
    with media.VideoWriter(path, 24, 64, 96) as writer:
        for _ in range(30):
            writer.write(moving(20))
    first = next(iter(media.VideoSource(path).fitted(64, 96)))
    assert first.shape == (8, 64, 96, 3)
    assert media.VideoSource(path).frame_count == 600


def test_output_names_have_the_references_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = media.output_path("video_out", "A fox: it runs? 100%", 42, NOW)
    assert path.as_posix() == "result/video_out/A fox: it runs? 100%_42_2025-05-16_12-34-56.mp4"


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("x" * 300, "x" * 100 + "_42_"),
        ("龙" * 300, "龙"),
        ("../../etc/passwd", "_.._etc_passwd_42_"),
        ("a/b\\c", "a_b_c_42_"),
        ("line\none\x00two\x1b[0m", "line one two [0m_42_"),
        (".hidden", "hidden_42_"),
        ("", "video_42_"),
        ("...", "video_42_"),
        ("👩‍👩‍👧" * 50, "👩"),
    ],
)
def test_output_names_fit_and_stay_where_they_belong(tmp_path, monkeypatch, prompt, start):
    monkeypatch.chdir(tmp_path)
    path = media.output_path("out", prompt, 42, NOW)
    assert path.parent.as_posix() == "result/out"
    assert path.name.startswith(start)
    assert len(path.with_suffix(".json").name.encode()) <= 255
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    path.with_suffix(".json").write_text("")


def test_output_names_never_repeat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        path = media.output_path("out", "龙" * 300, 2**63 - 1, NOW)
        media.check_writable(path)
        path.touch()
        names.append(path.stem[-8:])
    assert names == ["12-34-56", "-34-56_1", "-34-56_2"]


def test_check_writable(tmp_path):
    media.check_writable(tmp_path / "a" / "b" / "out.mp4", make=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("kept")
    media.check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    for bad in (tmp_path, tmp_path / "file" / "out.mp4", "/proc/nowhere/out.mp4", tmp_path / ("x" * 300) / "out.mp4"):
        with pytest.raises(ValueError, match="^cannot write ") as error:
            media.check_writable(bad, make=False)
        assert "\n" not in str(error.value)
