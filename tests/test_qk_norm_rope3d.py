"""RMSNorm over heads and 3D rotary positions, against a golden file and complex arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import load_golden, rel_l2
from torch import Tensor
from torch._subclasses import FakeTensorMode

from skyreels_fast import ops
from skyreels_fast.ops.qk_norm_rope3d import qk_norm_cost, qk_norm_ref, qk_norm_rope3d_cost, qk_norm_rope3d_ref

# batch, grid, heads, head size: usual, one frame, odd grid with uneven thirds
SIZES = [(2, (3, 4, 5), 2, 128), (1, (1, 3, 2), 3, 64), (2, (5, 1, 3), 1, 20), (1, (2, 2, 2), 2, 4)]
Size = tuple[int, tuple[int, int, int], int, int]


def draw(size: Size, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, (f, h, w), heads, head_dim = size
    generator = torch.Generator().manual_seed(f * h * w * head_dim)
    q, k = torch.randn(2, batch, f * h * w, heads, head_dim, generator=generator).to(dtype) * 2
    q_weight, k_weight = torch.rand(2, heads * head_dim, generator=generator) + 0.5
    return q, k, q_weight, k_weight


def expected_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    flat = x.double().flatten(2)
    return (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).view(x.shape)


def expected_rope(x: Tensor, grid: tuple[int, int, int], frame_offset: int = 0) -> Tensor:
    """One token and one pair at a time."""
    pairs = x.shape[-1] // 2
    third = x.shape[-1] // 6
    numbers = torch.view_as_complex(x.double().unflatten(-1, (pairs, 2)).contiguous())
    angles = torch.empty(x.shape[1], pairs, dtype=torch.float64)
    for token in range(x.shape[1]):
        frame, place = divmod(token, grid[1] * grid[2])
        row, column = divmod(place, grid[2])
        parts = ((frame + frame_offset, pairs - 2 * third), (row, third), (column, third))
        turned = [position / 10000 ** (i / count) for position, count in parts for i in range(count)]
        angles[token] = torch.tensor(turned, dtype=torch.float64)
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(numbers).flatten(-2)


def test_golden_rotation() -> None:
    """The norm with a weight of one scales a token as a whole, so it comes out of the rotation again."""
    golden = load_golden("components")
    x = golden["rope.in"]
    ones = torch.ones(x.shape[2] * x.shape[3])
    size = (x.square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt()
    for out in ops.qk_norm_rope3d(x, x, ones, ones, (3, 4, 5)):
        assert rel_l2(out * size, golden["rope.out"]) < 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frame_offset", [0, 7])
def test_is_its_formula(size: Size, frame_offset: int) -> None:
    q, k, q_weight, k_weight = draw(size)
    out = ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1], frame_offset=frame_offset)
    for actual, x, weight in zip(out, (q, k), (q_weight, k_weight), strict=True):
        expected = expected_rope(expected_norm(x, weight), size[1], frame_offset)
        assert actual.dtype == torch.float32
        assert rel_l2(actual, expected) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_norm_alone(size: Size) -> None:
    q, _, weight, _ = draw(size)
    assert rel_l2(ops.qk_norm(q, weight), expected_norm(q, weight)) < 1e-6
    assert rel_l2(ops.qk_norm(q, weight, eps=0.5), expected_norm(q, weight, eps=0.5)) < 1e-6


def test_positions_far_out_keep_float64_angles() -> None:
    """At frame 100000 a float32 angle would be off by thousandths."""
    size = (1, (2, 2, 3), 1, 24)
    q, k, q_weight, k_weight = draw(size)
    out, _ = ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1], frame_offset=100_000)
    assert rel_l2(out, expected_rope(expected_norm(q, q_weight), size[1], 100_000)) < 1e-6


def test_scores_depend_on_distance_alone() -> None:
    size = (1, (4, 3, 3), 1, 48)
    q, k, q_weight, k_weight = draw(size)
    scores = []
    for offset in (0, 13):
        a, b = ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1], frame_offset=offset)
        scores.append(torch.einsum("bqnd,bknd->bnqk", a, b))
    assert rel_l2(scores[1], scores[0]) < 1e-5


def test_views_of_a_fused_projection() -> None:
    size = SIZES[0]
    q, k, q_weight, k_weight = draw(size)
    fused = torch.full((*q.shape[:2], 3, *q.shape[2:]), torch.nan)
    fused[:, :, 0], fused[:, :, 1] = q, k
    a, b, _ = fused.unbind(2)
    assert not a.is_contiguous()
    strided = ops.qk_norm_rope3d(a, b, q_weight, k_weight, size[1])
    plain = ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1])
    assert all(torch.equal(x, y) for x, y in zip(strided, plain, strict=True))


@pytest.mark.parametrize("share", [lambda x: x, lambda x: x.detach(), lambda x: x[:]], ids=["same", "detached", "view"])
def test_in_place_refuses_q_and_k_in_one_memory(share: Callable[[Tensor], Tensor]) -> None:
    q, _, q_weight, k_weight = draw(SIZES[0])
    with pytest.raises(ValueError, match="^qk_norm_rope3d_: q and k share memory$"):
        ops.qk_norm_rope3d_(q, share(q), q_weight, k_weight, SIZES[0][1])
    ops.qk_norm_rope3d(q, share(q), q_weight, k_weight, SIZES[0][1])


def test_in_place_refuses_what_cannot_be_written_over() -> None:
    (q, k, *weights), grid = draw(SIZES[0]), SIZES[0][1]
    with pytest.raises(ValueError, match="^qk_norm_rope3d_: k is expanded, elements of it are one in memory; use qk_"):
        ops.qk_norm_rope3d_(q, k[:, :, :1].expand_as(q), *weights, grid)
    weights[0].requires_grad_()
    with pytest.raises(ValueError, match="^qk_norm_rope3d_: has no gradient; use qk_norm_rope3d, or torch.no_grad"):
        ops.qk_norm_rope3d_(q, k, *weights, grid)
    with torch.no_grad():
        ops.qk_norm_rope3d_(q, k, *weights, grid)


def test_in_place_on_views_of_a_fused_projection() -> None:
    q, k, q_weight, k_weight = draw(SIZES[0])
    a, b = torch.stack((q, k), dim=2).unbind(2)
    expected = ops.qk_norm_rope3d(q, k, q_weight, k_weight, SIZES[0][1])
    assert all(map(torch.equal, ops.qk_norm_rope3d_(a, b, q_weight, k_weight, SIZES[0][1]), expected))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("error:Accessing the data pointer")
def test_in_place_without_addresses() -> None:
    """Compiled, on the meta device, on fake tensors and within vmap q and k cannot be told apart, nor are refused."""
    size = (1, (1, 2, 3), 2, 8)
    (q, k, *weights), grid = draw(size), size[1]
    expected = ops.qk_norm_rope3d(q, k, *weights, grid)
    compiled = torch.compile(ops.qk_norm_rope3d_, fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(q.clone(), k.clone(), *weights, grid), expected))
    ops.qk_norm_rope3d_(*(x.to("meta") for x in (q, k, *weights)), grid)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ops.qk_norm_rope3d_(*map(mode.from_tensor, (q, k, *weights)), grid)
    outs = torch.vmap(lambda q, k: ops.qk_norm_rope3d_(q, k, *weights, grid))(q[None].clone(), k[None].clone())
    assert all(torch.equal(out[0], right) for out, right in zip(outs, expected, strict=True))


def test_shards_are_parts_of_the_whole() -> None:
    size = (2, (3, 2, 5), 2, 32)
    q, k, q_weight, k_weight = draw(size)
    whole, _ = ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1])
    shards = []
    for start, stop in ((0, 4), (4, 10)):
        a, b = (x.unflatten(1, (3, 10))[:, :, start:stop].flatten(1, 2) for x in (q, k))
        out, _ = ops.qk_norm_rope3d(a, b, q_weight, k_weight, size[1], token_range=(start, stop))
        shards.append(out.unflatten(1, (3, -1)))
    assert torch.equal(torch.cat(shards, dim=2).flatten(1, 2), whole)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_error_is_a_rounding(size: Size) -> None:
    """Per token, against float64 on the same input: at most twice the error of the reference run in bfloat16."""
    q, k, q_weight, k_weight = draw(size, torch.bfloat16)
    actual, _ = ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1])
    low, _ = qk_norm_rope3d_ref(q, k, q_weight, k_weight, size[1], math_dtype=torch.bfloat16)
    exact = expected_rope(expected_norm(q, q_weight), size[1])
    norm_exact = expected_norm(q, q_weight)
    norm_low = qk_norm_ref(q, q_weight, math_dtype=torch.bfloat16)
    for a, b, e in ((actual, low, exact), (ops.qk_norm(q, q_weight), norm_low, norm_exact)):
        assert a.dtype == torch.bfloat16
        slack = e.abs().amax((-2, -1)) * 2**-8
        assert bool(((a - e).abs().amax((-2, -1)) <= 2 * (b - e).abs().amax((-2, -1)) + slack).all())


def test_gradients_after_inference() -> None:
    """Angles first made in inference mode serve autograd too."""
    size = (1, (2, 2, 1), 1, 12)
    q, k, q_weight, k_weight = (x.double() for x in draw(size))
    with torch.inference_mode():
        ops.qk_norm_rope3d(q, k, q_weight, k_weight, size[1])
    args = [x.requires_grad_() for x in (q, k, q_weight, k_weight)]
    assert torch.autograd.gradcheck(lambda *t: ops.qk_norm_rope3d(*t, size[1]), args)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_whole() -> None:
    args = (*draw(SIZES[1]), SIZES[1][1])
    compiled = torch.compile(ops.qk_norm_rope3d, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*args), ops.qk_norm_rope3d(*args), strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_for_many_grids(grad: bool) -> None:
    compiled = torch.compile(ops.qk_norm_rope3d, fullgraph=True, backend="aot_eager", dynamic=True)
    for frames, start in ((2, 0), (3, 7), (5, 1)):
        size = (1, (frames, 2, 3), 2, 8)
        (q, *others), places = draw(size), {"frame_offset": start, "token_range": (1, 5)}
        kept = [x.unflatten(1, size[1][:1] + (6,))[:, :, 1:5].flatten(1, 2) for x in (q, others[0])]
        kept[0].requires_grad_(grad)
        outs = compiled(*kept, *others[1:], size[1], **places)
        expected = ops.qk_norm_rope3d(*kept, *others[1:], size[1], **places)
        assert all(map(torch.allclose, outs, expected))
        if grad:
            grads = [torch.autograd.grad(both[0].square().sum(), kept[0])[0] for both in (outs, expected)]
            assert torch.allclose(*grads)


def test_errors_name_the_values() -> None:
    q, weight = torch.zeros(1, 12, 2, 8), torch.zeros(16)
    with pytest.raises(ValueError, match=r"backend 'nope'.*ref"):
        ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 2), backend="nope")
    with pytest.raises(ValueError, match=r"backend 'nope'.*ref"):
        ops.qk_norm(q, weight, backend="nope")
    with pytest.raises(ValueError, match=r"12 tokens are not grid \(3, 2, 3\), 18 tokens"):
        ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 3))
    with pytest.raises(ValueError, match=r"grid must be .* not \(0, 2, 3\)"):
        ops.qk_norm_rope3d(q, q, weight, weight, (0, 2, 3))
    for grid in ((3.0, 2, 2), 12, (3, 4), "321"):
        with pytest.raises(ValueError, match=r"grid must be \(f, h, w\), 3 integers, not "):
            ops.qk_norm_rope3d(q, q, weight, weight, grid)
    for tokens in ((0,), (0, 1.0), (0, 2, 4), 4):
        with pytest.raises(ValueError, match=r"token_range must be \(start, stop\), 2 integers, not "):
            ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 2), token_range=tokens)
    for offset in (1.5, None):
        with pytest.raises(ValueError, match="frame_offset must be an integer, not "):
            ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 2), frame_offset=offset)
    for theta in (None, 0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="theta must be a positive number, not "):
            ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 2), theta=theta)
    lists = ops.qk_norm_rope3d(q, q, weight, weight, [3, 2, 2], token_range=[0, 4])
    assert all(map(torch.equal, lists, ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 2))))
    with pytest.raises(ValueError, match=r"token_range \(2, 7\) is not within a frame's 4 tokens"):
        ops.qk_norm_rope3d(q, q, weight, weight, (3, 2, 2), token_range=(2, 7))
    with pytest.raises(ValueError, match=r"the weight of k must be \[N \* Dh\] = \[16\], not \[8\]"):
        ops.qk_norm_rope3d(q, q, weight, weight[:8], (3, 2, 2))
    with pytest.raises(ValueError, match=r"q must be \[B, L, N, Dh\], not \[12, 2, 8\]"):
        ops.qk_norm_rope3d(q[0], q, weight, weight, (3, 2, 2))
    with pytest.raises(ValueError, match=r"q \[1, 12, 2, 8\].*k \[1, 11, 2, 8\]"):
        ops.qk_norm_rope3d(q, q[:, :11], weight, weight, (3, 2, 2))
    with pytest.raises(ValueError, match="a head of 7 channels"):
        ops.qk_norm_rope3d(q[..., :7], q[..., :7], weight[:14], weight[:14], (3, 2, 2))


def test_costs_count_every_byte_once() -> None:
    assert qk_norm_cost((2, 12, 2, 8))[0] == 384 * 2 * 2
    assert qk_norm_rope3d_cost((2, 12, 2, 8))[0] == 384 * 4 * 2


def test_compiled_around_angles_stay_a_constant_table() -> None:
    """Traced, their float64 powers and cosines would be computed for every element of every block."""
    q, k = torch.randn(2, 1, 24, 2, 64)
    weight = torch.ones(128)
    seen: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: list) -> Callable:
        seen.append(module)
        return module.forward

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rope3d(q, k, weight, weight, (2, 3, 4))

    compiled = torch.compile(rotate, backend=keep, fullgraph=True)
    expected = rotate(q, k)
    assert all(map(torch.equal, compiled(q, k), expected))
    called = {str(node.target) for node in seen[0].graph.nodes}
    assert not any(name in target for target in called for name in ("pow", "cos", "sin", "outer"))
