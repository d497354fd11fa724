"""The solver against the golden trajectory, diffusers' UniPC, and what must hold for frames advanced together."""

from __future__ import annotations

import pytest
import torch
from conftest import load_golden, rel_l2

from skyreels_fast.sampling.timesteps import hold, sigma_schedule, timestep_matrix, timestep_schedule
from skyreels_fast.sampling.unipc import UniPC, solver_table


def _solve(
    sigmas: list[float], sample: torch.Tensor, outputs: torch.Tensor, *, in_place: bool = False
) -> list[torch.Tensor]:
    """One frame [C,H,W] through all steps with given velocities [N,C,H,W]."""
    steps = len(sigmas) - 1
    solver = UniPC(timestep_matrix(1, range(steps, 0, -1)), sigmas, "cpu", in_place=in_place)
    latents, trajectory = sample[None, :, None], []
    for row in range(steps):
        latents = solver.step(row, outputs[row][None, :, None], latents)
        trajectory.append(latents[0, :, 0])
    return trajectory


def test_golden_trajectory() -> None:
    golden = load_golden("components")
    trajectory = _solve(sigma_schedule(9, 8.0), golden["unipc.sample"], golden["unipc.model_output"])
    for actual, expected in zip(trajectory, golden["unipc.trajectory"], strict=True):
        assert rel_l2(actual, expected) <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_against_diffusers(steps: int, shift: float, in_place: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    sigmas = sigma_schedule(steps, shift)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.arange(steps, 0, -1)
    generator = torch.Generator().manual_seed(steps)
    sample = torch.randn(16, 4, 4, generator=generator)
    outputs = torch.randn(steps, 16, 4, 4, generator=generator)
    expected, x = [], sample.clone()
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        result = scheduler.step(output, timestep, x, return_dict=False)[0]
        # Written over the sample, the result reaches into what the scheduler keeps of the first step.
        x = x.copy_(result) if in_place else result
        expected.append(x.clone())
    for actual, wanted in zip(_solve(sigmas, sample, outputs, in_place=in_place), expected, strict=True):
        assert rel_l2(actual, wanted) <= 1e-5


def test_a_constant_data_prediction_is_reached() -> None:
    """Where x - sigma·v is one picture throughout, every order lands on alpha·picture + sigma·noise exactly."""
    sigmas = sigma_schedule(12, 5.0)
    generator = torch.Generator().manual_seed(0)
    picture, noise = torch.randn(2, 1, 16, 1, 4, 4, generator=generator)
    latents = (1 - sigmas[0]) * picture + sigmas[0] * noise
    solver = UniPC(timestep_matrix(1, timestep_schedule(12, 5.0)), sigmas, "cpu")
    for row in range(12):
        latents = solver.step(row, noise - picture, latents)
        assert rel_l2(latents, (1 - sigmas[row + 1]) * picture + sigmas[row + 1] * noise) <= 1e-5


def test_second_order() -> None:
    """Halving the steps' width in lambda quarters the error (or better) on a smooth problem with a known solution."""

    def final_error(steps: int) -> float:
        # With m = e^lambda, x / sigma is the integral of e^(2 lambda) over lambda.
        lambdas = torch.linspace(-3.0, 1.0, steps + 1, dtype=torch.float64)
        sigmas = torch.sigmoid(-lambdas).tolist()
        x = last = previous = before = 0.0
        for sigma, keep, w1, w2, w3, w4, w5, w6, w7 in solver_table([*sigmas, 0.0])[:steps]:
            data = (1 - sigma) / sigma
            corrected = keep * x + w1 * last + w2 * previous + w3 * before + w4 * data
            x = w5 * corrected + w6 * data + w7 * previous
            last, before, previous = corrected, previous, data
        exact = sigmas[-1] * ((2 * lambdas[-1]).exp() - (2 * lambdas[0]).exp()).item() / 2
        return abs(x - exact) / exact

    errors = [final_error(steps) for steps in (16, 32, 64)]
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2]


@pytest.mark.parametrize(("ar_step", "block", "base"), [(0, 1, 6), (2, 1, 6), (3, 2, 6), (9, 2, 4), (4, 1, 3)])
def test_frames_advance_as_if_alone(ar_step: int, block: int, base: int) -> None:
    steps, frames = 9, 6
    sigmas = sigma_schedule(steps, 8.0)
    schedule = timestep_matrix(frames, timestep_schedule(steps, 8.0), base=base, ar_step=ar_step, block=block)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, frames, 2, 3, generator=generator)
    outputs = torch.randn(steps, 16, frames, 2, 3, generator=generator)
    solver, latents = UniPC(schedule, sigmas, "cpu"), noise
    for row, (start, stop) in enumerate(schedule.interval):
        velocity = torch.full((1, 16, frames, 2, 3), torch.nan)
        for frame in range(frames):
            if schedule.update[row][frame]:
                velocity[0, :, frame] = outputs[schedule.index[row][frame] - 1, :, frame]
        latents = solver.step(row, velocity[:, :, start:stop], latents)
    for frame in range(frames):
        alone = _solve(sigmas, noise[0, :, frame], outputs[:, :, frame])[-1]
        assert torch.equal(latents[0, :, frame], alone)


def test_given_frames_keep_every_bit() -> None:
    schedule = hold(timestep_matrix(4, timestep_schedule(5, 8.0), block=2, ready=1), 1, end=True)
    latents = torch.randn(1, 16, 5, 2, 2, generator=torch.Generator().manual_seed(2))
    before = latents.clone()
    solver, new = UniPC(schedule, sigma_schedule(5, 8.0), "cpu"), latents
    for row in range(5):
        velocity = torch.ones(1, 16, 5, 2, 2)
        velocity[:, :, [0, 4]] = torch.inf
        new = solver.step(row, velocity, new)
    assert torch.equal(latents, before)
    assert torch.equal(new[:, :, [0, 4]], before[:, :, [0, 4]])
    assert new.isfinite().all()
    assert (new[:, :, 1:4] != before[:, :, 1:4]).all()


def test_last_level_is_the_data_prediction() -> None:
    assert solver_table(sigma_schedule(7, 8.0))[-1][-3:] == (0.0, 1.0, 0.0)


def test_sigmas_must_fit_the_schedule() -> None:
    with pytest.raises(ValueError, match="5 sigmas"):
        UniPC(timestep_matrix(2, [999, 500, 100]), sigma_schedule(4, 8.0), "cpu")
