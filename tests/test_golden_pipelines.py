"""Whole runs against the reference's latents and frames, every mode of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2

import skyreels_fast as sf

SETTINGS = json.loads((GOLDEN / "pipelines.json").read_text())
RENAMED = {"num_inference_steps": "inference_steps", "threshold": "teacache_thresh"}
IMAGES = {"first": GOLDEN / "first.png", "last": GOLDEN / "last.png"}


def _request(settings: dict, golden: dict[str, torch.Tensor]) -> sf.Request:
    values = {RENAMED.get(name, name): value for name, value in settings.items() if value is not None}
    text = load_golden("text")
    values |= {"context": text["cond"], "negative_context": text["uncond"]}
    for name in ("image", "end_image"):
        if name in values:
            values[name] = IMAGES[values[name]]
    if values.pop("extend", None):
        values["video"] = golden["df_extend.prefix"].numpy()
    if "clip" in values:
        values["clip_features"] = load_golden("components")[values.pop("clip")]
    values.pop("computed_calls", None)
    if "coefficients" in values:
        values |= {"teacache": True, "teacache_coefficients": tuple(values.pop("coefficients"))}
    return sf.Request(**values)


@pytest.mark.parametrize("name", SETTINGS)
def test_latents_and_frames_match_the_reference(name: str, pipelines: dict[str, sf.Pipeline]) -> None:
    golden = load_golden("pipelines")
    mode = name.partition("_")[0]
    request = _request(SETTINGS[name], golden)
    result = pipelines["t2v" if mode == "tea" else mode](request)

    windows = [key for key in golden if key.startswith(f"{name}.latent")]
    assert len(result.latents) == len(windows) > 0
    for index, latents in enumerate(result.latents):
        expected = golden[f"{name}.latent{index}"]
        assert rel_l2(latents.view(expected.shape), expected) < 1e-4
    if (expected := golden.get(f"{name}.video")) is not None:
        assert result.frames.shape == expected.shape
        # The reference truncates to 8 bits, ours rounds.
        assert (result.frames.int() - expected.int()).abs().max() <= 1


def test_a_stream_gives_the_same_frames_as_they_are_decoded(pipelines: dict[str, sf.Pipeline]) -> None:
    golden = load_golden("pipelines")
    request = _request(SETTINGS["df_long"], golden)
    result = pipelines["df"](request, stream=True)
    assert not result.latents
    chunks = list(result.frames)
    assert len(result.latents) == 4
    assert max(len(chunk) for chunk in chunks) <= 4
    assert torch.equal(torch.cat(chunks), pipelines["df"](request).frames)
    assert set(result.timings) >= {"text", "load", "denoise", "decode"}


def test_weights_stay_put_when_a_directory_is_moved_between_requests(
    pipelines: dict[str, sf.Pipeline], tmp_path: Path
) -> None:
    """Loaded once: a second request must not read the directory again."""
    shutil.copytree(pipelines["t2v"].checkpoint.root, tmp_path / "model")
    pipe = sf.Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32, mode="t2v")
    request = _request({**SETTINGS["t2v"], "num_inference_steps": 1}, {})
    first = pipe(request)
    (tmp_path / "model").rename(tmp_path / "away")
    assert torch.equal(pipe(request).frames, first.frames)


def test_results_are_ordinary_tensors(pipelines: dict[str, sf.Pipeline]) -> None:
    result = pipelines["t2v"](_request({**SETTINGS["t2v"], "num_inference_steps": 1, "num_frames": 5}, {}))
    latents = result.latents[0].requires_grad_()
    latents.square().sum().backward()
    assert latents.grad is not None
    result.frames.add_(1)


def test_where_no_file_tells_the_mode_requests_do(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "t2v", tmp_path / "model")
    shutil.copy(GOLDEN / "Wan2.1_VAE.pth", tmp_path / "model")
    pipe = sf.Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert pipe.plan(_request(SETTINGS["t2v"], {})).settings.mode == "t2v"
    assert pipe.plan(_request(SETTINGS["df_long"], {})).settings.mode == "df"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float32"}, "dtype='float32': must be torch.bfloat16, torch.float16 or torch.float32"),
        ({"dtype": torch.int8}, "dtype=torch.int8: must be torch.bfloat16"),
        ({"vae_dtype": torch.float64}, "vae_dtype=torch.float64: must be"),
        ({"device": "meta"}, "device='meta': must be"),
        ({"device": "nope"}, 'device=\'nope\': must be "cuda", "cuda:N" or "cpu"'),
    ],
)
def test_what_no_model_runs_in_is_refused_before_it_is_looked_for(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sf.Pipeline.from_pretrained("nowhere", **{"device": "cpu", **given})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_the_default_device_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match='give device="cpu"'):
        sf.Pipeline.from_pretrained("tiny")
