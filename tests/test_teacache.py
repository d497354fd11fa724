"""TeaCache's choice of calls and its residual."""

from __future__ import annotations

import math

import pytest
import torch

from skyreels_fast.sampling.teacache import Residual, TeaCacheSettings, plan


def _signals(*changes: float) -> list[torch.Tensor]:
    """Signals whose relative L1 distances from one to the next are `changes`."""
    signals = [torch.ones(1, 3, 4, dtype=torch.float64)]
    for change in changes:
        signals.append(signals[-1] * (1 + change))
    return signals


def test_changes_add_up_to_the_threshold() -> None:
    signals = _signals(0.25, 0.5, 0.25, 0.25, 0.25, 0.25, 0.125)
    # Sums: 0.25, 0.75 | 0.25, 0.5, 0.75 | 0.25, and the last row always.
    expected = [True, False, True, False, False, True, False, True]
    assert plan(signals, [1.0, 0.0], 0.74, use_ret_steps=False) == expected


def test_retained_rows() -> None:
    signals = _signals(*[0.01] * 9)
    assert plan(iter(signals), [1.0, 0.0], 1.0, use_ret_steps=False) == [True, *[False] * 8, True]
    assert plan(iter(signals), [1.0, 0.0], 1.0, use_ret_steps=True) == [*[True] * 5, *[False] * 5]
    assert plan(signals[:1], [1.0, 0.0], 1.0, use_ret_steps=False) == [True]
    assert plan(signals[:3], [1.0, 0.0], 1.0, use_ret_steps=True) == [True] * 3


def test_retained_rows_start_the_sum_again() -> None:
    signals = _signals(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    assert plan(signals, [1.0, 0.0], 0.8, use_ret_steps=True) == [True] * 5 + [False, True, False]
    assert plan(signals, [1.0, 0.0], 1.4, use_ret_steps=False, forced=[2]) == [
        True, False, True, False, False, True, False, True
    ]  # fmt: skip


def test_polynomial_has_the_highest_power_first() -> None:
    signals = _signals(0.5, 0.5, 0.5, 0.5)
    change = 2 * 0.25 - 3 * 0.5 + 1.5
    for threshold, second in [(change - 1e-4, True), (change + 1e-4, False)]:
        assert plan(signals, [2.0, -3.0, 1.5], threshold, use_ret_steps=False)[1] is second


def test_zero_threshold_computes_everything() -> None:
    assert all(plan(_signals(*[0.1] * 6), [1.0, 0.0], 0.0, use_ret_steps=True))


def test_a_signal_of_another_shape_is_a_change() -> None:
    signals = [torch.ones(1, frames, 4) for frames in (3, 3, 3, 4, 4, 4)]
    assert plan(signals, [1.0, 0.0], 1.0, use_ret_steps=False) == [True, False, False, True, False, True]


def test_what_cannot_be_compared_is_computed() -> None:
    assert all(plan([torch.zeros(1, 1, 4)] * 4, [1.0, 0.0], 1.0, use_ret_steps=False))


@pytest.mark.parametrize(
    ("coefficients", "threshold", "message"),
    [
        ((), 0.2, "at least one"),
        ((1.0, math.nan), 0.2, "finite"),
        ((1.0, math.inf), 0.2, "finite"),
        ((1.0, 0.0), math.nan, "teacache_thresh=nan"),
        ((1.0, 0.0), -0.1, "teacache_thresh=-0.1"),
    ],
)
def test_bad_settings_are_refused(coefficients: tuple, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeaCacheSettings(coefficients, threshold)


def test_residual_is_added_while_it_is_reused_and_no_longer_kept_then() -> None:
    x, y = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    residual = Residual()
    residual.save(x, 3 * x)
    torch.testing.assert_close(residual.added_to(y, keep=True), y + 2 * x)
    torch.testing.assert_close(residual.added_to(x, keep=False), 3 * x)
    assert all(value is None for value in vars(residual).values())
    residual.save(y, x)
    residual.forget()
    assert all(value is None for value in vars(residual).values())
