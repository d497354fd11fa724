"""The denoising loop with the DiT, against the golden runs of the tiny checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, load_golden, rel_l2
from safetensors.torch import load_file
from torch import Tensor

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import DiT
from skyreels_fast.dit.context import Context
from skyreels_fast.dit.stream import Stream
from skyreels_fast.sampling.denoise import denoise
from skyreels_fast.sampling.teacache import TeaCacheSettings
from skyreels_fast.sampling.timesteps import hold, sigma_schedule, timestep_matrix, timestep_schedule
from skyreels_fast.sampling.windows import plan_windows

RUNS = json.loads((GOLDEN / "pipelines.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_golden("pipelines") | load_golden("text") | load_golden("components")


@pytest.fixture(scope="module")
def models() -> dict[str, DiT]:
    return {}


def _model(models: dict[str, DiT], kind: str) -> DiT:
    if kind not in models:
        config = TransformerConfig.from_dict(json.loads((GOLDEN / kind / "config.json").read_text()))
        published = load_file(GOLDEN / kind / "model.safetensors")
        model = DiT(config)
        weights = {name: torch.cat([published[part] for part in parts]) for name, parts in model.key_parts().items()}
        model.load_state_dict(weights)
        models[kind] = model.float().eval()
    return models[kind]


def _run(name: str, dit: DiT, golden: dict[str, Tensor], **options: object) -> list[Tensor]:
    """A golden run's windows; latents given by the VAE are taken from what the golden run held fixed."""
    run, mode = RUNS[name], "df" if name.startswith("df") else "t2v"
    block = run.get("causal_block_size", 1)
    windows = plan_windows(
        run["num_frames"],
        run.get("base_num_frames", run["num_frames"]),
        run.get("overlap_history"),
        image="image" in run,
        extend="extend" in run,
        causal_block_size=block,
        mode=mode,
    )
    noise, condition_noise = (torch.Generator().manual_seed(run["seed"] + i) for i in (0, 1))
    contexts = [dit.encode_context(golden[key][None]) for key in ("cond", "uncond")]
    outputs = []
    for k, window in enumerate(windows):
        latents = torch.randn(16, window.latents, 8, 12, generator=noise)[None]
        latents[:, :, : window.prefix] = golden[f"{name}.latent{k}"].view_as(latents)[:, :, : window.prefix]
        schedule = timestep_matrix(
            window.latents,
            timestep_schedule(run["num_inference_steps"], run["shift"]),
            ar_step=run.get("ar_step", 0),
            ready=window.prefix,
            block=block,
        )
        outputs.append(
            denoise(
                dit,
                latents,
                hold(schedule, window.prefix, end=False),
                sigma_schedule(run["num_inference_steps"], run["shift"]),
                *contexts,
                guidance_scale=run["guidance_scale"],
                fps=run.get("fps"),
                in_place=mode == "df",
                prefix=window.prefix,
                addnoise=run.get("addnoise_condition", 0),
                noise_generator=condition_noise,
                causal_block_size=block if run.get("causal_attention") else None,
                **options,
            )
        )
    return outputs


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("df") and "end_image" not in RUNS[name]])
@torch.no_grad()
def test_golden_diffusion_forcing(name: str, models: dict[str, DiT], golden: dict[str, Tensor]) -> None:
    outputs = _run(name, _model(models, "df"), golden)
    assert len(outputs) == sum(key.startswith(f"{name}.latent") for key in golden)
    for k, latents in enumerate(outputs):
        assert rel_l2(latents, golden[f"{name}.latent{k}"]) <= 1e-4


@torch.no_grad()
def test_golden_text_to_video(models: dict[str, DiT], golden: dict[str, Tensor]) -> None:
    (latents,) = _run("t2v", _model(models, "t2v"), golden)
    assert rel_l2(latents[0], golden["t2v.latent0"]) <= 1e-4


@pytest.mark.parametrize("name", ["tea", "tea_ret"])
@torch.no_grad()
def test_golden_cache(
    name: str, models: dict[str, DiT], golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dit = RUNS[name], _model(models, "t2v")
    computed: list[int] = []
    calls = 0
    run_branches, head = dit.run_branches, dit.head.forward

    def noting_run_branches(stream: Stream, e0: Tensor, contexts: list[Context], *args: object, **options: object):
        computed.extend(calls + branch for branch in range(len(contexts)))
        return run_branches(stream, e0, contexts, *args, **options)

    def counting_head(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        return head(*args)

    monkeypatch.setattr(dit, "run_branches", noting_run_branches)
    monkeypatch.setattr(dit.head, "forward", counting_head)
    settings = TeaCacheSettings(run["coefficients"], run["threshold"], run["use_ret_steps"])
    (latents,) = _run(name, dit, golden, teacache=settings)
    assert calls == 2 * run["num_inference_steps"]
    assert computed == run["computed_calls"]
    assert rel_l2(latents[0], golden[f"{name}.latent0"]) <= 1e-4
