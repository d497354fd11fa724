"""LayerNorm, modulation, gate and residual against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import rel_l2
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops.adaln import (
    norm_scale_shift_cost,
    norm_scale_shift_ref,
    scale_residual_cost,
    scale_residual_norm_scale_shift_cost,
    scale_residual_norm_scale_shift_ref,
)

# batch, frames, tokens a frame, dim: even, one frame, odd sizes
SIZES = [(2, 4, 6, 64), (1, 1, 7, 32), (3, 5, 1, 33), (1, 3, 11, 129)]


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = x.double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    y = (x - mean) / (variance + eps).sqrt()
    return y if weight is None else y * weight.double() + bias.double()


def per_token(rows: Tensor, tokens: int) -> Tensor:
    frame = torch.arange(tokens) // (tokens // rows.shape[1])
    return rows.double()[:, frame]


def inputs(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch, frames, per_frame, dim = size
    generator = torch.Generator().manual_seed(sum(size))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, rows = (batch, frames * per_frame, dim), (batch, frames, dim)
    return {
        "x": (draw(*tokens) * 3 + 1).to(dtype),
        "residual": draw(*tokens) * 5,
        "gate": draw(*rows),
        "scale": draw(*rows),
        "shift": draw(*rows),
        "weight": draw(dim),
        "bias": draw(dim),
        "addend": draw(*tokens).to(dtype),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_scale_shift_is_its_formula(size: tuple[int, int, int, int], modulated: bool, affine: bool) -> None:
    t = inputs(size)
    affine_args = (t["weight"], t["bias"]) if affine else (None, None)
    expected = layer_norm(t["x"], *affine_args)
    rows = (t["scale"], t["shift"]) if modulated else (None, None)
    if modulated:
        scale, shift = (per_token(row, t["x"].shape[1]) for row in rows)
        expected = expected * (1 + scale) + shift
    assert rel_l2(ops.norm_scale_shift(t["x"], *rows, *affine_args), expected) < 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("added", [True, False])
def test_fused_is_the_sum_then_the_norm(size: tuple[int, int, int, int], added: bool) -> None:
    t = inputs(size)
    tokens, addend = t["x"].shape[1], t["addend"] if added else None
    total = t["residual"].double() + per_token(t["gate"], tokens) * t["x"].double()
    if added:
        total = total + t["addend"].double()
    norm = ("scale", "shift", "weight", "bias")
    expected = layer_norm(total, t["weight"], t["bias"]) * (1 + per_token(t["scale"], tokens))
    expected = expected + per_token(t["shift"], tokens)
    gated = tuple(t[name] for name in ("residual", "x", "gate"))
    residual, y = ops.scale_residual_norm_scale_shift(*gated, *(t[name] for name in norm), addend)
    assert rel_l2(residual, total) < 1e-6
    assert rel_l2(y, expected) < 1e-6
    assert torch.equal(residual, ops.scale_residual(*gated, addend))


def test_norm_of_a_gated_sum() -> None:
    t = inputs(SIZES[0])
    gated = per_token(t["gate"], t["x"].shape[1]) * t["x"].double()
    y = ops.norm_scale_shift(t["x"], None, None, residual=t["residual"], gate=t["gate"])
    assert rel_l2(y, layer_norm(t["residual"].double() + gated)) < 1e-6
    assert rel_l2(ops.norm_scale_shift(t["x"], None, None, gate=t["gate"]), layer_norm(gated)) < 1e-6
    plain = ops.norm_scale_shift(t["x"], None, None, residual=t["residual"])
    assert rel_l2(plain, layer_norm(t["residual"].double() + t["x"].double())) < 1e-6


def test_no_gate_is_a_plain_sum() -> None:
    t = inputs(SIZES[0])
    assert torch.equal(ops.scale_residual(t["residual"], t["x"], None), t["residual"] + t["x"])


def test_eps_counts() -> None:
    x = torch.tensor([[[1e-3, -1e-3]]])
    assert torch.allclose(ops.norm_scale_shift(x, None, None, eps=1e-6), torch.tensor([[[0.5**0.5, -(0.5**0.5)]]]))


def test_strided_inputs() -> None:
    t = inputs((2, 4, 6, 64))
    x = torch.full((2, 24, 3, 64), torch.nan)
    x[:, :, 1] = t["x"]
    rows = torch.stack((t["gate"], t["scale"], t["shift"]), dim=2)
    gate, scale, shift = rows.unbind(2)
    assert not scale.is_contiguous()
    strided = ops.scale_residual_norm_scale_shift(t["residual"], x[:, :, 1], gate, scale, shift)
    plain = ops.scale_residual_norm_scale_shift(*(t[n] for n in ("residual", "x", "gate", "scale", "shift")))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_dtypes() -> None:
    t = inputs(SIZES[0], torch.bfloat16)
    rows = (t["scale"], t["shift"])
    assert ops.norm_scale_shift(t["x"], *rows).dtype == torch.bfloat16
    assert ops.norm_scale_shift(t["x"], *rows, out_dtype=torch.float32).dtype == torch.float32
    assert ops.scale_residual(t["residual"], t["x"], None).dtype == torch.float32
    assert ops.scale_residual(t["residual"], t["x"], None, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    residual, y = ops.scale_residual_norm_scale_shift(t["residual"], t["x"], t["gate"], *rows)
    assert (residual.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    dtypes = {"residual_dtype": torch.float32, "out_dtype": torch.float16}
    residual, y = ops.scale_residual_norm_scale_shift(t["x"], t["x"], None, None, None, **dtypes)
    assert (residual.dtype, y.dtype) == (torch.float32, torch.float16)


def test_float64_stays_exact() -> None:
    t = {name: value.double() for name, value in inputs(SIZES[0]).items()}
    y = ops.norm_scale_shift(t["x"], None, None)
    assert rel_l2(y, layer_norm(t["x"])) < 1e-14
    low = t["x"].bfloat16()
    y = ops.norm_scale_shift(low, None, None, residual=t["residual"], out_dtype=torch.float64)
    assert rel_l2(y, layer_norm(low.double() + t["residual"])) < 1e-14
    total = ops.scale_residual(low, low, None, t["addend"], out_dtype=torch.float64)
    assert torch.equal(total, 2 * low.double() + t["addend"])


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_error_is_a_rounding(size: tuple[int, int, int, int]) -> None:
    """Per token, against float64 on the same input: at most twice the error of the reference run in bfloat16."""
    t = inputs(size, torch.bfloat16)
    rows = (t["scale"], t["shift"])
    fused = (t["x"], t["x"], t["gate"], *rows)
    pairs = [
        (
            ops.norm_scale_shift(t["x"], *rows),
            norm_scale_shift_ref(t["x"], *rows, math_dtype=torch.bfloat16),
            norm_scale_shift_ref(t["x"], *rows, out_dtype=torch.float64, math_dtype=torch.float64),
        ),
        (
            ops.scale_residual_norm_scale_shift(*fused)[1],
            scale_residual_norm_scale_shift_ref(*fused, math_dtype=torch.bfloat16)[1],
            scale_residual_norm_scale_shift_ref(*fused, out_dtype=torch.float64, math_dtype=torch.float64)[1],
        ),
    ]
    for actual, low, exact in pairs:
        slack = exact.abs().amax(-1) * 2**-8
        assert bool(((actual - exact).abs().amax(-1) <= 2 * (low - exact).abs().amax(-1) + slack).all())


def test_gradients() -> None:
    t = {name: value.double().requires_grad_() for name, value in inputs((1, 2, 2, 5)).items()}
    norm = [t[name] for name in ("scale", "shift", "weight", "bias")]
    residual, x, gate, addend = (t[name] for name in ("residual", "x", "gate", "addend"))
    assert torch.autograd.gradcheck(ops.scale_residual_norm_scale_shift, (residual, x, gate, *norm, addend))
    assert torch.autograd.gradcheck(ops.norm_scale_shift, (x, *norm, residual, gate))
    assert torch.autograd.gradcheck(ops.scale_residual, (residual, x, gate, addend))


def test_compiles_whole() -> None:
    t = inputs(SIZES[0])
    args = [t[name] for name in ("residual", "x", "gate", "scale", "shift")]
    compiled = torch.compile(ops.scale_residual_norm_scale_shift, fullgraph=True, backend="eager")
    eager = ops.scale_residual_norm_scale_shift(*args)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), eager, strict=True))


def test_errors_name_the_values() -> None:
    x, rows = torch.zeros(2, 12, 8), torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"backend 'nope'.*ref"):
        ops.norm_scale_shift(x, rows, rows, backend="nope")
    with pytest.raises(ValueError, match=r"\[B, L, D\], not \[12, 8\]"):
        ops.norm_scale_shift(x[0], None, None)
    with pytest.raises(ValueError, match="12 tokens do not split into the 5 frames of scale"):
        ops.norm_scale_shift(x, torch.zeros(2, 5, 8), torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=r"scale must be \[B, F, D\] = \[2, F, 8\], not \[1, 3, 8\]"):
        ops.norm_scale_shift(x, rows[:1], rows[:1])
    with pytest.raises(ValueError, match="scale and shift come together, shift is None"):
        ops.norm_scale_shift(x, rows, None)
    with pytest.raises(ValueError, match=r"scale \[2, 3, 8\] and shift \[2, 1, 8\]"):
        ops.norm_scale_shift(x, rows, rows[:, :1])
    with pytest.raises(ValueError, match="weight and bias come together, bias is None"):
        ops.norm_scale_shift(x, None, None, torch.ones(8))
    with pytest.raises(ValueError, match=r"weight must be \[D\] = \[8\], not \[7\]"):
        ops.norm_scale_shift(x, None, None, torch.ones(7), torch.ones(8))
    with pytest.raises(ValueError, match=r"residual \[2, 11, 8\] and x \[2, 12, 8\]"):
        ops.scale_residual(x[:, :11], x, None)
    with pytest.raises(ValueError, match=r"residual \[2, 11, 8\] and x \[2, 12, 8\]"):
        ops.norm_scale_shift(x, None, None, residual=x[:, :11])
    with pytest.raises(ValueError, match=r"addend \[1, 12, 8\] and x \[2, 12, 8\]"):
        ops.scale_residual_norm_scale_shift(x, x, None, None, None, addend=x[:1])
    with pytest.raises(ValueError, match="frames of gate"):
        ops.scale_residual(x, x, torch.zeros(2, 7, 8))
    with pytest.raises(ValueError, match="frames of gate"):
        ops.norm_scale_shift(x, None, None, gate=torch.zeros(2, 7, 8))


def test_costs_count_every_byte_once() -> None:
    shape, frames = (2, 12, 8), 3
    rows = 2 * 3 * 8 * 4
    assert norm_scale_shift_cost(shape, frames)[0] == 192 * 4 + 2 * rows
    assert scale_residual_cost(shape, frames)[0] == 192 * 8 + rows
    assert scale_residual_norm_scale_shift_cost(shape, frames)[0] == 192 * 12 + 3 * rows
    assert norm_scale_shift_cost(shape, frames, residual_bytes=2)[0] == 192 * 6 + 3 * rows
    assert scale_residual_cost(shape, frames, addend_bytes=2)[0] == 192 * 10 + rows
    assert scale_residual_norm_scale_shift_cost(shape, frames, addend_bytes=4)[0] == 192 * 16 + 3 * rows
