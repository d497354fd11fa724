"""One frame of a causal 3D convolution: torch's own convolution of the padded video, and the kernel on every device."""

from __future__ import annotations

import pytest
import torch
from conftest import rel_l2
from kernels import assert_within_twice, machine_kernels, run_in_interpreter
from torch import Tensor
from torch.nn import functional

from skyreels_fast import ops
from skyreels_fast.ops import _dispatch
from skyreels_fast.ops.causal_conv3d import DEFAULT, causal_conv3d_cost, causal_conv3d_ref

on_each_kernel = pytest.mark.parametrize(
    ("device", "backend"), [case for case in machine_kernels() if case.values[1] == "triton"]
)
EVERYWHERE = ("conv2d", "conv3d", "ref")
# (B, H, W, C), (O, KT, KH, KW), frames given, residual and norm
CASES = [
    ((1, 5, 7, 32), (96, 3, 3, 3), 3, True),
    ((2, 3, 4, 96), (96, 3, 3, 3), 2, False),
    ((1, 4, 3, 16), (48, 3, 1, 1), 3, False),
    ((1, 3, 3, 64), (192, 3, 3, 3), 1, True),
    ((1, 6, 5, 48), (9, 1, 3, 3), 1, False),
    ((1, 1, 1, 16), (1, 3, 3, 3), 3, True),
    ((1, 4, 3, 16), (16, 1, 31, 1), 1, False),  # the most taps in a frame that the kernel takes
    ((1, 2, 3, 16), (384, 1, 1, 1), 1, True),  # more channels than a program's, and a norm of them all
    ((1, 9, 17, 32), (200, 2, 3, 3), 2, True),  # several blocks of pixels, the last one in part; channels too
]


def inputs(
    shape: tuple[int, ...], taps: tuple[int, ...], count: int, full: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    frames = [draw(*shape) for _ in range(count)]
    out, *kernel = taps
    weight = draw(out, shape[3], *kernel) * (shape[3] * kernel[0]) ** -0.5 / kernel[1]
    return frames, weight, draw(out), *((draw(*shape[:3], out), draw(out) + 1) if full else (None, None))


def convolved(
    frames: list[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """The whole video, padded with zeros in the past, convolved in float64; its last frame."""
    video = torch.stack(frames, dim=2).double().permute(0, 4, 2, 1, 3)  # [B, C, T, H, W]
    height, width = weight.shape[3] // 2, weight.shape[4] // 2
    video = functional.pad(video, (width, width, height, height, weight.shape[2] - 1, 0))
    out = functional.conv3d(video, weight.double(), None if bias is None else bias.double())[:, :, -1]
    out = out.permute(0, 2, 3, 1)
    out = out if residual is None else out + residual.double()
    if gamma is None:
        return out
    normal = out / out.square().mean(-1, keepdim=True).sqrt() * gamma.double()
    return normal * normal.sigmoid()


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_last_frame_of_a_padded_convolution(case: tuple, backend: str) -> None:
    args = inputs(*case, torch.float32)
    actual = ops.causal_conv3d(*args, backend=backend)
    assert actual.dtype == torch.float32
    assert rel_l2(actual, convolved(*args)) < 1e-6
    exact = inputs(*case, torch.float64)
    assert rel_l2(ops.causal_conv3d(*exact, backend=backend), convolved(*exact)) < 1e-14


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_bias_may_be_left_out_and_gradients_flow(backend: str) -> None:
    frames, weight, _, residual, _ = inputs((1, 2, 3, 4), (5, 3, 3, 3), 2, True, torch.float64)
    assert rel_l2(ops.causal_conv3d(frames, weight, backend=backend), convolved(frames, weight)) < 1e-14

    def of(first: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return ops.causal_conv3d([first, frames[1]], weight, None, residual, backend=backend)

    assert torch.autograd.gradcheck(of, [t.requires_grad_() for t in (frames[0], weight, residual)])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_autocast_changes_nothing(backend: str) -> None:
    args = inputs((1, 3, 4, 16), (8, 3, 3, 3), 2, True, torch.float32)
    args[1].requires_grad_()  # as in training

    def function(first: Tensor, newest: Tensor) -> Tensor:
        return ops.causal_conv3d([first, newest], *args[1:], backend=backend)

    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = call(*args[0])
        assert actual.dtype == torch.float32 and rel_l2(actual, convolved(*args)) < 1e-6


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_device_without_autocast(backend: str) -> None:
    args = inputs((1, 3, 4, 16), (8, 3, 3, 3), 2, False, torch.float32, "meta")
    assert ops.causal_conv3d(*args, backend=backend).shape == (1, 3, 4, 8)


def test_cost() -> None:
    moved, flops = causal_conv3d_cost((1, 2, 3, 4), (5, 4, 3, 3, 3), residual=True)
    assert flops == 2 * 6 * 5 * 4 * 27
    assert moved == 2 * (3 * 6 * 4 + 2 * 6 * 5 + 5 * 4 * 27)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, r"frames must be 1 to KT = 3 tensors, not 0"),
        ({"frames": 4}, r"frames must be 1 to KT = 3 tensors, not 4"),
        ({"weight": torch.ones(5, 4, 3, 2, 3)}, r"odd KH and KW, not \[5, 4, 3, 2, 3\]"),
        ({"weight": torch.ones(5, 8, 3, 3, 3)}, r"with C = 8, all alike, not \[1, 2, 3, 4\]"),
        ({"bias": torch.ones(4)}, r"bias must be \[O\] = \[5\], not \[4\]"),
        ({"gamma": torch.ones(1)}, r"gamma must be \[O\] = \[5\], not \[1\]"),
        ({"residual": torch.ones(1, 2, 3, 4)}, r"residual must be \[1, 2, 3, 5\], not \[1, 2, 3, 4\]"),
        ({"bias": torch.ones(5).double()}, r"one dtype, not torch.float32 and torch.float64"),
        ({"backend": "triton"}, r"'triton' is not available for cpu, only conv2d, conv3d, ref$"),
        ({"backend": "cudnn"}, r"there is no backend 'cudnn'; give one of triton, conv2d, conv3d, ref"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    args = {"frames": 3, "weight": torch.ones(5, 4, 3, 3, 3), "bias": torch.ones(5), "residual": None} | change
    with pytest.raises(ValueError, match=message):
        ops.causal_conv3d([torch.ones(1, 2, 3, 4)] * args.pop("frames"), **args)


# Triton's interpreter has no products of bfloat16; the test on a GPU below has.
@on_each_kernel
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float16) for case in CASES), (CASES[0], torch.float32)], ids=str
)
def test_twice_rule(case, dtype, device, backend, poisoned_memory):
    args = inputs(*case, dtype, device)
    actual = ops.causal_conv3d(*args, backend=backend)
    assert_within_twice(actual, causal_conv3d_ref(*args, math_dtype=dtype), convolved(*args))
    assert torch.equal(actual, ops.causal_conv3d(*args, backend=backend))


@on_each_kernel
def test_layouts_are_free(device, backend):
    frames, weight, bias, residual, _ = inputs((2, 3, 4, 32), (16, 3, 3, 3), 3, True, torch.float32, device)
    expected = ops.causal_conv3d(frames, weight, bias, residual, backend=backend)
    last = weight.contiguous(memory_format=torch.channels_last_3d)
    # Frames that are views, that start at odd places, and that lie in the wrong order.
    wide = torch.cat([frames[0], frames[2]], dim=-1)
    odd = torch.cat([frames[1].new_full((3,), torch.nan), frames[1].flatten()])[3:].view_as(frames[1])
    views = [wide[..., :32], odd, wide[..., 32:]]
    assert torch.equal(ops.causal_conv3d(views, last, bias, residual, backend=backend), expected)
    together = torch.stack(frames[::-1]).flip(0)
    assert torch.equal(ops.causal_conv3d(list(together), weight, bias, residual, backend=backend), expected)


@on_each_kernel
@pytest.mark.parametrize("chosen", ["triton", "conv2d", "conv3d"])
def test_vectors_of_any_stride(device, backend, chosen):
    frames, weight, bias, residual, gamma = inputs((1, 3, 4, 16), (20, 1, 3, 3), 1, True, torch.float32, device)

    def spread(vector: Tensor) -> Tensor:
        return torch.stack([vector, torch.full_like(vector, torch.nan)], dim=1)[:, 0]

    for vectors in ((spread(bias), spread(gamma)), (bias[:1].expand(20), gamma[:1].expand(20))):
        args = frames, weight, vectors[0], residual, vectors[1]
        assert rel_l2(ops.causal_conv3d(*args, backend=chosen), convolved(*args)) < 1e-3


@on_each_kernel
@pytest.mark.parametrize("offsets", [(0, 16, 8), (8, 8, 8), (1, 2, 3)], ids=str)
def test_frames_at_any_address(offsets, device, backend):
    frames, *others = inputs((1, 3, 4, 16), (16, 3, 3, 3), 3, True, torch.float32, device)

    def moved(frame: Tensor, offset: int) -> Tensor:
        return torch.cat([frame.new_full((offset,), torch.nan), frame.flatten()])[offset:].view_as(frame)

    args = [*map(moved, frames, offsets)], *others
    assert rel_l2(ops.causal_conv3d(*args, backend=backend), convolved(*args)) < 1e-6


@on_each_kernel
def test_kernels_under_autocast(device, backend):
    args = inputs(*CASES[0], torch.float32, device)
    for chosen in (backend, "conv2d"):
        expected = ops.causal_conv3d(*args, backend=chosen)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.equal(ops.causal_conv3d(*args, backend=chosen), expected)


@on_each_kernel
def test_registered_and_compiled(device, backend):
    frames, weight, bias, residual, gamma = inputs((1, 3, 4, 16), (16, 3, 3, 3), 2, True, torch.float32, device)
    operator = torch.ops.skyreels_fast.causal_conv3d.default
    torch.library.opcheck(operator, (frames, weight, bias, residual, gamma))
    torch.library.opcheck(operator, (frames, weight, None, None, None), test_utils=("test_schema", "test_faketensor"))

    def function(a: Tensor, b: Tensor) -> Tensor:
        return ops.causal_conv3d([a, b], weight, bias, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*frames), function(*frames))


@on_each_kernel
def test_what_the_kernel_does_not_take_is_named_and_left_to_torch(device, backend, monkeypatch):
    monkeypatch.setitem(DEFAULT, device, backend)
    for args in (
        inputs((1, 3, 4, 9), (16, 3, 3, 3), 2, False, torch.float16, device),
        inputs((1, 3, 4, 16), (16, 4, 3, 3), 2, False, torch.float16, device),
        inputs((1, 3, 4, 16), (16, 1, 5, 7), 1, False, torch.float16, device),
        inputs((1, 3, 4, 16), (16, 3, 3, 11), 2, False, torch.float16, device),
        inputs((1, 3, 4, 16), (16, 3, 3, 3), 2, False, torch.float64, device),
    ):
        message = r"takes float32, .* C in multiples of 16, KT up to 3 and KH \* KW up to 32, not .*; use 'conv2d'$"
        with pytest.raises(ValueError, match=message):
            ops.causal_conv3d(*args, backend=backend)
        assert rel_l2(ops.causal_conv3d(*args), convolved(*args)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "conv2d", "conv3d"])
@pytest.mark.parametrize("widths", [(3, 96), (96, 96), (96, 192), (192, 384), (384, 384), (384, 32)], ids=str)
def test_the_published_widths_on_a_gpu(widths, backend):
    """In bfloat16, on enough pixels for the large blocks."""
    if backend == "triton" and widths[0] % 16:
        pytest.skip("not a width of the kernel")
    case = ((1, 130, 150, widths[0]), (widths[1], 3, 3, 3), 3, True)
    args = inputs(*case, torch.bfloat16, "cuda")
    actual = ops.causal_conv3d(*args, backend=backend)
    assert actual.dtype == torch.bfloat16
    assert rel_l2(actual, convolved(*args)) < 6e-3


@pytest.mark.skipif(_dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the tests above run Triton's interpreter")
def test_triton_kernel_in_the_interpreter():
    run_in_interpreter(__file__)
