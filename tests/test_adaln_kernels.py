"""The kernels of LayerNorm, modulation, gate and residual, on every backend that this machine has."""

from __future__ import annotations

import pytest
import torch
from kernels import assert_within_twice, machine_kernels, run_in_interpreter
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops import _dispatch, adaln

on_each_kernel = pytest.mark.parametrize(("device", "backend"), machine_kernels())

DTYPES = BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, frames, tokens a frame, dim; dtypes of x, the residual, and gate, scale, shift
CASES = [
    ((1, 1, 3, 64), (BF16, FP32, FP32)),  # one frame
    ((2, 3, 1, 129), (BF16, BF16, FP32)),  # a frame a token, an odd size
    ((1, 2, 2, 1536), (BF16, FP32, FP32)),
    ((2, 1, 2, 1536), (FP16, FP16, FP16)),
    ((1, 2, 2, 1536), (FP32, FP32, BF16)),
    ((1, 3, 1, 5120), (BF16, FP32, FP32)),
    ((1, 1, 2, 5120), (BF16, BF16, BF16)),
    ((1, 1, 2, 5124), (FP32, FP32, FP32)),  # whole packs of float32, not of bfloat16
    ((1, 2, 1, 8192), (FP16, FP32, FP32)),  # the largest
    ((1, 2, 3, 64), (FP16, BF16, BF16)),  # types that are seldom together
    ((2, 1, 2, 33), (FP32, BF16, FP16)),
    ((1, 1, 1, 1), (FP32, FP32, FP32)),
]
ARGUMENTS = {
    "gate and modulation": ("gate", "scale", "shift"),
    "affine": ("weight", "bias"),
    "all": ("gate", "scale", "shift", "weight", "bias"),
    "nothing": (),
}
ORDER = ("residual", "x", "gate", "scale", "shift", "weight", "bias")


def inputs(size: tuple[int, int, int, int], dtypes: tuple, device: str) -> dict[str, Tensor]:
    """Drawn on the CPU, so that every device has the same."""
    batch, frames, per_frame, dim = size
    generator = torch.Generator().manual_seed(sum(size))
    x_dtype, residual_dtype, rows_dtype = dtypes
    tokens, rows = (batch, frames * per_frame, dim), (batch, frames, dim)

    def draw(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0, centre: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread + centre).to(dtype).to(device)

    return {
        "x": draw(tokens, x_dtype, 3, 1),
        "residual": draw(tokens, residual_dtype, 5, -2),
        **{name: draw(rows, rows_dtype) for name in ("gate", "scale", "shift")},
        **{name: draw((dim,), FP32 if x_dtype == FP32 else BF16) for name in ("weight", "bias")},
    }


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Each element is its exact value but for a rounding, and what float32 loses over a row."""
    error = (actual.double() - exact).abs()
    assert (error <= torch.finfo(actual.dtype).eps * exact.abs() + 1e-5 * exact.abs().amax(-1, keepdim=True)).all()


@on_each_kernel
@pytest.mark.parametrize("given", ARGUMENTS)
@pytest.mark.parametrize(("size", "dtypes"), CASES, ids=str)
def test_twice_rule(size, dtypes, given, device, backend, poisoned_memory):
    t = inputs(size, dtypes, device)
    values = {name: t[name] if name in ("x", "residual", *ARGUMENTS[given]) else None for name in ORDER}
    norm = [values[name] for name in ("x", "scale", "shift", "weight", "bias")]
    total = [values[name] for name in ("residual", "x", "gate")]
    fused = list(values.values())

    for actual, reference, args in (
        (ops.norm_scale_shift(*norm, backend=backend), adaln.norm_scale_shift_ref, norm),
        (ops.scale_residual(*total, backend=backend), adaln.scale_residual_ref, total),
    ):
        low = reference(*args, math_dtype=actual.dtype)
        exact = reference(*args, out_dtype=torch.float64, math_dtype=torch.float64)
        assert_within_twice(actual, low, exact)
        assert_rounded_once(actual, exact)
    both = {"residual_dtype": torch.float64, "out_dtype": torch.float64, "math_dtype": torch.float64}
    exacts = adaln.scale_residual_norm_scale_shift_ref(*fused, **both)
    actuals = ops.scale_residual_norm_scale_shift(*fused, backend=backend)
    for index, (actual, exact) in enumerate(zip(actuals, exacts, strict=True)):
        low = adaln.scale_residual_norm_scale_shift_ref(*fused, math_dtype=actual.dtype)[index]
        assert_within_twice(actual, low, exact)
        assert_rounded_once(actual, exact)


@on_each_kernel
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_results_are_rounded_to_any_dtype(x_dtype, residual_dtype, out_dtype, device, backend):
    t = inputs((1, 1, 1, 64), (x_dtype, residual_dtype, FP32), device)
    args = [t[name] for name in ORDER]
    exact = {"out_dtype": torch.float64, "math_dtype": torch.float64}
    dtypes = {"residual_dtype": out_dtype, "out_dtype": x_dtype}
    residual, y = ops.scale_residual_norm_scale_shift(*args, **dtypes, backend=backend)
    assert (residual.dtype, y.dtype) == (out_dtype, x_dtype)
    total, normal = adaln.scale_residual_norm_scale_shift_ref(*args, residual_dtype=torch.float64, **exact)
    assert_rounded_once(residual, total)
    assert_rounded_once(y, normal)
    assert_rounded_once(ops.scale_residual(*args[:3], out_dtype=out_dtype, backend=backend), total)
    y = ops.norm_scale_shift(*args[1:2], *args[3:], out_dtype=out_dtype, backend=backend)
    assert y.dtype == out_dtype
    assert_rounded_once(y, adaln.norm_scale_shift_ref(*args[1:2], *args[3:], **exact))


@on_each_kernel
def test_more_tokens_than_run_at_once(device, backend):
    """Twice gives the same bits, and each token only depends on itself and its frame."""
    size = (2, 3, 4, 96) if device == "cpu" else (2, 5, 2040, 1536)
    t = inputs(size, (BF16, FP32, FP32), device)
    args = [t[name] for name in ORDER]
    first = ops.scale_residual_norm_scale_shift(*args, backend=backend)
    again = ops.scale_residual_norm_scale_shift(*args, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    last = [t[name][1:, -size[2] :] for name in ("residual", "x")]
    last += [t[name][1:, -1:] for name in ("gate", "scale", "shift")] + args[5:]
    alone = ops.scale_residual_norm_scale_shift(*last, backend=backend)
    assert all(torch.equal(a[1:, -size[2] :], b) for a, b in zip(first, alone, strict=True))


@on_each_kernel
def test_gate_and_modulation_may_differ_in_their_frames(device, backend):
    t = inputs((2, 6, 1, 40), (FP32, FP32, FP32), device)
    args = [t["residual"], t["x"], t["gate"][:, :2], t["scale"][:, ::2], t["shift"][:, ::2]]
    for actual, expected in zip(
        ops.scale_residual_norm_scale_shift(*args, backend=backend),
        adaln.scale_residual_norm_scale_shift_ref(*args),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@on_each_kernel
def test_strides_and_alignment_are_free(device, backend):
    t = inputs((2, 2, 3, 64), (FP32, FP32, FP32), device)
    plain = [t[name] for name in ORDER]
    expected = ops.scale_residual_norm_scale_shift(*plain, backend=backend)

    def among_others(tensor: Tensor) -> Tensor:
        return torch.stack([torch.full_like(tensor, torch.nan), tensor], dim=-2).select(-2, 1)

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([torch.full_like(tensor, torch.nan), tensor], dim=0 if tensor.dim() == 1 else 1)[
            (slice(tensor.shape[0], None),) if tensor.dim() == 1 else (slice(None), slice(tensor.shape[1], None))
        ]

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack([tensor, tensor], -1)[:, 0]

    def unaligned(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)

    for view in (among_others, longer, transposed, unaligned):
        for actual, value in zip(
            ops.scale_residual_norm_scale_shift(*(view(tensor) for tensor in plain), backend=backend),
            expected,
            strict=True,
        ):
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5, msg=view.__name__)
    one_row = [tensor[:1].expand(2, -1, -1) if tensor.dim() == 3 else tensor for tensor in plain]
    repeated = [tensor.contiguous() for tensor in one_row]
    for actual, value in zip(
        ops.scale_residual_norm_scale_shift(*one_row, backend=backend),
        ops.scale_residual_norm_scale_shift(*repeated, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


@on_each_kernel
def test_a_large_mean_costs_no_accuracy(device, backend):
    """The variance is of what is left when the mean is taken off, not a difference of large sums."""
    t = inputs((1, 1, 2, 1536), (FP32, FP32, FP32), device)
    x = (t["x"] + 3000).round(decimals=2)
    exact = adaln.norm_scale_shift_ref(x, None, None, out_dtype=torch.float64, math_dtype=torch.float64)
    assert (ops.norm_scale_shift(x, None, None, backend=backend) - exact).abs().amax() < 2e-4


@on_each_kernel
def test_no_tokens(device, backend):
    x, rows = torch.zeros(2, 0, 8, device=device), torch.zeros(2, 1, 8, device=device)
    assert ops.norm_scale_shift(x, rows, rows, backend=backend).shape == (2, 0, 8)
    assert ops.scale_residual(x, x, rows, backend=backend).shape == (2, 0, 8)


@on_each_kernel
@pytest.mark.parametrize("given", ["all", "nothing"])
def test_registered_operators(given, device, backend):
    t = inputs((1, 2, 1, 33), (BF16, FP32, FP32), device)
    values = [t[name] if name in ("x", "residual", *ARGUMENTS[given]) else None for name in ORDER]
    registered = torch.ops.skyreels_fast
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(registered.norm_scale_shift.default, (*values[1:2], *values[3:], 1e-6, FP32, backend))
    torch.library.opcheck(registered.scale_residual.default, (*values[:3], BF16, backend), test_utils=checks)
    args = (*values, 1e-6, FP32, BF16, backend)
    torch.library.opcheck(registered.scale_residual_norm_scale_shift.default, args, test_utils=checks)


@on_each_kernel
def test_compiled_without_a_break(device, backend):
    t = inputs((1, 2, 2, 40), (BF16, FP32, FP32), device)
    args = [t[name] for name in ORDER]

    def block(*args: Tensor) -> tuple[Tensor, ...]:
        total, y = ops.scale_residual_norm_scale_shift(*args, backend=backend)
        return ops.scale_residual(total, y, args[2], backend=backend), ops.norm_scale_shift(
            y, *args[3:5], backend=backend
        )

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), block(*args), strict=True))


@on_each_kernel
def test_what_kernels_do_not_take_is_named(device, backend):
    x = torch.zeros(1, 2, 8, device=device)
    with pytest.raises(ValueError, match=f"norm_scale_shift: backend '{backend}' takes .*float64.*'ref'"):
        ops.norm_scale_shift(x.double(), None, None, backend=backend)
    with pytest.raises(ValueError, match="float64"):
        ops.scale_residual(x, x, None, out_dtype=torch.float64, backend=backend)
    with pytest.raises(ValueError, match="D up to 8192, not 8193"):
        ops.norm_scale_shift(torch.zeros(1, 1, 8193, device=device), None, None, backend=backend)


@pytest.mark.skipif(_dispatch.extension is None, reason="the CUDA kernels are not built")
def test_entries_check_their_arguments():
    """None of these reaches a GPU."""
    cuda = _dispatch.extension

    def rows(count: int, data: int = 16, dtype: int = cuda.FLOAT32) -> object:
        return cuda.Rows(data=data, dtype=dtype, rows=count, stride=8)

    def norm(x: object, scale: object = None, shift: object = None, weight: object = None, dim: int = 8) -> None:
        cuda.norm_scale_shift(rows(6), x, scale, shift, weight, None, dim, 1e-6, 0)

    for call, message in (
        (lambda: norm(rows(6), dim=8193), "norm_scale_shift: dim 8193 is not in 1 to 8192"),
        (lambda: norm(rows(0)), "0 tokens are too many or none"),
        (lambda: norm(rows(5)), "out has 6 rows, not 5"),
        (lambda: norm(rows(6, data=18)), "x is not aligned"),
        (lambda: norm(rows(6, data=0)), "x is null"),
        (lambda: norm(rows(6, dtype=7)), "dtype code 7"),
        (lambda: norm(rows(6), rows(4), rows(4)), "6 tokens do not split into the rows of scale"),
        (lambda: norm(rows(6), rows(3), rows(2)), "shift has 2 rows, not 3"),
        (lambda: norm(rows(6), rows(3)), "scale and shift come together"),
        (lambda: norm(rows(6), weight=rows(1)), "weight and bias come together"),
        (lambda: cuda.scale_residual(rows(6), rows(6), rows(6), rows(4), 8, 0), "scale_residual: .* rows of gate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_one_device():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="scale_residual: tensors must be on one device, not on meta and cpu"):
        ops.scale_residual(x, x.to("meta"), None)


def test_left_to_the_reference(monkeypatch):
    """Where nothing is asked for, kernels get what they can do and the reference the rest."""
    monkeypatch.setattr(adaln, "choose", lambda *_, **__: "triton")
    x = torch.zeros(1, 2, 8)

    def chosen(*tensors: Tensor, dtype: torch.dtype = FP32) -> str:
        return adaln._choose("op", None, *tensors, dtypes=(dtype,))

    assert chosen(x, x.bfloat16(), None) == "triton"
    assert chosen(x.double()) == chosen(x, x.double()) == chosen(x, dtype=torch.float64) == "ref"
    assert chosen(torch.zeros(1, 2, 8193)) == "ref"
    assert chosen(x.clone().requires_grad_()) == chosen(x, x.clone().requires_grad_()) == "ref"
    with torch.no_grad():
        assert chosen(x.clone().requires_grad_()) == "triton"


@pytest.mark.skipif(_dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the tests above run Triton's interpreter")
def test_triton_kernel_in_the_interpreter():
    run_in_interpreter(__file__)
