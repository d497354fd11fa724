"""relative_l1, residual_save and residual_add, on every backend that this machine has."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernels import assert_within_twice, run_in_interpreter

from skyreels_fast.ops import _dispatch
from skyreels_fast.ops.residual_reuse import (
    BACKENDS,
    relative_l1,
    relative_l1_cost,
    relative_l1_ref,
    residual_add,
    residual_add_cost,
    residual_add_ref,
    residual_save,
    residual_save_ref,
)

ELEMENTWISE = {"add": (residual_add, residual_add_ref), "save": (residual_save, residual_save_ref)}
SHAPES = [(1,), (3, 5), (2, 7, 129), (1, 33, 256)]  # odd ends, less than a vector, whole vectors
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def machine_backends() -> list:
    cases = [pytest.param("cpu", name, id=f"cpu-{name}") for name in _dispatch.available("cpu", BACKENDS)]
    on_gpu = _dispatch.available("cuda", BACKENDS)
    return cases + [pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in on_gpu]


on_each_backend = pytest.mark.parametrize(("device", "backend"), machine_backends())
on_each_kernel = pytest.mark.parametrize(
    ("device", "backend"), [case for case in machine_backends() if "ref" not in case.values]
)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    """A tensor and one near it, drawn on the CPU so that every device has the same."""
    generator = torch.Generator().manual_seed(sum(shape))
    first = torch.randn(shape, generator=generator, dtype=torch.float64)
    second = first + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).to(device) for tensor in (first, second)]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_reference_in_float64(name):
    op, reference = ELEMENTWISE[name]
    a, b = pair((4, 6), torch.float64)
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    expected = [x + y if name == "add" else x - y for x, y in pairs]
    assert reference(a, b, math_dtype=torch.float64).flatten().tolist() == expected
    assert op(a, b).flatten().tolist() == expected


def test_relative_l1_reference_in_float64():
    new, old = pair((4, 6), torch.float64)
    moved = sum(abs(x - y) for x, y in zip(new.flatten().tolist(), old.flatten().tolist(), strict=True))
    expected = moved / sum(abs(y) for y in old.flatten().tolist())
    assert relative_l1_ref(new, old, math_dtype=torch.float64).item() == pytest.approx(expected, rel=1e-14)
    assert relative_l1(new, old).item() == pytest.approx(expected, rel=1e-7)
    assert relative_l1(new, old).dtype == torch.float32


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_twice_rule(name, shape, dtype, device, backend, poisoned_memory):
    op, reference = ELEMENTWISE[name]
    a, b = pair(shape, dtype, device)
    actual = op(a, b, backend=backend)
    low = reference(a, b, math_dtype=dtype)
    assert_within_twice(actual, low, reference(a.double(), b.double(), math_dtype=torch.float64))
    assert torch.equal(actual, op(a, b, backend=backend))


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relative_l1_twice_rule(shape, dtype, device, backend, poisoned_memory):
    new, old = pair(shape, dtype, device)
    actual = relative_l1(new, old, backend=backend)
    assert actual.shape == () and actual.device == new.device
    exact = relative_l1_ref(new.double(), old.double(), math_dtype=torch.float64)
    assert_within_twice(actual, relative_l1_ref(new, old, math_dtype=dtype).float(), exact)
    assert actual.item() == pytest.approx(exact.item(), rel=1e-6)
    assert torch.equal(actual, relative_l1(new, old, backend=backend))


@on_each_backend
def test_many_partial_sums_make_the_whole(device, backend):
    """More elements than one block or program takes at a time, and a tail."""
    new, old = pair((300_007 if device == "cpu" else 20_000_007,), torch.float32, device)
    exact = relative_l1_ref(new.double(), old.double(), math_dtype=torch.float64).item()
    actual = relative_l1(new, old, backend=backend)
    assert actual.item() == pytest.approx(exact, rel=1e-6)
    assert torch.equal(actual, relative_l1(new, old, backend=backend))
    assert torch.equal(residual_add(new, old, backend=backend), new + old)


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_are_free(dtype, device, backend):
    a, b = pair((6, 11, 8), dtype, device)
    views = {
        "transposed": (a.transpose(0, 1), b.transpose(0, 1)),
        "every other": (a[..., ::2], b[..., ::2]),
        "off a vector's boundary": (a.flatten()[1:], b.flatten()[1:]),
        "each at its own": (a.flatten()[1:-1], b.flatten()[2:]),
        "expanded": (a[:1].expand(6, 11, 8), b),
    }
    for label, (x, y) in views.items():
        for op in (residual_add, residual_save, relative_l1):
            expected = op(x.clone().contiguous(), y.clone().contiguous(), backend=backend)
            torch.testing.assert_close(op(x, y, backend=backend), expected, rtol=1e-6, atol=0, msg=label)


@on_each_backend
def test_what_is_saved_can_be_added(device, backend):
    before, after = pair((2, 5, 64), torch.float32, device)
    residual = residual_save(after, before, backend=backend)
    torch.testing.assert_close(residual_add(before, residual, backend=backend), after, rtol=1e-6, atol=1e-6)


@on_each_backend
def test_values_that_are_not_finite(device, backend):
    ones, zeros = torch.ones(5, device=device), torch.zeros(5, device=device)
    assert relative_l1(ones, zeros, backend=backend).item() == float("inf")
    assert relative_l1(zeros, zeros, backend=backend).isnan()
    assert relative_l1(ones * float("nan"), ones, backend=backend).isnan()
    assert relative_l1(ones, ones, backend=backend).item() == 0
    assert residual_add(ones[:0], zeros[:0], backend=backend).shape == (0,)


@on_each_backend
def test_compiled_without_a_break(device, backend):
    def reuse(x, before, after):
        return residual_add(x, residual_save(after, before, backend=backend), backend=backend), relative_l1(
            after, before, backend=backend
        )

    before, after = pair((3, 40), torch.float32, device)
    for actual, expected in zip(
        torch.compile(reuse, fullgraph=True, backend="aot_eager")(after, before, after),
        reuse(after, before, after),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@on_each_kernel
@pytest.mark.parametrize("name", ["residual_add", "residual_save", "relative_l1"])
def test_registered_operator(name, device, backend):
    operator = getattr(torch.ops.skyreels_fast, name).default
    torch.library.opcheck(operator, tuple(pair((3, 40), torch.bfloat16, device)))


@pytest.mark.parametrize("op", [residual_add, residual_save, relative_l1])
@pytest.mark.parametrize(
    ("a", "b", "backend", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), None, r"\[2, 3\].*\[3, 2\]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), None, "float32.*bfloat16"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), None, "int64"),
        (torch.zeros(2), torch.zeros(2, device="meta"), None, "cpu.*meta"),
        (torch.zeros(2), torch.zeros(2), "cuda", "there is no backend 'cuda'; give one of triton, ref"),
        (torch.zeros(2), torch.zeros(2), "fast", "there is no backend 'fast'"),
    ],
)
def test_wrong_arguments_are_named(op, a, b, backend, message):
    with pytest.raises(ValueError, match=rf"{op.__name__}: .*{message}"):
        op(a, b, backend=backend)


def test_empty_tensors_have_no_distance():
    with pytest.raises(ValueError, match="empty"):
        relative_l1(torch.zeros(0), torch.zeros(0))


def test_costs():
    assert residual_add_cost((2, 3, 4), itemsize=2) == (3 * 24 * 2, 24)
    assert relative_l1_cost((2, 3, 4), itemsize=4) == (2 * 24 * 4, 3 * 24)


@pytest.mark.skipif(_dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the tests above run Triton's interpreter")
def test_triton_kernels_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when a kernel is defined, so the tests above run once more in a fresh process."""
    run_in_interpreter(__file__)


def test_usable_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from skyreels_fast.ops import residual_reuse as r;"
        "assert r.residual_add(torch.ones(2), torch.ones(2)).tolist() == [2, 2];"
        "assert 'triton' not in r.choose_kernel.__globals__['available']('cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_come_from_the_formula():
    both = [x.requires_grad_() for x in pair((3, 5), torch.float64)]
    for op in (residual_add, residual_save):
        assert torch.autograd.gradcheck(op, both)


@on_each_kernel
def test_kernels_refuse_gradients_and_leave_them_to_the_formula_by_default(device, backend):
    a, b = (x.to(device).requires_grad_() for x in pair((3, 5), torch.float32))
    for op in (residual_add, residual_save, relative_l1):
        with pytest.raises(ValueError, match="has no gradient; use 'ref', or torch.no_grad"):
            op(a, b, backend=backend)
        assert op(a, b).requires_grad
        assert op(a.double(), b.double()).requires_grad
        with torch.no_grad():
            op(a, b, backend=backend)
