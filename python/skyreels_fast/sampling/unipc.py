"""UniPC, the solver: flow prediction, data prediction inside, B(h) = e^-h - 1, order 2 (Zhao et al., arXiv 2302.04867).

With sigma the noise level of a step, alpha = 1 - sigma, lambda = log(alpha / sigma), and the model's velocity v at the
sample x, the data prediction is m = x - sigma·v. Both halves of a step are then weighted sums:
    corrected = x                                                       in a frame's first step,
                w1·last + w2·m_previous + w3·m_before_previous + w4·m    in later ones,
    x_next    = w5·corrected + w6·m + w7·m_previous,
where `last` is the corrected sample of the step before. The weights depend on the step alone, so a window's frames,
each at a step of its own, advance together in one elementwise update.

The published diffusion forcing loop writes each result over the very sample that its solver keeps as `last` of the
first step, so that a frame's second step is corrected from x instead. `in_place` does as it does, for the seeds' sake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .timesteps import Schedule


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def _span(sigmas: Sequence[float], i: int) -> tuple[float, float, float]:
    """(sigma ratio, gain, h) of going from level i to i + 1: x_next = ratio·x + gain·m is the first order."""
    h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
    return sigmas[i + 1] / sigmas[i], -(1 - sigmas[i + 1]) * math.expm1(-h), h


def _predictor(sigmas: Sequence[float], i: int, order: int) -> tuple[float, float, float]:
    ratio, gain, h = _span(sigmas, i)
    if order == 1:
        return ratio, gain, 0.0
    # Adds gain / 2 times the slope (m_previous - m) / r, r the step back in units of h.
    r = (_log_snr(sigmas[i - 1]) - _log_snr(sigmas[i])) / h
    slope = gain / (2 * r)
    return ratio, gain - slope, slope


def _corrector(sigmas: Sequence[float], i: int, order: int) -> tuple[float, float, float, float]:
    """Redo the span that led to level i, `order` being the one it was predicted with, now that m is known there."""
    ratio, gain, h = _span(sigmas, i - 1)
    if order == 1:
        return ratio, gain / 2, 0.0, gain / 2
    r = (_log_snr(sigmas[i - 2]) - _log_snr(sigmas[i - 1])) / h
    # The two conditions of order 2: rho_1 + rho_2 = b_1 and r·rho_1 + rho_2 = b_2.
    base = math.expm1(-h)
    phi_2 = -base / h - 1
    b_1, b_2 = phi_2 / base, 2 * (-phi_2 / h - 0.5) / base
    rho_1 = (b_1 - b_2) / (1 - r)
    slope, new = gain * rho_1 / r, gain * (b_1 - rho_1)
    return ratio, gain - slope - new, slope, new


def solver_table(sigmas: Sequence[float], *, in_place: bool = False) -> list[tuple[float, ...]]:
    """Weights of each of the N = len(sigmas) - 1 steps, in float64 arithmetic.

    A row is (sigma, weight of x, w1, w2, w3, w4, w5, w6, w7), named as in the module's docstring, as is `in_place`.
    The first step and the last are of order 1, those between of order 2; a step is corrected in its predictor's order.
    """
    steps = len(sigmas) - 1
    orders = [1 if i in (0, steps - 1) else 2 for i in range(steps)]
    rows = []
    for i, order in enumerate(orders):
        of_last, *of_data = _corrector(sigmas, i, orders[i - 1]) if i else (0.0,) * 4
        of_sample = 0.0 if i else 1.0
        if in_place and i == 1:
            of_sample, of_last = of_last, of_sample
        rows.append((sigmas[i], of_sample, of_last, *of_data, *_predictor(sigmas, i, order)))
    return rows


class UniPC:
    """The solver of one window: one history a latent frame, all frames advanced at once.

    schedule: rows and columns as in `timesteps`. sigmas: its N + 1 noise levels, the last 0. device: of the latents.
    in_place: as the published diffusion forcing loop does it, see the module's docstring.
    Every row's weights go to the device here, so that a step neither copies from the host nor waits for the device.
    Raises ValueError when the sigmas are not the schedule's N + 1.
    """

    def __init__(
        self, schedule: Schedule, sigmas: Sequence[float], device: torch.device | str, *, in_place: bool = False
    ) -> None:
        if len(sigmas) != schedule.steps + 1:
            raise ValueError(f"{len(sigmas)} sigmas given; a schedule of {schedule.steps} steps takes one more")
        table = torch.tensor(solver_table(sigmas, in_place=in_place), dtype=torch.float64)
        # Waiting and finished frames borrow a neighbouring step's weights; what they compute is thrown away.
        steps = torch.tensor(schedule.index).sub_(1).clamp_(0, len(table) - 1)
        self._weights = table[steps].permute(0, 2, 1).float().to(device)  # [rows, 9, F]
        self._update = torch.tensor(schedule.update).to(device)  # [rows, F]
        self._interval = schedule.interval
        self._last: Tensor | None = None
        self._previous: Tensor | None = None
        self._before: Tensor | None = None

    @property
    def history(self) -> tuple[Tensor, ...]:
        """What goes from one row to the next: three tensors as the latents, or none before the first `step`."""
        return () if self._last is None else (self._last, self._previous, self._before)

    @history.setter
    def history(self, tensors: tuple[Tensor, ...]) -> None:
        self._last, self._previous, self._before = tensors or (None,) * 3

    def step(self, row: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """New latents [B,C,F,H,W] float32 after model call `row`; `latents` itself is left as it is.

        velocity: the model's output [B,C,f,H,W] for the f frames of the row's interval. Frames that the row does not
        update, and their history, keep every bit, whatever the velocity holds there.
        """
        if self._last is None:
            self.history = tuple(torch.zeros_like(latents) for _ in range(3))
        part = (slice(None), slice(None), slice(*self._interval[row]))
        update = self._update[row, part[2]].view(1, 1, -1, 1, 1)
        sigma, keep, *weights = self._weights[row, :, part[2]].unsqueeze(-1).unsqueeze(-1)
        last, previous, before = self._last[part], self._previous[part], self._before[part]
        sample = latents[part]

        data = torch.addcmul(sample, sigma, velocity, value=-1)
        corrected = _weighted(keep, sample, *zip(weights[:4], (last, previous, before, data), strict=True))
        moved = _weighted(weights[4], corrected, *zip(weights[5:], (data, previous), strict=True))

        self._before[part] = torch.where(update, previous, before)
        self._previous[part] = torch.where(update, data, previous)
        self._last[part] = torch.where(update, corrected, last)
        latents = latents.clone()
        latents[part] = torch.where(update, moved, sample)
        return latents


def _weighted(weight: Tensor, tensor: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    total = weight * tensor
    for weight, tensor in terms:
        total.addcmul_(weight, tensor)
    return total
