"""The kernels of LayerNorm, modulation, gate and residual, on every backend that this machine has."""

from __future__ import annotations

import pytest
import torch
from kernels import assert_within_twice, machine_kernels, run_in_interpreter
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops import _adaln_kernels, _dispatch, adaln

# What each op is called with, in this order.
NAMES = {
    "norm_scale_shift": ("x", "scale", "shift", "weight", "bias", "residual", "gate"),
    "scale_residual": ("residual", "x", "gate", "addend"),
    "scale_residual_norm_scale_shift": ("residual", "x", "gate", "scale", "shift", "weight", "bias", "addend"),
}
TOKENS = ("x", "residual", "addend")


def op_kernels() -> list:
    """(op, device, backend) of every kernel that can run."""
    return [
        pytest.param(op, *kernel.values, id=f"{kernel.id}-{op}", marks=kernel.marks)
        for op in NAMES
        for kernel in machine_kernels(adaln.BACKENDS)
    ]


on_each_kernel = pytest.mark.parametrize(("op", "device", "backend"), op_kernels())
on_each_norm = pytest.mark.parametrize(
    ("op", "device", "backend"), [case for case in op_kernels() if case.values[0] != "scale_residual"]
)

DTYPES = BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, frames, tokens a frame, dim; dtypes of x and addend, the residual, and gate, scale, shift
CASES = [
    ((1, 1, 3, 64), (BF16, FP32, FP32)),  # one frame
    ((2, 3, 1, 129), (BF16, BF16, FP32)),  # a frame a token, an odd size
    ((1, 2, 2, 1536), (BF16, FP32, FP32)),
    ((1, 4, 5, 96), (BF16, FP32, FP32)),  # tokens of a frame that no power of two divides
    ((2, 7, 1, 1536), (FP16, BF16, FP32)),  # a frame a token, and whole blocks
    ((2, 1, 2, 1536), (FP16, FP16, FP16)),
    ((1, 2, 2, 1536), (FP32, FP32, BF16)),
    ((1, 3, 1, 5120), (BF16, FP32, FP32)),
    ((1, 1, 2, 5120), (BF16, BF16, BF16)),
    ((1, 1, 2, 5124), (FP32, FP32, FP32)),  # whole packs of float32, not of bfloat16
    ((1, 1, 3, 3072), (FP16, FP32, FP32)),
    ((1, 1, 2, 4999), (BF16, FP32, FP32)),  # odd, and long
    ((1, 2, 1, 8192), (FP16, FP32, FP32)),  # the largest
    ((1, 2, 3, 64), (FP16, BF16, BF16)),  # types that are seldom together
    ((2, 1, 2, 33), (FP32, BF16, FP16)),
    ((1, 1, 1, 1), (FP32, FP32, FP32)),
]
ARGUMENTS = {
    "gate and modulation": ("gate", "scale", "shift"),
    "affine": ("weight", "bias"),
    "sum": ("residual", "gate", "addend"),
    "all": ("residual", "gate", "addend", "scale", "shift", "weight", "bias"),
    "nothing": (),
}


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
        "addend": draw(tokens, x_dtype, 2),
    }


def arguments(op: str, t: dict[str, Tensor], given: str = "all") -> list[Tensor | None]:
    needed = ("x",) if op == "norm_scale_shift" else ("x", "residual")
    return [t[name] if name in (*needed, *ARGUMENTS[given]) else None for name in NAMES[op]]


def call(op: str, args: list, backend: str, **dtypes: torch.dtype) -> tuple[Tensor, ...]:
    outputs = getattr(ops, op)(*args, backend=backend, **dtypes)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def reference(op: str, args: list, math_dtype: torch.dtype, **dtypes: torch.dtype) -> tuple[Tensor, ...]:
    outputs = getattr(adaln, f"{op}_ref")(*args, math_dtype=math_dtype, **dtypes)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def exactly(op: str, args: list) -> tuple[Tensor, ...]:
    dtypes = ("residual_dtype", "out_dtype") if op == "scale_residual_norm_scale_shift" else ("out_dtype",)
    return reference(op, args, torch.float64, **dict.fromkeys(dtypes, torch.float64))


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Each element is its exact value but for a rounding, and what float32 loses over a row."""
    error = (actual.double() - exact).abs()
    assert (error <= torch.finfo(actual.dtype).eps * exact.abs() + 1e-5 * exact.abs().amax(-1, keepdim=True)).all()


@on_each_kernel
@pytest.mark.parametrize("given", ARGUMENTS)
@pytest.mark.parametrize(("size", "dtypes"), CASES, ids=str)
def test_twice_rule(size, dtypes, given, op, device, backend, poisoned_memory):
    args = arguments(op, inputs(size, dtypes, device), given)
    exacts = exactly(op, args)
    for index, (actual, exact) in enumerate(zip(call(op, args, backend), exacts, strict=True)):
        assert_within_twice(actual, reference(op, args, actual.dtype)[index], exact)
        assert_rounded_once(actual, exact)


@on_each_kernel
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_results_are_rounded_to_any_dtype(x_dtype, out_dtype, op, device, backend):
    for residual_dtype in DTYPES:
        args = arguments(op, inputs((1, 1, 1, 64), (x_dtype, residual_dtype, FP32), device))
        fused = op == "scale_residual_norm_scale_shift"
        dtypes = {"residual_dtype": out_dtype, "out_dtype": x_dtype} if fused else {"out_dtype": out_dtype}
        actuals = call(op, args, backend, **dtypes)
        assert [actual.dtype for actual in actuals] == list(dtypes.values())
        for actual, exact in zip(actuals, exactly(op, args), strict=True):
            assert_rounded_once(actual, exact)


@on_each_kernel
@pytest.mark.parametrize("dim", [96, 1536, 5120])
def test_more_tokens_than_run_at_once(dim, op, device, backend):
    """Twice gives the same bits, and each token only depends on itself and its frame."""
    size = (2, 3, 4, dim) if device == "cpu" else (2, 5, 2041, dim)
    t = inputs(size, (BF16, FP32, FP32), device)
    first, again = (call(op, arguments(op, t), backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    last = {name: value[1:, -size[2] :] if name in TOKENS else value for name, value in t.items()}
    last |= {name: t[name][1:, -1:] for name in ("gate", "scale", "shift")}
    alone = call(op, arguments(op, last), backend)
    assert all(torch.equal(a[1:, -size[2] :], b) for a, b in zip(first, alone, strict=True))


@on_each_kernel
@pytest.mark.parametrize(("gates", "scales"), [(2, 3), (6, 1), (1, 6), (2, 30), (30, 3), (30, 30)])
def test_gate_and_modulation_may_differ_in_their_frames(gates, scales, op, device, backend, poisoned_memory):
    t = inputs((2, 30, 1, 40), (FP32, FP32, FP32), device)
    t |= {"gate": t["gate"][:, :gates], "scale": t["scale"][:, :scales], "shift": t["shift"][:, -scales:]}
    args = arguments(op, t, "gate and modulation")
    for actual, expected in zip(call(op, args, backend), reference(op, args, FP32), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@on_each_kernel
@pytest.mark.parametrize(("per_frame", "rows"), [(1, 8), (3, 2), (5, 4), (8, 4), (13, 8)])
def test_any_number_of_tokens_to_a_program(per_frame, rows, op, device, backend, poisoned_memory, monkeypatch):
    """None is left out or given another frame's rows, and nothing past the last one is read or written."""
    monkeypatch.setattr(_adaln_kernels, "_tuning", lambda *_, **__: (rows, 2, 4, rows == 4))
    empty, margin = torch.empty, 16 * 40

    def padded(shape: torch.Size, **how: object) -> Tensor:
        memory = empty(shape.numel() + margin, **how).fill_(7)
        return memory[: shape.numel()].view(shape)

    monkeypatch.setattr(_adaln_kernels, "_like", lambda x, dtype: padded(x.shape, dtype=dtype, device=x.device))
    t = inputs((1, 3, per_frame, 40), (FP32, FP32, FP32), device)
    t |= {name: torch.cat([t[name], torch.full_like(t[name], torch.nan)], 1)[:, : 3 * per_frame] for name in TOKENS}
    args = arguments(op, t)
    for actual, expected in zip(call(op, args, backend), reference(op, args, FP32), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        past = actual.new_empty(0).set_(actual.untyped_storage())[actual.numel() :]
        assert past.numel() == margin and (past == 7).all()


@on_each_kernel
def test_strides_and_alignment_are_free(op, device, backend):
    plain = arguments(op, inputs((2, 2, 3, 64), (FP32, FP32, FP32), device))
    expected = call(op, plain, backend)

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
        for actual, value in zip(call(op, [view(tensor) for tensor in plain], backend), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5, msg=view.__name__)
    one_row = [tensor[:1].expand(2, -1, -1) if tensor.dim() == 3 else tensor for tensor in plain]
    repeated = [tensor.contiguous() for tensor in one_row]
    for actual, value in zip(call(op, one_row, backend), call(op, repeated, backend), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "ref"), *machine_kernels(adaln.BACKENDS)])
@pytest.mark.parametrize("dim", [96, 1536, 5120])
def test_a_sum_of_three_has_the_bits_of_two_sums(dim, device, backend):
    """Whether the first of them is written in float32 or not."""
    t = inputs((2, 3, 2, dim), (BF16, BF16, FP32), device)
    x, residual, gate, addend = (t[name] for name in ("x", "residual", "gate", "addend"))
    affine, rows = (None, None, t["weight"], t["bias"]), (t["scale"], t["shift"])
    dtypes = {"residual_dtype": FP32, "backend": backend}
    total, y = ops.scale_residual_norm_scale_shift(residual, x, gate, *affine, **dtypes)
    assert torch.equal(ops.norm_scale_shift(x, *affine, residual, gate, backend=backend), y)
    twice = ops.scale_residual_norm_scale_shift(total, addend, None, *rows, **dtypes)
    once = ops.scale_residual_norm_scale_shift(residual, x, gate, *rows, addend=addend, **dtypes)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert torch.equal(ops.scale_residual(residual, x, gate, addend, out_dtype=FP32, backend=backend), once[0])


@on_each_norm
@pytest.mark.parametrize("dim", [1536, 1537])
def test_a_large_mean_costs_no_accuracy(dim, op, device, backend):
    """The variance is of what is left when the mean is taken off, not a difference of large sums."""
    t = inputs((1, 1, 2, dim), (FP32, FP32, FP32), device)
    t |= {"x": (t["x"] + 3000).round(decimals=2), "residual": torch.zeros_like(t["residual"])}
    args = arguments(op, t, "nothing")
    assert (call(op, args, backend)[-1] - exactly(op, args)[-1]).abs().amax() < 2e-4


@on_each_kernel
def test_no_tokens(op, device, backend):
    x, rows = torch.zeros(2, 0, 8, device=device), torch.zeros(2, 1, 8, device=device)
    t = {"x": x, "residual": x, "gate": rows, "scale": rows, "shift": rows}
    for actual in call(op, arguments(op, t, "gate and modulation"), backend):
        assert actual.shape == (2, 0, 8)


@on_each_kernel
@pytest.mark.parametrize("given", ["all", "nothing"])
def test_registered_operators(given, op, device, backend):
    args = arguments(op, inputs((1, 2, 1, 33), (BF16, FP32, FP32), device), given)
    more = {"norm_scale_shift": (1e-6, FP32), "scale_residual": (BF16,)}.get(op, (1e-6, FP32, BF16))
    operator = getattr(torch.ops.skyreels_fast, op).default
    torch.library.opcheck(operator, (*args, *more))


@on_each_kernel
def test_compiled_without_a_break(op, device, backend):
    args = arguments(op, inputs((1, 2, 2, 40), (BF16, FP32, FP32), device))

    def block(*args: Tensor) -> tuple[Tensor, ...]:
        return call(op, [arg * 2 for arg in args], backend)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), block(*args), strict=True))


@on_each_kernel
def test_what_kernels_do_not_take_is_named(op, device, backend):
    x = torch.zeros(1, 2, 8, device=device)
    with pytest.raises(ValueError, match=f"{op}: backend '{backend}' takes .*float64.*'ref'"):
        call(op, arguments(op, {"x": x.double(), "residual": x}, "nothing"), backend)
    with pytest.raises(ValueError, match="float64"):
        call(op, arguments(op, {"x": x, "residual": x}, "nothing"), backend, out_dtype=torch.float64)
    long = torch.zeros(1, 1, 8193, device=device)
    with pytest.raises(ValueError, match="D up to 8192, not 8193"):
        call(op, arguments(op, {"x": long, "residual": long}, "nothing"), backend)


def test_one_device():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r"scale_residual: residual \(cpu\) and x \(meta\) must be on one device"):
        ops.scale_residual(x, x.to("meta"), None)


def test_left_to_the_reference(monkeypatch):
    """Where nothing is asked for, kernels get what they can do and the reference the rest."""
    monkeypatch.setattr(_dispatch, "choose", lambda *_, **__: "triton")
    x = torch.zeros(1, 2, 8)

    def chosen(residual: Tensor, x: Tensor | None = None, dtype: torch.dtype = FP32) -> str:
        return adaln._choose("scale_residual", None, {"residual": residual, "x": x}, {"out_dtype": dtype})

    assert chosen(x) == chosen(x, x.bfloat16()) == "triton"
    assert chosen(x.double()) == chosen(x, x.double()) == chosen(x, dtype=torch.float64) == "ref"
    assert chosen(torch.zeros(1, 2, 8193)) == "ref"
    assert chosen(x.clone().requires_grad_()) == chosen(x, x.clone().requires_grad_()) == "ref"
    with torch.no_grad():
        assert chosen(x.clone().requires_grad_()) == "triton"


@pytest.mark.skipif(_dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the tests above run Triton's interpreter")
def test_triton_kernel_in_the_interpreter():
    run_in_interpreter(__file__)
