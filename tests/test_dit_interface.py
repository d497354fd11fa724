"""What the DiT promises beside its output: its seams, its errors, its gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import rel_l2
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from skyreels_fast import ops
from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import Context, DiT
from skyreels_fast.dit.block import Places
from skyreels_fast.dit.context import counted_padding, log_counts_of
from skyreels_fast.dit.embeddings import sinusoid
from skyreels_fast.dit.stream import Stream

SMALL = {"in_dim": 16, "dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 12}


def small(model_type: str = "t2v", **changes: object) -> DiT:
    torch.manual_seed(0)
    return DiT(TransformerConfig.from_dict({"model_type": model_type, "text_len": 10, **SMALL, **changes}))


def test_sinusoid_of_every_timestep() -> None:
    timestep = torch.arange(1000)
    half = torch.arange(8, dtype=torch.float64)
    angles = timestep.double()[:, None] / 10000 ** (half / 8)
    expected = torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)
    assert sinusoid(timestep, 16).dtype == torch.float32
    assert (sinusoid(timestep, 16) - expected).abs().max() < 1e-7


@torch.inference_mode()
def test_one_timestep_is_the_same_for_all_frames() -> None:
    dit = small()
    latents, context = torch.randn(2, 16, 3, 4, 4), dit.encode_context(torch.randn(2, 4, 12))
    one = dit(latents, torch.tensor([500, 20]), context)
    every = dit(latents, torch.tensor([[500] * 3, [20] * 3]), context)
    assert rel_l2(every, one) < 1e-6
    embedded = dit.embed(latents, torch.tensor([500, 20]))
    assert (embedded.e.shape, embedded.e0.shape, embedded.grid) == ((2, 1, 48), (2, 1, 6, 48), (3, 2, 2))


@torch.inference_mode()
def test_time_embedding_is_float32_from_bfloat16_weights() -> None:
    dit = small(inject_sample_info=True).bfloat16()
    timestep = torch.tensor([[0, 999]])
    e, e0 = dit.time_embedding_of(timestep, 24)
    exact_e, exact_e0 = dit.double().time_embedding_of(timestep, 24)
    assert e.dtype == e0.dtype == torch.float32
    assert rel_l2(e, exact_e) < 1e-6 and rel_l2(e0, exact_e0) < 1e-6
    assert torch.equal(dit.time_embedding_of(timestep, 30)[1], exact_e0)
    assert not torch.equal(dit.time_embedding_of(timestep, 16)[1], exact_e0)


@torch.inference_mode()
def test_a_block_rounds_its_residual_once() -> None:
    dit = small(num_layers=1).bfloat16()
    block, added = dit.blocks[0], []
    for sublayer in (block.self_attn, block.cross_attn, block.ffn):
        sublayer.register_forward_hook(lambda _module, _inputs, output: added.append(output))
    context = dit.encode_context(torch.randn(1, 4, 12))
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 2, 8, 8), torch.tensor([300]))
    out = dit.run_blocks(x, e0, context, grid)
    gates = (block.modulation.float() + e0)[:, :, (2, 5)]
    assert [y.dtype for y in (x, out, *added)] == [torch.bfloat16] * 5
    assert torch.equal(out, (x.float() + gates[:, :, 0] * added[0] + added[1] + gates[:, :, 1] * added[2]).bfloat16())


@torch.inference_mode()
def test_blocks_and_attention_may_be_handed_in() -> None:
    dit = small()
    context = dit.encode_context(torch.randn(1, 4, 12))
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 4, 4, 4), torch.tensor([300]))
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None) -> Tensor:
        seen.append((q.shape, block_tokens))
        return ops.attention(q, k, v, block_tokens=block_tokens, backend="ref")

    expected = dit.run_blocks(x, e0, context, grid, causal_block_size=3)
    out = dit.run_blocks(x, e0, context, grid, causal_block_size=3, blocks=iter(dit.blocks), attend=attend)
    assert rel_l2(out, expected) < 1e-5
    assert seen == [((1, 16, 2, 24), 12)] * 2


@torch.inference_mode()
def test_attention_may_begin_before_there_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that q and k are under way while v is computed."""
    dit, order = small(), []
    context = dit.encode_context(torch.randn(1, 4, 12))
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 4, 4, 4), torch.tensor([300]))
    expected = dit.run_blocks(x, e0, context, grid, causal_block_size=3)
    qkv = [block.self_attn.qkv.weight for block in dit.blocks]
    linear = torch.nn.functional.linear

    def spied(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        of_qkv = any(weight.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in qkv)
        order.extend(["product"] * of_qkv)
        return linear(given, weight, bias)

    class Attend:
        def begin(self, q: Tensor, k: Tensor, *, block_tokens: int | None) -> Callable[[Tensor], Tensor]:
            order.append("begun")
            return lambda v: ops.attention(q, k, v, block_tokens=block_tokens)

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    out = dit.run_blocks(x, e0, context, grid, causal_block_size=3, attend=Attend())
    assert torch.equal(out, expected)
    assert order == ["product", "product", "begun", "product"] * 2


@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 126, 127])
def test_some_keys_count_for_all_of_the_padding(tokens: int) -> None:
    kept = counted_padding(tokens, 512 - tokens, most=128)
    logs = log_counts_of(tokens, kept, 512 - tokens, torch.device("cpu"))
    assert 1 <= kept <= 8 and (tokens + kept) % 8 == 0 and logs.shape == (tokens + kept,)
    assert logs[:-1].count_nonzero() == 0
    assert logs.double().exp().sum().item() == pytest.approx(512, rel=1e-6)


@pytest.mark.parametrize(("tokens", "padding"), [(128, 384), (512, 0), (120, 8), (121, 1)])
def test_padding_that_cannot_be_counted_stays(tokens: int, padding: int) -> None:
    """Too many keys for a head, or as many as would stand for it."""
    assert counted_padding(tokens, padding, most=128) == padding
    assert log_counts_of(tokens, padding, padding, torch.device("cpu")) is None


@pytest.mark.parametrize(("model_type", "batch"), [("t2v", 1), ("t2v", 2), ("i2v", 2)])
@torch.inference_mode()
def test_counted_padding_is_the_padding(model_type: str, batch: int) -> None:
    """A block gives what it gives with every token of the padding in its place."""
    dit = small(model_type, text_len=200)
    text = torch.randn(batch, 4, 12)
    image = torch.randn(batch, 257, 1280) if model_type == "i2v" else None
    counted = dit.encode_context(text, image)
    plain = dit.encode_context(torch.nn.functional.pad(text, (0, 0, 0, 196)), image)
    assert counted.text.shape[1] == 8 and plain.text.shape[1] == 200 and plain.log_counts is None
    x, _, e0, grid = dit.embed(torch.randn(batch, 16, 2, 8, 8), torch.tensor([300] * batch))
    assert rel_l2(dit.run_blocks(x, e0, counted, grid), dit.run_blocks(x, e0, plain, grid)) < 1e-6
    low = small(model_type, text_len=200).bfloat16()
    low.load_state_dict(dit.state_dict())
    contexts = [low.encode_context(context, image) for context in (text, torch.nn.functional.pad(text, (0, 0, 0, 196)))]
    exact = dit.run_blocks(x, e0, plain, grid)
    few, many = (rel_l2(low.run_blocks(x.bfloat16(), e0, context, grid), exact) for context in contexts)
    assert few < 1.1 * many


@pytest.mark.parametrize("branches", [1, 2, 3])
@torch.inference_mode()
def test_branches_are_one_until_their_contexts(branches: int) -> None:
    """Each comes out as it does alone; the blocks are asked for once, and the first attends to itself once for all."""
    dit = small(num_layers=3)
    contexts = [dit.encode_context(torch.randn(1, 4, 12)) for _ in range(branches)]
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 4, 4, 4), torch.tensor([[1, 300, 600, 900]]))
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_tokens: int | None = None) -> Tensor:
        calls.append(block_tokens)
        return ops.attention(q, k, v, block_tokens=block_tokens)

    expected = [dit.run_blocks(x, e0, context, grid, causal_block_size=2) for context in contexts]
    options = {"causal_block_size": 2, "blocks": iter(dit.blocks), "attend": attend}
    outs = dit.run_branches(Stream(x), e0, contexts, grid, **options)
    for out, alone in zip(outs, expected, strict=True):
        assert rel_l2(out, alone) < 1e-6
    assert len(calls) == 1 + 2 * branches and set(calls) == {8}
    assert all(rel_l2(out, outs[0]) > 1e-3 for out in outs[1:])


@torch.inference_mode()
def test_a_stream_that_waits_holds_one_tensor() -> None:
    """The last one of a block stays open, for it is the first of the next."""
    dit = small(num_layers=3)
    contexts = [dit.encode_context(torch.randn(1, 4, 12)) for _ in range(3)]
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 4, 4, 4), torch.tensor([300]))
    streams, places = [Stream(x)], [Places(grid)] * 3
    for index, last in enumerate((2, 0, 2)):
        keys_values = [context.keys_values(index, dit.blocks[index]) for context in contexts]
        streams = dit.blocks[index](streams, e0, keys_values, places, index)
        assert [stream._open is not None for stream in streams] == [branch == last for branch in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compile_once(dtype: torch.dtype) -> None:
    """They differ in their weights alone, so the code for one is that for all."""
    dit, counter = small(num_layers=5).to(dtype), CompileCounter()
    torch._dynamo.reset()
    blocks = [torch.compile(block, backend=counter, dynamic=False) for block in dit.blocks]
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 2, 4, 4), torch.tensor([300]))
    dit.run_blocks(x, e0, dit.encode_context(torch.randn(1, 4, 12)), grid, blocks=blocks)
    assert counter.frame_count <= 2  # the first begins with no open sum


@torch.inference_mode()
def test_a_stream_lets_go_of_its_tokens() -> None:
    dit = small(num_layers=2)
    contexts = [dit.encode_context(torch.randn(1, 4, 12)) for _ in range(2)]
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 4, 4, 4), torch.tensor([300]))
    stream, tokens, seen = Stream(x), weakref.ref(x), []
    del x
    for block in dit.blocks:
        block.register_forward_hook(lambda *_: seen.append(tokens()))
    dit.run_branches(stream, e0, contexts, grid)
    assert seen == [None, None]


@torch.inference_mode()
def test_shards_of_each_frame_make_the_whole() -> None:
    """Two shards run in turn: each attends to the keys and values that both would have."""
    dit = small(num_layers=1)
    context = dit.encode_context(torch.randn(1, 4, 12))
    x, _, e0, grid = dit.embed(torch.randn(1, 16, 3, 4, 6), torch.tensor([[1, 400, 900]]))
    ranges = [(0, 2), (2, 6)]
    kept: list[tuple[Tensor, Tensor]] = []
    expected = dit.run_blocks(x, e0, context, grid)

    def keep(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        kept.append((k, v))
        return q

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        del k, v
        return ops.attention(q, torch.cat([k for k, _ in kept], 1), torch.cat([v for _, v in kept], 1))

    shards = [x.unflatten(1, (3, 6))[:, :, start:stop].flatten(1, 2) for start, stop in ranges]
    for shard, token_range in zip(shards, ranges, strict=True):
        dit.run_blocks(shard, e0, context, grid, attend=keep, token_range=token_range)
    outs = [
        dit.run_blocks(shard, e0, context, grid, attend=attend, token_range=token_range).unflatten(1, (3, -1))
        for shard, token_range in zip(shards, ranges, strict=True)
    ]
    assert rel_l2(torch.cat(outs, dim=2).flatten(1, 2), expected) < 1e-5


@torch.inference_mode()
def test_causal_frames_do_not_see_later_ones() -> None:
    dit = small()
    context = dit.encode_context(torch.randn(1, 4, 12))
    latents, timestep = torch.randn(1, 16, 5, 4, 4), torch.tensor([[100, 200, 300, 400, 500]])
    changed = latents.clone()
    changed[:, :, 4] += 1
    a, b = (dit(x, timestep, context, causal_block_size=2) for x in (latents, changed))
    assert torch.equal(a[:, :, :4], b[:, :, :4])
    assert not torch.equal(dit(latents, timestep, context)[:, :, :4], dit(changed, timestep, context)[:, :, :4])


def test_context_computes_each_blocks_keys_once() -> None:
    dit = small("i2v", in_dim=36)
    calls = []
    for block in dit.blocks:
        block.cross_attn.kv.register_forward_hook(lambda *_: calls.append("text"))
        block.cross_attn.kv_img.register_forward_hook(lambda *_: calls.append("image"))
    latents, timestep = torch.randn(1, 36, 2, 4, 4), torch.tensor([500])
    with torch.inference_mode():
        context = dit.encode_context(torch.randn(1, 4, 12), torch.randn(1, 257, 1280))
        first = dit(latents, timestep, context)
        assert calls == ["text", "image"] * 2
        assert torch.equal(dit(latents, timestep, context), first)
        assert len(calls) == 4


def test_keys_kept_without_gradients_do_not_cut_them_off() -> None:
    dit = small()
    latents, timestep = torch.randn(1, 16, 2, 4, 4), torch.tensor([500])
    with torch.no_grad():
        context = dit.encode_context(torch.randn(1, 4, 12))
        dit(latents, timestep, context)
    dit(latents, timestep, context).sum().backward()
    assert dit.blocks[0].cross_attn.kv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_every_parameter_gets_a_gradient(model_type: str) -> None:
    dit = small(model_type, in_dim=36 if model_type == "i2v" else 16, inject_sample_info=True)
    image = torch.randn(1, 257, 1280) if model_type == "i2v" else None
    context = dit.encode_context(torch.randn(1, 4, 12), image)
    latents = torch.randn(1, dit.config.in_dim, 3, 4, 4)
    dit(latents, torch.tensor([[1, 500, 900]]), context, 24, 2).square().sum().backward()
    without = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_gradient_is_the_slope() -> None:
    dit = small()
    text, latents, timestep = torch.randn(1, 4, 12), torch.randn(1, 16, 2, 4, 4), torch.tensor([[10, 700]])
    weight = dit.blocks[0].self_attn.qkv.weight
    direction = torch.randn_like(weight) / 10

    def loss() -> Tensor:
        return dit(latents, timestep, dit.encode_context(text)).square().mean()

    loss().backward()
    slope = (weight.grad * direction).sum().item()
    with torch.no_grad():
        weight += 0.01 * direction
        above = loss().item()
        weight -= 0.02 * direction
        below = loss().item()
    assert slope == pytest.approx((above - below) / 0.02, rel=2e-2)


def test_errors_name_the_values() -> None:
    dit, image_dit = small(inject_sample_info=True), small("i2v", in_dim=36)
    latents, timestep, text = torch.zeros(1, 16, 3, 4, 4), torch.tensor([5]), torch.zeros(1, 4, 12)
    with pytest.raises(ValueError, match=r"\[B, 16, F, H, W\], not \[1, 20, 3, 4, 4\]"):
        dit.embed(torch.zeros(1, 20, 3, 4, 4), timestep, 24)
    with pytest.raises(ValueError, match=r"not \[16, 3, 4, 4\]"):
        dit.embed(latents[0], timestep, 24)
    with pytest.raises(ValueError, match="5 x 4 do not split"):
        dit.embed(torch.zeros(1, 16, 3, 5, 4), timestep, 24)
    with pytest.raises(ValueError, match=r"timestep must be \[1\] or \[1, 3\], not \[1, 4\]"):
        dit.embed(latents, torch.zeros(1, 4), 24)
    with pytest.raises(ValueError, match="give fps, got None"):
        dit.embed(latents, timestep)
    with pytest.raises(ValueError, match=r"\[B, n, 12\], not \[1, 4, 13\]"):
        dit.encode_context(torch.zeros(1, 4, 13))
    with pytest.raises(ValueError, match="11 text tokens are too many, the model takes 10"):
        dit.encode_context(torch.zeros(1, 11, 12))
    with pytest.raises(ValueError, match="t2v model takes no image"):
        dit.encode_context(text, torch.zeros(1, 257, 1280))
    with pytest.raises(ValueError, match="i2v model needs CLIP"):
        image_dit.encode_context(text)
    with pytest.raises(ValueError, match=r"\[1, n, 1280\], not \[1, 257, 1024\]"):
        image_dit.encode_context(text, torch.zeros(1, 257, 1024))
    context = dit.encode_context(text)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        dit(latents, timestep, context, 24, 0)
    with pytest.raises(ValueError, match="the context is for 2 videos, the latents are 1"):
        dit(latents, timestep, Context(context.text.expand(2, -1, -1)), 24)
