"""The rule that a kernel's numbers are held to before its time is taken."""

from __future__ import annotations

import torch
from torch import Tensor


class RedError(RuntimeError):
    """An op gives wrong numbers, so its time means nothing."""


def require_within_twice(name: str, actual: Tensor, low: Tensor, exact: Tensor) -> None:
    """The rule a kernel is held to: it errs at most twice as much as plain torch in the low dtype, plus a rounding.

    actual: what the op gave; low: its reference computed in the low dtype; exact: in float64. All [..., token, …] of
    one shape; by largest error over all, and of each token (dimension 1). Raises RedError naming both errors.
    """
    rounding = torch.finfo(actual.dtype).eps
    tokens = (actual.shape[0] * actual.shape[1], -1) if actual.dim() > 1 else (1, -1)
    actual, low, exact = (tensor.double().reshape(tokens) for tensor in (actual, low, exact))
    error, allowed, slack = (actual - exact).abs(), 2 * (low - exact).abs(), rounding * exact.abs()
    everywhere = bool(error.amax() <= allowed.amax() + slack.amax())
    by_token = error.amax(-1) <= allowed.amax(-1) + slack.amax(-1)
    if not (everywhere and by_token.all()):  # NaN passes neither
        wrong = int((~by_token).sum())
        raise RedError(
            f"{name}: largest error {error.amax():.2e}, allowed {(allowed.amax() + slack.amax()):.2e}; "
            f"{wrong} of {len(by_token)} tokens beyond what they may err by"
        )
