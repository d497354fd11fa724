"""Attention, dense and by causal blocks, against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import rel_l2
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.ops import _attention_backends
from skyreels_fast.ops.attention import attention_cost, attention_ref, attention_with_lse, choose_attention

BACKENDS = ("sdpa", "ref")
# batch, queries, keys, heads, head size
SIZES = [(2, 24, 24, 2, 64), (1, 7, 19, 3, 8), (1, 1, 33, 1, 20), (2, 13, 1, 5, 2)]
Size = tuple[int, int, int, int, int]


def draw(size: Size, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, head_dim = size
    generator = torch.Generator().manual_seed(sum(size))
    shapes = [(batch, tokens, heads, head_dim) for tokens in (queries, keys, keys)]
    q, k, v = ((torch.randn(shape, generator=generator) * 1.5).to(dtype) for shape in shapes)
    return q, k, v


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One head at a time, with a boolean mask [Lq, Lk] of what is seen."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = q[batch, :, head].double() @ k[batch, :, head].double().T / q.shape[3] ** 0.5
            if mask is not None:
                scores[~mask] = -torch.inf
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            out[batch, :, head] = weights / weights.sum(1, keepdim=True) @ v[batch, :, head].double()
    return out


def block_mask(tokens: int, block_tokens: int) -> Tensor:
    block = torch.arange(tokens) // block_tokens
    return block[None, :] <= block[:, None]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("size", SIZES)
def test_dense(size: Size, backend: str | None) -> None:
    q, k, v = draw(size)
    out = ops.attention(q, k, v, backend=backend)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert rel_l2(out, masked(q, k, v)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_tokens", [1, 4, 5, 24, 100])
def test_causal_blocks_are_the_mask(block_tokens: int, backend: str) -> None:
    """Blocks that divide the tokens, a short last one, one block, and one longer than all."""
    q, k, v = draw(SIZES[0])
    out = ops.attention(q, k, v, block_tokens=block_tokens, backend=backend)
    assert rel_l2(out, masked(q, k, v, block_mask(24, block_tokens))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [4, 6, 10, 12, 23])
def test_queries_may_be_the_last_of_the_keys(first: int, backend: str) -> None:
    """From a block's start, from within one, and in the last block alone."""
    q, k, v = draw(SIZES[0])
    whole = masked(q, k, v, block_mask(24, 6))
    assert rel_l2(ops.attention(q[:, first:], k, v, block_tokens=6, backend=backend), whole[:, first:]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_blocks_are_never_read(backend: str) -> None:
    q, k, v = draw(SIZES[0])
    expected = ops.attention(q, k, v, block_tokens=6, backend=backend)
    k[:, 12:], v[:, 12:] = torch.nan, torch.nan
    out = ops.attention(q, k, v, block_tokens=6, backend=backend)
    assert torch.equal(out[:, :12], expected[:, :12])
    assert bool(out[:, 12:].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_tokens", [None, 5])
def test_views_of_a_fused_projection(backend: str, block_tokens: int | None) -> None:
    q, k, v = draw(SIZES[0])
    views = torch.stack((q, k, v), dim=2).unbind(2)
    assert not views[0].is_contiguous()
    options = {"block_tokens": block_tokens, "backend": backend}
    assert rel_l2(ops.attention(*views, **options), ops.attention(q, k, v, **options)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_tokens", [None, 5])
def test_bfloat16_error_is_a_rounding(backend: str, block_tokens: int | None) -> None:
    """Per token, against float64 on the same input: at most twice the error of the reference run in bfloat16."""
    q, k, v = draw(SIZES[0], torch.bfloat16)
    out = ops.attention(q, k, v, block_tokens=block_tokens, backend=backend)
    low = attention_ref(q, k, v, block_tokens=block_tokens, math_dtype=torch.bfloat16)
    exact = masked(q, k, v, None if block_tokens is None else block_mask(24, block_tokens))
    slack = exact.abs().amax((-2, -1)) * 2**-8
    assert out.dtype == torch.bfloat16
    assert bool(((out - exact).abs().amax((-2, -1)) <= 2 * (low - exact).abs().amax((-2, -1)) + slack).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = draw(SIZES[1])
    out = ops.attention(q * 1e4, k, v, backend=backend)
    assert rel_l2(out, masked(q * 1e4, k, v)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_agree_with_the_mask(backend: str) -> None:
    leaves = [x.requires_grad_() for x in draw((1, 9, 9, 2, 6))]
    weight = torch.randn(1, 9, 2, 6, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((ops.attention(*leaves, block_tokens=4, backend=backend) * weight).sum(), leaves)
    seen = block_mask(9, 4)
    scores = torch.einsum("bqnd,bknd->bnqk", leaves[0], leaves[1]) * 6**-0.5
    dense = torch.einsum("bnqk,bknd->bqnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), leaves[2])
    theirs = torch.autograd.grad((dense * weight).sum(), leaves)
    assert all(rel_l2(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_compiles_whole() -> None:
    q, k, v = draw(SIZES[0])
    compiled = torch.compile(ops.attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v, block_tokens=5), ops.attention(q, k, v, block_tokens=5))


def test_errors_name_the_values() -> None:
    q = torch.zeros(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"backend 'nope'.*fa3, .*sdpa, ref"):
        ops.attention(q, q, q, backend="nope")
    with pytest.raises(ValueError, match="'fa3' is not available here: it needs a CUDA device, not cpu"):
        ops.attention(q, q, q, backend="fa3")
    with pytest.raises(ValueError, match=r"\[B, L, N, Dh\], not \[6, 2, 8\]"):
        ops.attention(q[0], q, q)
    with pytest.raises(ValueError, match=r"k \[1, 5, 2, 8\], v \[1, 6, 2, 8\]"):
        ops.attention(q, q[:, :5], q)
    with pytest.raises(ValueError, match=r"q \[1, 6, 1, 8\], k \[1, 6, 2, 8\]"):
        ops.attention(q[:, :, :1], q, q)
    with pytest.raises(ValueError, match=r"one dtype.*float32.*float16"):
        ops.attention(q, q, q.half())
    with pytest.raises(ValueError, match="at least 1, not 0"):
        ops.attention(q, q, q, block_tokens=0)
    for wrong in (2.5, "2"):
        with pytest.raises(ValueError, match=f"block_tokens must be an integer of at least 1, not {wrong!r}"):
            ops.attention(q, q, q, block_tokens=wrong)
    with pytest.raises(ValueError, match="not 5 for 6"):
        ops.attention(q, q[:, :5], q[:, :5], block_tokens=2)


def test_cost_counts_what_is_seen() -> None:
    dense = attention_cost((1, 20, 2, 8), 20)
    assert dense == (4 * 20 * 16 * 2, 4 * 400 * 16)
    blocks = attention_cost((1, 20, 2, 8), 20, block_tokens=4)
    assert blocks == (dense[0], 4 * int(block_mask(20, 4).sum()) * 16)
    assert attention_cost((1, 20, 2, 8), 20, block_tokens=7)[1] == 4 * int(block_mask(20, 7).sum()) * 16
    part = attention_cost((1, 9, 2, 8), 20, block_tokens=7)
    assert part[1] == 4 * int(block_mask(20, 7)[11:].sum()) * 16


def test_choice_is_checked_before_it_is_used() -> None:
    for name in (None, "sdpa"):
        assert choose_attention(name, "cpu", torch.bfloat16) == "sdpa"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="PyTorch finds no CUDA device here for 'cuda'"):
            choose_attention(None, "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="no backend 'flash3'; give one of fa3, fa4, fa2, cudnn, flash, sdpa"):
        choose_attention("flash3", "cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, *_attention_backends.NAMES])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("size", [(1, 1000, 1000), (2, 130, 77), (1, 1, 512)])
def test_gpu_backends(backend: str | None, head_dim: int, size: tuple[int, int, int]) -> None:
    """Views of a fused projection in bfloat16; causal where there are as many keys as queries."""
    if backend is not None and _attention_backends.missing(backend, torch.device("cuda")):
        pytest.skip(f"{backend}: {_attention_backends.missing(backend, torch.device('cuda'))}")
    batch, queries, keys = size
    generator = torch.Generator("cuda").manual_seed(head_dim)
    fused = torch.randn(batch, max(queries, keys), 3, 4, head_dim, generator=generator, device="cuda")
    q, k, v = fused.bfloat16().unbind(2)
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    for block_tokens in (None, 300) if queries == keys else (None,):
        out = ops.attention(q, k, v, block_tokens=block_tokens, backend=backend)
        low = attention_ref(q, k, v, block_tokens=block_tokens, math_dtype=torch.bfloat16).double()
        exact = attention_ref(q.double(), k.double(), v.double(), block_tokens=block_tokens, math_dtype=torch.float64)
        assert out.shape == q.shape and out.dtype == torch.bfloat16
        error, rough = (out.double() - exact).abs(), (low - exact).abs()
        slack = exact.abs().amax((-2, -1)) * 2**-8
        assert bool((error.amax((-2, -1)) <= 2 * rough.amax((-2, -1)) + slack).all())
        assert torch.equal(out, ops.attention(q, k, v, block_tokens=block_tokens, backend=backend))
    out, lse = attention_with_lse(q, k, v, backend=backend)
    scores = torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()) * head_dim**-0.5
    assert lse.dtype == torch.float32 and lse.shape == (batch, 4, queries)
    assert rel_l2(lse.cpu(), scores.logsumexp(-1).cpu()) < 1e-3
    assert rel_l2(out.cpu(), ops.attention(q, k, v, backend=backend).cpu()) < 2 * 2**-8


@pytest.mark.gpu
def test_gpu_falls_back_for_what_the_libraries_do_not_take() -> None:
    q, k, v = (x.cuda() for x in draw(SIZES[2]))
    assert rel_l2(ops.attention(q, k, v).cpu(), masked(q.cpu(), k.cpu(), v.cpu())) < 1e-5
    with pytest.raises(ValueError, match="takes float16 and bfloat16, not torch.float32; use 'sdpa'"):
        ops.attention(q, k, v, backend="cudnn")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_log_sum_exp(size: Size, backend: str) -> None:
    q, k, v = draw(size)
    out, lse = attention_with_lse(q, k, v, backend=backend)
    scores = torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()) / q.shape[3] ** 0.5
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert rel_l2(lse, scores.logsumexp(-1)) < 2e-6
    assert rel_l2(out, masked(q, k, v)) < 2e-6


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_log_sum_exp_of_no_keys(backend: str | None) -> None:
    q, none = torch.randn(1, 3, 2, 8), torch.randn(1, 0, 2, 8)
    out, lse = attention_with_lse(q, none, none, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((1, 2, 3), -torch.inf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_sum_exp_of_any_strides(dtype: torch.dtype, backend: str) -> None:
    plain = [x.to(dtype) for x in draw(SIZES[0])]
    expected = attention_with_lse(*plain, backend=backend)
    apart = [torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0] for x in plain]
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in plain]
    for others in (apart, turned):
        for i in range(3):
            out, lse = attention_with_lse(*plain[:i], others[i], *plain[i + 1 :], backend=backend)
            torch.testing.assert_close(out, expected[0])
            torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("empty", [(0, 3, 2), (1, 0, 2), (1, 3, 0)], ids=["batch", "queries", "heads"])
def test_log_sum_exp_of_nothing(empty: tuple[int, int, int], backend: str | None) -> None:
    batch, queries, heads = empty
    q, k = torch.randn(batch, queries, heads, 8), torch.randn(batch, 4, heads, 8)
    out, lse = attention_with_lse(q, k, k, backend=backend)
    assert out.shape == q.shape and lse.shape == (batch, heads, queries)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp_in_float64(backend: str) -> None:
    q, k, v = (x.double() for x in draw(SIZES[0]))
    out, lse = attention_with_lse(q, k, v, backend=backend)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / q.shape[3] ** 0.5
    assert out.dtype == lse.dtype == torch.float64
    assert rel_l2(lse, scores.logsumexp(-1)) < 1e-12
    assert rel_l2(out, attention_ref(q, k, v, math_dtype=torch.float64)) < 1e-12


def test_a_backend_with_a_log_sum_exp_has_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in draw(SIZES[0]))
    with pytest.raises(ValueError, match="^attention_with_lse: backend 'sdpa' has no gradient; use 'ref', or torch"):
        attention_with_lse(q, k, v, backend="sdpa")
    assert all(x.requires_grad for x in attention_with_lse(q, k, v))


def odd_queries(head_dim: int = 128, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """300 queries (3 tiles of 128) in storage for 512, NaN behind them; and as many keys as make pairs worth it."""
    generator = torch.Generator(device).manual_seed(5)
    draw = {"generator": generator, "device": device}
    room = torch.randn(1, ops.query_rows(300), 1, head_dim, **draw).to(dtype)
    room[:, 300:] = torch.nan
    k, v = (torch.randn(1, 8200, 1, head_dim, **draw).to(dtype) for _ in range(2))
    return room[:, :300], k, v


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_of_queries_come_in_pairs(head_dim: int) -> None:
    """Without a copy where the storage has room; the caller sees nothing of it."""
    seen: list[Tensor] = []

    def function(q: Tensor, k: Tensor, v: Tensor, **flags: bool) -> tuple[Tensor, Tensor]:
        seen.append(q)
        return _attention_backends._sdpa(q, k, v), torch.zeros(1, 1, q.shape[1])

    q, k, v = odd_queries(head_dim)
    rows = 512 if head_dim == 128 else 300
    short, tall = q.clone(), torch.cat([q, q, q], dim=1)
    for queries, count, copied in ((q, rows, False), (short, rows, True), (q[:, :200], 200, False), (tall, 900, False)):
        out, _ = _attention_backends._in_pairs(function, queries, k, v, return_lse=True)
        assert torch.equal(out, _attention_backends._sdpa(queries, k, v))
        assert seen[-1].shape[1] == count
        assert (seen[-1].data_ptr() != queries.data_ptr()) == (copied and count != queries.shape[1])
    _attention_backends._in_pairs(function, q, k[:, :512], v[:, :512])
    assert seen[-1] is q


@pytest.mark.gpu
def test_gpu_pairs_of_tiles() -> None:
    """FlashAttention-3 gives single tiles and pairs the same values, whatever lies behind the queries."""
    if _attention_backends.missing("fa3", torch.device("cuda")):
        pytest.skip(f"fa3: {_attention_backends.missing('fa3', torch.device('cuda'))}")
    q, k, v = odd_queries(128, "cuda", torch.bfloat16)
    outs = [ops.attention(queries, k, v, backend="fa3") for queries in (q, q.clone())]
    exact = attention_ref(q.double(), k.double(), v.double(), math_dtype=torch.float64)
    low = attention_ref(q, k, v, math_dtype=torch.bfloat16)
    for out in outs:
        assert out.shape == q.shape and rel_l2(out.cpu(), exact.cpu()) <= 2 * rel_l2(low.cpu(), exact.cpu())
    assert torch.equal(*outs)
