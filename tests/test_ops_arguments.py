"""What every op says of a dtype it does not compute in, of tensors that are apart, of a backend it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops._dispatch import FLOATS

TOKENS, ROWS, HEADS = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), torch.zeros(1, 4, 2, 4)
VECTOR, FRAME, LSE = torch.zeros(8), torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 4)
MODULATION = {"scale": ROWS, "shift": ROWS, "weight": VECTOR, "bias": VECTOR}
QK = {"q": HEADS, "k": HEADS, "q_weight": VECTOR, "k_weight": VECTOR, "grid": (1, 2, 2)}
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    ops.norm_scale_shift: {"x": TOKENS, **MODULATION, "residual": TOKENS, "gate": ROWS},
    ops.scale_residual: {"residual": TOKENS, "x": TOKENS, "gate": ROWS, "addend": TOKENS},
    ops.scale_residual_norm_scale_shift: {
        "residual": TOKENS, "x": TOKENS, "gate": ROWS, **MODULATION, "addend": TOKENS,
    },
    ops.qk_norm: {"x": HEADS, "weight": VECTOR},
    ops.qk_norm_rope3d: QK,
    ops.qk_norm_rope3d_: QK,
    ops.attention: {"q": HEADS, "k": HEADS, "v": HEADS},
    ops.attention_with_lse: {"q": HEADS, "k": HEADS, "v": HEADS},
    ops.attention_weights: {"q": HEADS, "k": HEADS, "log_counts": torch.zeros(4), "norm_weight": VECTOR},
    ops.merge_attention: {"out": HEADS, "lse": LSE, "more": HEADS, "more_lse": LSE},
    ops.linear_gelu: {"x": TOKENS, "weight": torch.zeros(3, 8), "bias": torch.zeros(3)},
    ops.norm_silu: {"x": TOKENS, "gamma": VECTOR},
    ops.causal_conv3d: {
        "frames": [FRAME], "weight": torch.zeros(8, 8, 3, 3, 3), "bias": VECTOR, "residual": FRAME, "gamma": VECTOR,
    },
    ops.relative_l1: {"new": TOKENS, "old": TOKENS},
    ops.residual_save: {"after": TOKENS, "before": TOKENS},
    ops.residual_add: {"x": TOKENS, "residual": TOKENS},
}  # fmt: skip
on_each_op = pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
on_each_dtype = pytest.mark.parametrize(
    "dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=lambda dtype: str(dtype)[6:]
)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy in `dtype` of a tensor or of each in a list; anything else as it is."""
    if isinstance(value, list):
        return [cast(each, dtype) for each in value]
    return value.to(dtype, copy=True) if isinstance(value, Tensor) else value


def copied(args: dict[str, Any]) -> dict[str, Any]:
    """For ops that write over them."""
    return {name: cast(value, value.dtype) if isinstance(value, Tensor) else value for name, value in args.items()}


def drawn(op: Callable[..., Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: cast(value, dtype) for name, value in CALLS[op].items()}


def test_every_op_is_here() -> None:
    without_tensors = {"choose_attention", "query_rows"}
    assert {op.__name__ for op in CALLS} == set(ops.__all__) - without_tensors


@on_each_op
@on_each_dtype
def test_other_dtypes_are_refused(op: Callable[..., Any], dtype: torch.dtype) -> None:
    """In all arguments at once, whose dtypes agree then, and in each alone."""
    name = op.__name__.removesuffix("_with_lse")
    floats = f"must be float16, bfloat16, float32 or float64, not {dtype}$"
    with pytest.raises(ValueError, match=rf"^{name}: [\w\[\]]+ {floats}"):
        op(**drawn(op, dtype))
    for label, value in drawn(op, dtype).items():
        if label != "grid":
            with pytest.raises(ValueError, match=rf"^{name}: ({label} {floats}|.* must have one .*dtype)"):
                op(**drawn(op, torch.float32) | {label: value})


@on_each_op
def test_tensors_on_two_devices_are_refused(op: Callable[..., Any]) -> None:
    name, args = op.__name__.removesuffix("_with_lse"), drawn(op, torch.float32)
    *_, label = (label for label, value in args.items() if isinstance(value, Tensor))
    with pytest.raises(ValueError, match=rf"^{name}: [\w\[\]]+ \(cpu\) and {label} \(meta\) must be on one device"):
        op(**args | {label: args[label].to("meta")})


@on_each_dtype
@pytest.mark.parametrize(
    ("op", "label"),
    [
        (ops.norm_scale_shift, "out_dtype"),
        (ops.scale_residual, "out_dtype"),
        (ops.scale_residual_norm_scale_shift, "out_dtype"),
        (ops.scale_residual_norm_scale_shift, "residual_dtype"),
        (ops.merge_attention, "out_dtype"),
    ],
)
def test_other_dtypes_of_results_are_refused(op: Callable[..., Any], label: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"^{op.__name__}: {label} must be float16, .* not {dtype}$"):
        op(**CALLS[op], **{label: dtype})


@on_each_op
def test_floats_are_taken(op: Callable[..., Any]) -> None:
    for dtype in FLOATS:
        op(**drawn(op, dtype))


@on_each_op
def test_autocast_changes_nothing(op: Callable[..., Any]) -> None:
    """Dtypes are those of the arguments, and as exact."""
    generator = torch.Generator().manual_seed(0)
    args = {
        name: torch.randn(value.shape, generator=generator) if isinstance(value, Tensor) else value
        for name, value in drawn(op, torch.float32).items()
    }
    expected = op(**copied(args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = op(**copied(args))
    for one, other in zip(*(outs if isinstance(outs, tuple) else (outs,) for outs in (actual, expected)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@on_each_op
def test_unknown_backends_are_told_from_absent_ones(op: Callable[..., Any]) -> None:
    name = op.__name__.removesuffix("_with_lse")
    with pytest.raises(ValueError, match=rf"^{name}: there is no backend 'foo'; give one of \w+, .*ref$"):
        op(**drawn(op, torch.float32), backend="foo")
