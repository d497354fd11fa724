"""The denoising loop on an analytic model: what it shows the model, and what it leaves alone."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import rel_l2
from torch import Tensor, nn

from skyreels_fast.dit.stream import Stream
from skyreels_fast.sampling.denoise import denoise
from skyreels_fast.sampling.teacache import TeaCacheSettings
from skyreels_fast.sampling.timesteps import Schedule, hold, sigma_schedule, timestep_matrix, timestep_schedule

STEPS, SHIFT = 6, 8.0
SIGMAS = sigma_schedule(STEPS, SHIFT)
TIMESTEPS = timestep_schedule(STEPS, SHIFT)


class Tokens(NamedTuple):
    x: Tensor
    e: Tensor
    e0: Tensor
    grid: tuple[int, int, int]


class LinearModel(nn.Module):
    """velocity = 0.5·latents + context: no frame sees another. It notes what it is called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.runs: list[float] = []
        self.options: list[dict] = []

    def time_embedding_of(self, timestep: Tensor, fps: int | None = None) -> tuple[Tensor, Tensor]:
        e = timestep.float().unsqueeze(-1) + 1
        return e, e.unsqueeze(-1).expand(-1, -1, 6, -1)

    def embed(self, latents: Tensor, timestep: Tensor, fps: int | None = None) -> Tokens:
        self.inputs.append((latents, timestep))
        frames, height, width = latents.shape[2:]
        return Tokens(latents.flatten(2).mT, *self.time_embedding_of(timestep, fps), (frames, height, width))

    def run_branches(
        self, stream: Stream, e0: Tensor, contexts: list[float], grid: tuple, **options: object
    ) -> list[Tensor]:
        self.runs.extend(contexts)
        self.options.append(options)
        return [stream.total() + 2 * context for context in contexts]

    def head(self, x: Tensor, e: Tensor, grid: tuple[int, int, int]) -> Tensor:
        return 0.5 * x[..., :16].float().mT.unflatten(2, grid)


def _noise(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 16, frames, 2, 2, generator=torch.Generator().manual_seed(seed))


def _schedule(frames: int, prefix: int = 0, end: bool = False, **options: int) -> Schedule:
    return hold(timestep_matrix(frames, TIMESTEPS, ready=prefix, **options), prefix, end)


def test_guidance_mixes_the_branches() -> None:
    schedule, latents = _schedule(3), _noise(3)
    guided = denoise(LinearModel(), latents, schedule, SIGMAS, 0.3, 0.1, guidance_scale=6.0)
    single = denoise(LinearModel(), latents, schedule, SIGMAS, 0.1 + 6.0 * (0.3 - 0.1))
    assert rel_l2(guided, single) <= 1e-5
    model = LinearModel()
    denoise(model, latents, schedule, SIGMAS, 0.3, 0.1, guidance_scale=1.0)
    assert model.runs == [0.3] * STEPS


@pytest.mark.parametrize("options", [{"ar_step": 2}, {"ar_step": 3, "block": 2}, {"ar_step": 3, "block": 2, "base": 4}])
def test_staggering_does_not_change_independent_frames(options: dict) -> None:
    latents = _noise(6)
    model = LinearModel()
    staggered = denoise(model, latents, _schedule(6, **options), SIGMAS, 0.2)
    assert torch.equal(staggered, denoise(LinearModel(), latents, _schedule(6), SIGMAS, 0.2))
    assert {x.shape[2] for x, _ in model.inputs} == {options.get("base", 6)}


def test_given_frames_are_seen_clean_and_stay() -> None:
    latents, model = _noise(5), LinearModel()
    before = latents.clone()
    out = denoise(model, latents, _schedule(4, prefix=1, end=True, block=2), SIGMAS, 0.2, prefix=1)
    assert torch.equal(latents, before)
    for seen, timestep in model.inputs:
        assert torch.equal(seen[:, :, [0, 4]], before[:, :, [0, 4]])
        assert timestep[0, [0, 4]].tolist() == [0, 0]
    assert [timestep[0, 1].item() for _, timestep in model.inputs] == TIMESTEPS
    assert torch.equal(out[:, :, [0, 4]], before[:, :, [0, 4]])
    assert (out[:, :, 1:4] != before[:, :, 1:4]).all()


def test_condition_noise_is_seen_and_not_kept() -> None:
    latents, model = _noise(6), LinearModel()
    schedule = _schedule(5, prefix=2, end=True)
    out = denoise(
        model, latents, schedule, SIGMAS, 0.2, prefix=2, addnoise=30, noise_generator=torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    for seen, timestep in model.inputs:
        noise = torch.randn(16, 2, 2, 2, generator=generator)
        torch.testing.assert_close(seen[0, :, :2], 0.97 * latents[0, :, :2] + 0.03 * noise)
        assert torch.equal(seen[:, :, 5], latents[:, :, 5])
        assert timestep[0, [0, 1, 5]].tolist() == [30, 30, 0]
    assert torch.equal(out[:, :, [0, 1, 5]], latents[:, :, [0, 1, 5]])
    assert torch.equal(out, denoise(LinearModel(), latents, schedule, SIGMAS, 0.2, prefix=2))


def test_condition_noise_leaves_with_the_prefix() -> None:
    model = LinearModel()
    schedule = _schedule(6, prefix=1, base=3, ar_step=2)
    denoise(
        model, _noise(6), schedule, SIGMAS, 0.2, prefix=1, addnoise=30, noise_generator=torch.Generator().manual_seed(5)
    )
    for (start, _), (_, timestep) in zip(schedule.interval, model.inputs, strict=True):
        assert (30 in timestep) == (start == 0)


def test_extra_channels_and_options_go_to_the_model() -> None:
    model = LinearModel()
    extra = _noise(4, seed=1)[:, :5]
    denoise(
        model,
        _noise(4),
        _schedule(4, base=2, ar_step=3),
        SIGMAS,
        0.2,
        extra_channels=extra,
        causal_block_size=2,
        blocks=[],
    )
    for (start, stop), (seen, _) in zip(_schedule(4, base=2, ar_step=3).interval, model.inputs, strict=True):
        assert torch.equal(seen[:, 16:], extra[:, :, start:stop])
    assert model.options[0] == {"causal_block_size": 2, "blocks": [], "pasts": (None,)}


def test_the_model_computes_in_its_own_dtype() -> None:
    model = LinearModel(torch.bfloat16)
    out = denoise(model, _noise(2), _schedule(2), SIGMAS, 0.2, extra_channels=_noise(2))
    assert out.dtype == torch.float32
    assert {seen.dtype for seen, _ in model.inputs} == {torch.bfloat16}


def test_rows_are_reported_in_order() -> None:
    rows: list[int] = []
    denoise(LinearModel(), _noise(3), _schedule(3, ar_step=2), SIGMAS, 0.2, on_step=rows.append)
    assert rows == list(range(STEPS + 4))


def test_no_step_reads_from_the_device() -> None:
    """Tensors without data cannot be read: the whole loop runs on them, so nothing in it waits for a value."""
    model = LinearModel().to("meta")
    schedule = _schedule(4, prefix=1, end=True, ar_step=2)
    out = denoise(model, _noise(5).to("meta"), schedule, SIGMAS, 0.2, 0.1, guidance_scale=6.0, prefix=1)
    assert out.shape == (1, 16, 5, 2, 2)


def test_cache_reuses_the_residual_in_each_branch() -> None:
    """This model's residual is its context, so reuse must not change the result, only the runs."""
    latents, schedule = _noise(4), _schedule(4)
    expected = denoise(LinearModel(), latents, schedule, SIGMAS, 0.3, 0.1, guidance_scale=6.0)
    model = LinearModel()
    settings = TeaCacheSettings((1.0, 0.0), 100.0)
    out = denoise(model, latents, schedule, SIGMAS, 0.3, 0.1, guidance_scale=6.0, teacache=settings)
    assert model.runs == [0.3, 0.1] * 2
    assert rel_l2(out, expected) <= 1e-5


def test_cache_is_not_used_across_a_moved_interval() -> None:
    schedule, model = _schedule(4, base=2, ar_step=3), LinearModel()
    denoise(model, _noise(4), schedule, SIGMAS, 0.3, teacache=TeaCacheSettings((1.0, 0.0), 1e9))
    moved = sum(a != b for a, b in zip(schedule.interval, schedule.interval[1:], strict=False))
    assert moved == 2
    assert len(model.runs) == 2 + moved


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="4 columns for 3"):
        denoise(LinearModel(), _noise(3), _schedule(4), SIGMAS, 0.2)
    with pytest.raises(ValueError, match="addnoise_condition=1001"):
        denoise(LinearModel(), _noise(3), _schedule(3), SIGMAS, 0.2, addnoise=1001)
    with pytest.raises(ValueError, match="generator"):
        denoise(LinearModel(), _noise(3), _schedule(3, prefix=1), SIGMAS, 0.2, prefix=1, addnoise=20)
