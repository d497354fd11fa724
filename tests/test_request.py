"""A request refuses every bad value by name, and fills in what is left open."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from skyreels_fast.config import NEGATIVE_PROMPT, NEGATIVE_PROMPT_DF
from skyreels_fast.media import VideoWriter
from skyreels_fast.plan import Plan
from skyreels_fast.request import DEFAULT_PROMPT, Request, Settings, resolve


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (96, 64), (10, 20, 30)).save(path)
    return path


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 12, 64, 96) as writer:
        writer.write(np.zeros((9, 64, 96, 3), np.uint8))
    return path


def settings(mode="df", defaults=None, hint="540P", **values) -> Settings:
    return resolve(Request(**values), mode=mode, defaults=defaults or {}, resolution_hint=hint)


WHOLE = {
    "num_frames": (0, -1, 10**30, 2.5, "97"),
    "base_num_frames": (0, -4),
    "overlap_history": (0, -17),
    "ar_step": (-1, 0.5),
    "causal_block_size": (0, -5),
    "addnoise_condition": (-1, 1000, 20.0),
    "inference_steps": (0, 1001, -3),
    "seed": (-1, 2**63, 1.0),
    "height": (0, -544, 8, 10**9),
    "width": (0, -960, 8),
}
REAL = {
    "guidance_scale": (-0.1, 10**400),
    "shift": (0, -1.0, 10**400),
    "fps": (0, 0.5, 241, -24),
    "teacache_thresh": (-0.2,),
}
NUMBERS = WHOLE | {name: (*values, "6") for name, values in REAL.items()}
BAD_NUMBERS = [
    (name, value) for name, values in NUMBERS.items() for value in (*values, math.nan, math.inf, -math.inf, True, [1])
]


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_bad_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*: must be ") as error:
        Request(**{name: value})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 3),
        ("prompt", "broken \udcff text"),
        ("negative_prompt", b"bytes"),
        ("resolution", "1080P"),
        ("resolution", 540),
        ("causal_attention", 1),
        ("teacache", "yes"),
        ("use_ret_steps", 0.0),
        ("teacache_coefficients", "1,2"),
        ("teacache_coefficients", []),
        ("teacache_coefficients", [1.0, math.nan]),
        ("teacache_coefficients", [1.0, "x"]),
        ("context", [[0.0]]),
        ("context", torch.zeros(3)),
        ("context", torch.zeros(513, 8)),
        ("context", torch.zeros(0, 8)),
        ("context", torch.zeros(4, 8, dtype=torch.int64)),
        ("negative_context", torch.full((4, 8), math.nan)),
        ("clip_features", torch.zeros(257, 1280)),
        ("image", 7),
        ("image", "missing.png"),
        ("image", "."),
        ("image", "a\0b.png"),
    ],
)
def test_other_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=") as error:
        Request(**{name: value})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("value", "nearest"), [(540, 544), (1081, 1088), (17, 16), (24, 32)])
def test_a_size_off_the_grid_names_the_nearest(value, nearest):
    with pytest.raises(ValueError, match=rf"^height={value}: must be a multiple of 16; the nearest is {nearest}$"):
        Request(height=value, width=960)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 64}, "height=64: needs width"),
        ({"width": 64}, "width=64: needs height"),
        ({"end_image": "x.png"}, "end_image='x.png': needs image"),
        ({"video": "x.mp4"}, "video='x.mp4': needs overlap_history"),
        ({"video": "x.mp4", "overlap_history": 17, "image": "x.png"}, "image='x.png': a video"),
        ({"image": "x.png", "end_image": "y.png", "causal_attention": True}, "end_image='y.png': has no effect"),
        ({"context": torch.zeros(2, 8), "negative_context": torch.zeros(2, 9)}, "negative_context="),
    ],
)
def test_values_that_do_not_go_together(values, message):
    with pytest.raises(ValueError) as error:
        Request(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["image", "end_image"])
def test_text_named_png_is_one_clear_line(tmp_path, picture, name):
    fake = tmp_path / "fake.png"
    fake.write_text("not a picture\n")
    with pytest.raises(ValueError, match=rf"^{name}='.*fake\.png': is not a readable image") as error:
        Request(**{"image": picture} | {name: str(fake)})
    assert "\n" not in str(error.value)


def test_a_truncated_image_is_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="^image=.*not a readable image"):
        Request(image=path)


def test_bad_videos_are_refused(tmp_path, picture):
    fake = tmp_path / "fake.mp4"
    fake.write_text("not a video\n" * 10)
    for bad in (fake, tmp_path / "missing.mp4", tmp_path, np.zeros((9, 8, 8, 4), np.uint8), torch.zeros(9, 8, 8, 3)):
        with pytest.raises(ValueError, match="^video=") as error:
            Request(video=bad, overlap_history=5)
        assert "\n" not in str(error.value)


def test_a_video_shorter_than_its_overlap_is_refused(clip):
    with pytest.raises(ValueError, match="has 9 of the 17 frames that overlap_history takes"):
        Request(video=clip, overlap_history=17)
    with pytest.raises(ValueError, match=r"^video=ndarray\[4, 8, 8, 3\]: has 4 of the 5 frames"):
        Request(video=np.zeros((4, 8, 8, 3), np.uint8), overlap_history=5)


def test_good_values_are_kept_and_normalised(picture):
    request = Request(
        num_frames=np.int64(17), shift=3, resolution="720p", teacache_coefficients=[1, 0], image=picture, seed=2**63 - 1
    )
    assert (request.num_frames, request.shift, request.resolution) == (17, 3.0, "720P")
    assert type(request.num_frames) is int
    assert type(request.shift) is float
    assert request.teacache_coefficients == (1.0, 0.0)
    assert dataclasses.replace(request, num_frames=21).num_frames == 21
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1


def test_requests_take_arrays_tensors_and_pil_images():
    frames = torch.zeros(9, 64, 32, 3, dtype=torch.uint8)
    assert settings(video=frames, overlap_history=9).height == 960
    assert Request(video=frames.numpy(), overlap_history=9).source == (64, 32, None)
    assert Request(image=Image.new("L", (30, 20))).source == (20, 30, None)
    Request(context=torch.zeros(3, 8), negative_context=torch.zeros(512, 8), clip_features=torch.zeros(1, 257, 1280))


def test_importing_the_room_brings_in_nothing_heavy():
    code = "import sys, skyreels_fast.request; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_defaults_are_those_of_the_reference():
    filled = settings()
    assert (filled.height, filled.width, filled.num_frames, filled.base_num_frames) == (544, 960, 97, 97)
    assert (filled.inference_steps, filled.guidance_scale, filled.shift, filled.fps) == (30, 6.0, 8.0, 24.0)
    assert (filled.ar_step, filled.causal_block_size, filled.addnoise_condition) == (0, 1, 0)
    assert (filled.teacache, filled.teacache_thresh, filled.use_ret_steps) == (False, 0.2, False)
    assert filled.prompt == DEFAULT_PROMPT
    assert filled.negative_prompt == NEGATIVE_PROMPT_DF
    assert settings("t2v").negative_prompt == NEGATIVE_PROMPT
    assert filled.notes == ()
    assert (settings(hint="720P").height, settings(resolution="720P").width) == (720, 1280)
    assert 0 <= filled.seed < 4294967294
    assert len({settings().seed for _ in range(5)}) > 1
    assert settings(seed=0).seed == 0


def test_the_models_own_defaults_come_before_those_of_the_reference():
    own = {"mode": "df", "prompt": "A red ball.", "height": 64, "width": 96, "num_frames": 17, "base_num_frames": 17,
           "inference_steps": 8, "guidance_scale": 3.0, "shift": 5.0, "fps": 12, "negative_prompt": "blur",
           "teacache_coefficients": [1.0, 0.0], "unknown": 1}  # fmt: skip
    filled = settings(defaults=own)
    for name in set(own) - {"mode", "unknown", "teacache_coefficients"}:
        assert getattr(filled, name) == own[name]
    assert filled.teacache_coefficients == (1.0, 0.0)
    assert settings(defaults=own, num_frames=33).num_frames == 33
    assert settings(defaults=own, resolution="540P").height == 544
    with pytest.raises(ValueError, match=r"generation_config\.json num_frames='many'"):
        settings(defaults=own | {"num_frames": "many"})


def test_zero_guidance_is_a_value_not_an_absence():
    assert settings(guidance_scale=0).guidance_scale == 0.0
    assert settings(teacache_thresh=0).teacache_thresh == 0.0


def test_portrait_inputs_turn_the_size_unless_it_is_explicit():
    portrait, landscape = Image.new("RGB", (60, 80)), Image.new("RGB", (80, 60))
    assert (settings(image=portrait).height, settings(image=portrait).width) == (960, 544)
    assert settings(image=landscape).height == 544
    turned = settings(image=portrait, defaults={"height": 64, "width": 96})
    assert (turned.height, turned.width) == (96, 64)
    assert settings(image=portrait, height=64, width=96).height == 64
    assert settings(image=portrait, resolution="720P").height == 1280
    assert settings(video=np.zeros((5, 80, 60, 3), np.uint8), overlap_history=5).height == 960


def test_an_image_turned_by_its_exif_data_counts_upright(tmp_path):
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(path, exif=exif)
    assert Request(image=path).source == (80, 60, None)


def test_fps_is_that_of_the_request_then_of_the_source(clip):
    assert settings(video=clip, overlap_history=5).fps == 12
    assert settings(video=clip, overlap_history=5, fps=30).fps == 30
    assert settings(video=clip, overlap_history=5, defaults={"fps": 16}).fps == 12
    assert settings(defaults={"fps": 16}).fps == 16


def test_the_mode_decides_about_images():
    image = Image.new("RGB", (96, 64))
    with pytest.raises(ValueError, match="^image: this model makes a video from an image"):
        settings("i2v")
    with pytest.raises(ValueError, match=r"^image=Image\[96x64\]: .*generate_video_df.py.*or an I2V model"):
        settings("t2v", image=image)
    with pytest.raises(ValueError, match="^clip_features="):
        settings("df", clip_features=torch.zeros(1, 257, 1280))
    assert settings("i2v", image=image).image is image
    assert settings("df", image=image).image is image


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ar_step", 5),
        ("causal_attention", True),
        ("causal_block_size", 5),
        ("base_num_frames", 97),
        ("overlap_history", 17),
        ("addnoise_condition", 20),
        ("end_image", Image.new("RGB", (16, 16))),
        ("video", np.zeros((5, 8, 8, 3), np.uint8)),
    ],
)
def test_what_only_diffusion_forcing_does_is_refused_elsewhere(name, value):
    others = {"end_image": {"image": Image.new("RGB", (16, 16))}, "video": {"overlap_history": 5}}.get(name, {})
    with pytest.raises(ValueError, match=f"^{name}=.*: only diffusion forcing"):
        settings("i2v" if name == "end_image" else "t2v", **{name: value}, **others)


def test_what_is_off_is_fine_in_any_mode():
    filled = settings("t2v", ar_step=0, causal_attention=False, causal_block_size=1, addnoise_condition=0)
    assert filled.base_num_frames == filled.num_frames == 97


def test_contexts_stand_in_for_prompts():
    context = torch.zeros(3, 8)
    filled = settings(context=context, negative_context=context, defaults={"prompt": "A red ball."})
    assert (filled.prompt, filled.negative_prompt) == ("", "")
    assert filled.context is context


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"addnoise_condition": 61, "num_frames": 257, "overlap_history": 17}, "addnoise_condition=61: above 60"),
        ({"addnoise_condition": 20}, "addnoise_condition=20: has no effect where no frames are given"),
        ({"overlap_history": 17}, "overlap_history=17: has no effect on a video of one window"),
        (
            {"resolution": "540P", "height": 96, "width": 160},
            "resolution='540P': has no effect beside a height and a width",
        ),
        ({"num_frames": 100}, "num_frames=100: counts as 97"),
        ({"base_num_frames": 50}, "base_num_frames=50: counts as 49"),
        ({"defaults": {"base_num_frames": 50}}, "base_num_frames=50: counts as 49"),
        ({"num_frames": 100, "mode": "t2v"}, "num_frames=100: counts as 97"),
        ({"use_ret_steps": True}, "use_ret_steps has no effect without teacache"),
        ({"teacache_thresh": 0}, "teacache_thresh has no effect without teacache"),
        ({"teacache_coefficients": (1.0,)}, "teacache_coefficients has no effect without teacache"),
        (
            {"use_ret_steps": True, "teacache_coefficients": (1.0,)},
            "use_ret_steps and teacache_coefficients have no effect without teacache",
        ),
    ],
)
def test_notes(values, note):
    (found,) = settings(**values).notes
    assert found.startswith(note)


def test_what_belongs_to_teacache_is_in_place_with_it_or_left_off():
    given = {"teacache_thresh": 0.1, "use_ret_steps": True, "teacache_coefficients": (1.0,)}
    assert settings(teacache=True, **given).notes == ()
    assert settings(use_ret_steps=False, defaults={"teacache_coefficients": [1.0]}).notes == ()


@pytest.mark.parametrize(
    ("num_frames", "said"),
    [
        (1, "1 window of 1 latent frame, "),
        (113, "3 windows of 13 latent frames, "),
        (97, "3 windows of 13, 13 and 9 latent frames, "),
        (193, "6 windows of 13, ..., 13 and 9 latent frames, "),
    ],
)
def test_a_plan_tells_the_length_of_its_windows(num_frames, said):
    plan = Plan.of(settings(num_frames=num_frames, base_num_frames=49, overlap_history=17))
    assert said in plan.describe()
    assert "source" not in plan.describe()


def test_a_plan_tells_which_frames_are_the_sources():
    plan = Plan.of(settings(num_frames=97, overlap_history=17, video=np.zeros((49, 64, 96, 3), np.uint8)), 49)
    assert plan.describe().endswith("129 frames out (5.4 s at 24 fps), 49 of them the source's")
