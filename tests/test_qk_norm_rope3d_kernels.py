"""The kernels of qk_norm and qk_norm_rope3d, on every backend that this machine has, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernels import assert_within_twice, machine_kernels, run_in_interpreter
from torch import Tensor

from skyreels_fast.ops import _dispatch, _qk_norm_rope3d_operators, qk_norm, qk_norm_rope3d, qk_norm_rope3d_
from skyreels_fast.ops.qk_norm_rope3d import qk_norm_ref, qk_norm_rope3d_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_each_kernel = pytest.mark.parametrize(("device", "backend"), machine_kernels())


@dataclass(frozen=True)
class Size:
    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    batch: int = 1
    token_range: tuple[int, int] | None = None
    frame_offset: int = 0

    @property
    def tokens(self) -> int:
        start, stop = self.token_range or (0, self.grid[1] * self.grid[2])
        return self.grid[0] * (stop - start)

    @property
    def places(self) -> dict:
        return {"grid": self.grid, "token_range": self.token_range, "frame_offset": self.frame_offset}


SIZES = {
    "128": Size((2, 2, 3), 2, 128),
    "64, one frame, a batch": Size((1, 2, 2), 3, 64, batch=2, frame_offset=5),
    "96, a shard": Size((3, 1, 3), 4, 96, token_range=(1, 3)),
    "20, a shard, later frames": Size((2, 3, 3), 3, 20, batch=2, token_range=(2, 5), frame_offset=7),
    "as 1.3B": Size((1, 1, 2), 12, 128, frame_offset=1000),
    "as 14B": Size((1, 2, 1), 40, 128),
    "the largest": Size((1, 1, 1), 16, 512),
    "the smallest": Size((1, 1, 2), 1, 2),
}
on_each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def draw(size: Size, dtype: torch.dtype, device: str, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    """q, k as views of one [B, L, 3, N, Dh] whose v is NaN, and their weights; drawn on the CPU."""
    generator = torch.Generator().manual_seed(size.head_dim)
    shape = (size.batch, size.tokens, 3, size.heads, size.head_dim)
    qkv = 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    qkv[:, :, 2] = torch.nan
    weights = torch.rand(2, size.heads * size.head_dim, generator=generator, dtype=torch.float64) + 0.5
    q, k, _ = qkv.to(dtype).to(device).unbind(2)
    return [q, k, *weights.to(weight_dtype or dtype).to(device)]


@on_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_each_size
def test_twice_rule(size, dtype, device, backend, poisoned_memory):
    args = draw(size, dtype, device)
    actual = qk_norm_rope3d(*args, **size.places, backend=backend)
    low = qk_norm_rope3d_ref(*args, **size.places, math_dtype=dtype)
    exact = qk_norm_rope3d_ref(*(tensor.double() for tensor in args), **size.places, math_dtype=torch.float64)
    for x, rough, right in zip(actual, low, exact, strict=True):
        assert x.dtype == dtype and x.is_contiguous()
        assert_within_twice(x.flatten(2), rough.flatten(2), right.flatten(2))
    assert all(map(torch.equal, actual, qk_norm_rope3d(*args, **size.places, backend=backend)))


@on_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_each_size
def test_norm_twice_rule(size, dtype, device, backend, poisoned_memory):
    _, x, _, weight = draw(size, dtype, device)
    actual = qk_norm(x, weight, backend=backend)
    assert actual.dtype == dtype and actual.is_contiguous()
    low = qk_norm_ref(x, weight, math_dtype=dtype)
    exact = qk_norm_ref(x.double(), weight.double(), math_dtype=torch.float64)
    assert_within_twice(actual.flatten(2), low.flatten(2), exact.flatten(2))
    assert torch.equal(actual, qk_norm(x, weight, backend=backend))


@on_each_kernel
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
def test_weights_of_another_dtype(weight_dtype, device, backend):
    size = SIZES["96, a shard"]
    args = draw(size, torch.bfloat16, device, weight_dtype)
    exact = qk_norm_rope3d_ref(*(tensor.double() for tensor in args), **size.places, math_dtype=torch.float64)
    low = qk_norm_rope3d_ref(*args, **size.places, math_dtype=torch.bfloat16)
    actual = qk_norm_rope3d(*args, **size.places, backend=backend)
    mixed = qk_norm_rope3d(*args[:3], args[3].float(), **size.places, backend=backend)
    for x, y, rough, right in zip(actual, mixed, low, exact, strict=True):
        assert_within_twice(x.flatten(2), rough.flatten(2), right.flatten(2))
        torch.testing.assert_close(x, y)


@on_each_kernel
@pytest.mark.parametrize("frame_offset", [1000, 100_000])
def test_positions_far_out(frame_offset, device, backend):
    """In float32 the angles themselves would be off by 1e-5 at frame 1000."""
    size = replace(SIZES["128"], frame_offset=frame_offset)
    args = draw(size, torch.float32, device)
    exact = qk_norm_rope3d_ref(*(tensor.double() for tensor in args), **size.places, math_dtype=torch.float64)
    for x, right in zip(qk_norm_rope3d(*args, **size.places, backend=backend), exact, strict=True):
        assert ((x - right).abs().amax() / right.abs().amax()).item() < 1e-6


@on_each_kernel
def test_eps_and_theta(device, backend):
    size = SIZES["64, one frame, a batch"]
    args, given = draw(size, torch.float32, device), {"eps": 0.5, "theta": 300.0, **size.places}
    exact = qk_norm_rope3d_ref(*(tensor.double() for tensor in args), **given, math_dtype=torch.float64)
    for x, right in zip(qk_norm_rope3d(*args, **given, backend=backend), exact, strict=True):
        torch.testing.assert_close(x.double(), right, rtol=1e-5, atol=1e-6)
    x, weight = args[0] * 1e-3, args[2]
    right = qk_norm_ref(x.double(), weight.double(), eps=0.5, math_dtype=torch.float64)
    torch.testing.assert_close(qk_norm(x, weight, eps=0.5, backend=backend).double(), right, rtol=1e-5, atol=1e-6)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x [B, L, N, Dh] with other strides; what lies between its elements is NaN."""
    batch, tokens, heads, head_dim = x.shape

    def inside(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)

    views = {
        "heads first": inside(batch, heads, tokens, head_dim).transpose(1, 2),
        "q, k, v by head": inside(batch, tokens, heads, 3, head_dim)[:, :, :, 1],
        "part of the heads": inside(batch, tokens, heads + 1, head_dim)[:, :, 1:],
        "off a vector's boundary": inside(batch * tokens * heads * head_dim + 1)[1:].view(x.shape),
        "odd strides": inside(batch, tokens, heads, head_dim + 1)[..., 1:],
        "every other channel": inside(batch, tokens, heads, 2 * head_dim)[..., ::2],
        "batch last": inside(tokens, heads, head_dim, batch).permute(3, 0, 1, 2),
    }
    for view in views.values():
        view.copy_(x)
    return views


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "every other channel"])
@pytest.mark.parametrize(("device", "backend"), [pytest.param("cpu", "ref", id="cpu-ref"), *machine_kernels()])
def test_in_place_is_the_same(layout, device, backend):
    size = Size((2, 2, 3), 3, 32, batch=2)
    q, k, *weights = draw(size, torch.bfloat16, device)
    expected = qk_norm_rope3d(q, k, *weights, **size.places, backend=backend)
    if layout != "contiguous":
        q, k = layouts(q)[layout], layouts(k)[layout]
    outs = qk_norm_rope3d_(q, k, *weights, **size.places, backend=backend)
    assert outs[0] is q and outs[1] is k
    assert all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True))


@on_each_kernel
@pytest.mark.parametrize(
    "layout", ["fused", "heads first", "q, k, v by head", "off a vector's boundary", "odd strides"]
)
def test_in_place_takes_no_memory_and_touches_nothing_else(layout, device, backend, monkeypatch):
    size = Size((2, 2, 3), 3, 32, batch=2)
    q, k, *weights = draw(size, torch.bfloat16, device)
    expected = qk_norm_rope3d(q, k, *weights, **size.places, backend=backend)
    if layout != "fused":
        q, k = layouts(q)[layout], layouts(k)[layout]
    monkeypatch.setattr(_qk_norm_rope3d_operators, "_like", lambda x: pytest.fail(f"room for {list(x.shape)}"))
    outs = qk_norm_rope3d_(q, k, *weights, **size.places, backend=backend)
    assert all(map(torch.equal, outs, expected))
    memory = {x._base.data_ptr(): x._base for x in (q, k)}.values()
    assert sum(int(each.isfinite().sum()) for each in memory) == q.numel() + k.numel()


@on_each_kernel
@pytest.mark.parametrize("apart", [(0, 1), (1, 0)], ids=["k above", "k below"])
def test_in_place_where_q_and_k_share_heads(apart, device, backend):
    """Both are read before either is written: the one that is written last is right as a whole."""
    size = Size((3, 2, 2), 2, 32)
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(1, size.tokens, 3, 32, generator=generator).to(device)
    q, k = (heads[:, :, first : first + 2] for first in apart)
    weights = [torch.ones(64, device=device)] * 2
    _, expected = qk_norm_rope3d(q.clone(), k.clone(), *weights, size.grid, backend=backend)
    _, actual = qk_norm_rope3d_(q, k, *weights, size.grid, backend=backend)
    assert torch.equal(actual, expected)


@on_each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_alignment_are_free(dtype, device, backend):
    size = Size((2, 1, 1), 3, 32, batch=2)
    q, k, q_weight, k_weight = draw(size, dtype, device)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    expected = qk_norm_rope3d(q.contiguous(), k.contiguous(), q_weight, k_weight, size.grid, backend=backend)
    plain = qk_norm(q.contiguous(), q_weight, backend=backend)
    for (label, a), b in zip(layouts(q).items(), reversed(layouts(k).values()), strict=True):
        for actual, right in zip(
            qk_norm_rope3d(a, b, q_weight, k_weight, size.grid, backend=backend), expected, strict=True
        ):
            torch.testing.assert_close(actual, right, msg=label, **close)
        torch.testing.assert_close(qk_norm(a, q_weight, backend=backend), plain, msg=label, **close)


@on_each_kernel
def test_expanded_inputs_and_weights(device, backend):
    size = Size((1, 2, 2), 2, 64)
    q, k, q_weight, _ = draw(size, torch.float32, device)
    whole = qk_norm_rope3d(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), q_weight[:1].expand(128),
                           q_weight[:1].expand(128), size.grid, backend=backend)  # fmt: skip
    one = qk_norm_rope3d(q, k, *q_weight[:1].expand(2, 128).contiguous(), size.grid, backend=backend)
    assert all(torch.equal(a, b.expand_as(a)) for a, b in zip(whole, one, strict=True))


@on_each_kernel
def test_shards_are_parts_of_the_whole(device, backend):
    size = Size((2, 2, 3), 2, 32)
    q, k, *weights = draw(size, torch.float32, device)
    whole = qk_norm_rope3d(q, k, *weights, size.grid, backend=backend)
    for start, stop in ((0, 2), (2, 6)):
        part = [x.unflatten(1, (2, 6))[:, :, start:stop] for x in (q, k, *whole)]
        a, b, *expected = (x.flatten(1, 2) for x in part)
        shard = qk_norm_rope3d(a, b, *weights, size.grid, token_range=(start, stop), backend=backend)
        assert all(map(torch.equal, shard, expected))


@on_each_kernel
def test_no_tokens(device, backend):
    q, k, *weights = draw(SIZES["128"], torch.float32, device)
    a, b = qk_norm_rope3d(q[:0], k[:0], *weights, SIZES["128"].grid, backend=backend)
    assert a.shape == b.shape == qk_norm(q[:0], weights[0], backend=backend).shape == (0, 12, 2, 128)


@on_each_kernel
def test_zeros_and_infinities(device, backend):
    q, k, *weights = (x.clone() for x in draw(SIZES["128"], torch.float32, device))
    q[:, 3], k[:, 5, 0, 7] = 0, torch.inf
    a, b = qk_norm_rope3d(q, k, *weights, SIZES["128"].grid, backend=backend)
    assert a.isfinite().all() and not a[:, 3].any()
    assert b[:, 5].isnan().any() and b[:, 6:].isfinite().all()


@on_each_kernel
def test_compiled_without_a_break(device, backend):
    size = SIZES["20, a shard, later frames"]
    args = draw(size, torch.float32, device)

    def block(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        crossed = qk_norm(q + 1, q_weight, backend=backend)
        return *qk_norm_rope3d(q, k, q_weight, k_weight, **size.places, backend=backend), crossed

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*args), block(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@on_each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_operators(dtype, device, backend):
    size = Size((1, 1, 2), 2, 24, batch=2, frame_offset=3)
    q, k, *weights = draw(size, dtype, device)
    operators = torch.ops.skyreels_fast
    torch.library.opcheck(operators.qk_norm.default, (q, weights[0], 1e-6, backend))
    args = (q, k, *weights, size.grid, (0, 2), size.frame_offset, 1e4, 1e-6, backend)
    torch.library.opcheck(operators.qk_norm_rope3d.default, args)
    torch.library.opcheck(operators.qk_norm_rope3d_.default, args)


@on_each_kernel
def test_kernels_refuse_what_they_do_not_take(device, backend):
    x = torch.zeros(1, 4, 2, 8, device=device)
    for wrong in (x.double(), x[..., :7], x[:, :, :1].expand(-1, -1, 1025, -1), x[..., :1].expand(-1, -1, -1, 514)):
        weight = torch.zeros(wrong.shape[2] * wrong.shape[3], device=device)
        with pytest.raises(ValueError, match=rf"'{backend}' takes .* not {wrong.dtype} \[.*{wrong.shape[3]}\]"):
            qk_norm(wrong, weight, backend=backend)
        assert qk_norm(wrong, weight).shape == wrong.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_by_default(device):
    args = draw(SIZES["128"], torch.float32, device)
    args = [x.clone().requires_grad_() for x in args]
    q, k = qk_norm_rope3d(*args, SIZES["128"].grid)
    (q.sum() + k.sum() + qk_norm(args[0], args[2]).sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in args)


def test_wrong_places_and_backends_are_named():
    x, weight = torch.zeros(1, 4, 2, 8), torch.zeros(16)
    with pytest.raises(ValueError, match=r"qk_norm: backend 'cuda' is not available for cpu, only ref"):
        qk_norm(x, weight, backend="cuda")
    with pytest.raises(ValueError, match=r"qk_norm: x \(cpu\) and weight \(meta\)"):
        qk_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"qk_norm_rope3d: q \(cpu\) and k \(meta\)"):
        qk_norm_rope3d(x, x.to("meta"), weight, weight.to("meta"), (1, 2, 2))


@pytest.mark.skipif(_dispatch.extension is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head_dim": 7}, "heads of 7 channels"),
        ({"head_dim": 514}, "heads of 514 channels"),
        ({"heads": 1025}, "1025 heads of 8 channels"),
        ({"tokens": 5}, "the tokens are not those of the grid"),
        ({"grid": (1, 0, 4)}, "the grid is empty or too large"),
        ({"token_range": (3, 1)}, "the token range"),
        ({"dtype": 9}, "dtype code 9"),
        ({"weight_dtype": 1}, "weights are neither"),
        ({"q": 0}, "q is null"),
        ({"k_weight": 18}, "k_weight is not aligned"),
        ({"table": 20}, "table is not aligned"),
        ({"head_stride": 2**31}, "the heads of q are too far apart"),
        ({"out_head_stride": 2**31}, "the heads of q are too far apart"),
    ],
)
def test_extension_checks_its_arguments(given, message):
    """Before anything touches the device."""
    names = ("q_out", "k_out", "q", "k", "q_weight", "k_weight", "table")
    addresses = [given.get(name, 16) for name in names]
    heads, head_dim = given.get("heads", 2), given.get("head_dim", 8)
    strides, out_strides = (
        (0, heads * head_dim, given.get(name, head_dim)) for name in ("head_stride", "out_head_stride")
    )
    layout = ((1, given.get("tokens", 4), heads, head_dim), *[out_strides] * 2, *[strides] * 2)
    places = (given.get("grid", (1, 2, 2)), given.get("token_range", (0, 4)))
    with pytest.raises(ValueError, match=f"qk_norm_rope3d: .*{message}"):
        _dispatch.extension.qk_norm_rope3d(
            *addresses, *layout, *places, 1e-6, given.get("dtype", 0), given.get("weight_dtype", 0), 0
        )


@pytest.mark.skipif(_dispatch.triton is None, reason="Triton is not installed")
@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the tests above run Triton's interpreter")
def test_triton_kernels_in_the_interpreter():
    run_in_interpreter(__file__)
