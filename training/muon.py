"""Muon: momentum steps for weight matrices, orthogonalised, so that all directions of a layer learn at one speed.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of a step follows
"Muon is scalable for LLM training" (arXiv:2502.16982), so that AdamW's rates fit it.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_STEP_RMS = 0.2


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n,r,c] to about the nearest semi-orthogonal matrices: singular values between 0.7 and 1.2 (Newton-Schulz)."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Steps for `params` (float32, two dimensions or more, with .grad); all but the first dimension count as inputs."""

    def __init__(self, params: list[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.buffers = [torch.zeros_like(param) for param in params]
        self.groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, param in enumerate(params):
            self.groups[(param.shape[0], param[0].numel())].append(index)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        if not self.params:
            return
        grads = [param.grad for param in self.params]
        torch._foreach_lerp_(self.buffers, grads, 1 - self.momentum)
        ahead = torch._foreach_lerp(grads, self.buffers, self.momentum)
        torch._foreach_mul_(self.params, 1 - rate * self.weight_decay)
        for (rows, columns), members in self.groups.items():
            steps = orthogonalise(torch.stack([ahead[i].reshape(rows, columns) for i in members]))
            scale = -rate * _STEP_RMS * max(rows, columns) ** 0.5
            params = [self.params[i] for i in members]
            torch._foreach_add_(params, [s.view(p.shape) for s, p in zip(steps, params, strict=True)], alpha=scale)
