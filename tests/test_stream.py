"""The residual stream: the same sums whether they are written or left open, and nothing held that is not needed."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from skyreels_fast.dit.stream import Stream

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (2, 12, 32)


def draw(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE).to(dtype)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x.float() * gate.repeat_interleave(SHAPE[1] // gate.shape[1], dim=1)


def norm(total: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.layer_norm(total, SHAPE[-1:], eps=1e-6).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_two_blocks_are_plain_arithmetic(dtype: torch.dtype) -> None:
    """Bit for bit: sums in float32, rounded once a block."""
    x = draw(dtype)
    stream = Stream(x)
    for _ in range(2):
        seen, context, forward = (draw(dtype) for _ in range(3))
        gates = torch.randn(2, 2, 3, SHAPE[-1])
        assert torch.equal(stream.norm(None, None, eps=1e-6, rounded=True), norm(x.float(), dtype))
        stream.add(seen, gates[0])
        total = x.float() + gated(seen, gates[0])
        assert torch.equal(stream.norm(None, None, eps=1e-6), norm(total, dtype))
        stream.add(context)
        total = total + context.float()
        assert torch.equal(stream.norm(None, None, eps=1e-6), norm(total, dtype))
        stream.add(forward, gates[1])
        total = total + gated(forward, gates[1])
        x = total.to(dtype)
        other = stream.fork()
        other.close()
        assert torch.equal(other.total(), x)
        # The next norm is of the sum before it is rounded.
        assert torch.equal(stream.norm(None, None, eps=1e-6, rounded=True), norm(total, dtype))
    assert torch.equal(stream.total(), x)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_any_number_of_addends_with_gates(dtype: torch.dtype) -> None:
    x = draw(dtype)
    stream, total = Stream(x), x.float()
    for index in range(5):
        added, gate = draw(dtype), torch.randn(2, 3, SHAPE[-1]) if index in (1, 2) else None
        stream.add(added, gate)
        total = total + (added.float() if gate is None else gated(added, gate))
    other = stream.fork()
    assert torch.equal(other.norm(None, None, eps=1e-6), norm(total, dtype))
    assert torch.equal(other.total(), total.to(dtype))
    assert torch.equal(stream.total(), total.to(dtype))


@torch.inference_mode()
def test_two_open_addends_may_be_forked_and_closed() -> None:
    x, seen, context, more = (draw(torch.bfloat16) for _ in range(4))
    stream = Stream(x)
    stream.add(seen)
    stream.norm(None, None, eps=1e-6)
    other = stream.fork()
    stream.add(context)
    other.add(more)
    third = stream.fork()
    third.close()
    total = x.float() + seen.float()
    expected = [(total + context.float()).bfloat16(), (total + more.float()).bfloat16()]
    assert all(torch.equal(each.total(), sum_) for each, sum_ in zip((stream, other), expected, strict=True))
    assert torch.equal(third.total(), expected[0])


@pytest.mark.parametrize(("dtype", "written"), [(torch.bfloat16, False), (torch.float32, True)])
@torch.inference_mode()
def test_a_sum_is_written_where_that_takes_less_memory(dtype: torch.dtype, written: bool) -> None:
    """Between the norms of a block a stream holds no more than one float32 tensor, and afterwards nothing that it has
    added up."""
    x, seen, context = (draw(dtype) for _ in range(3))
    stream, added = Stream(x), [weakref.ref(seen), weakref.ref(context)]
    stream.add(seen)
    del seen
    stream.norm(None, None, eps=1e-6)
    assert (stream._residual is x, added[0]() is None) == (not written, written)
    stream.add(context)
    del context
    stream.norm(None, None, eps=1e-6)
    assert stream._residual.dtype == torch.float32
    assert [tensor() for tensor in added] == [None, None]


def test_gradients_pass_through_open_sums() -> None:
    x, seen, context = (draw(torch.bfloat16).requires_grad_() for _ in range(3))
    stream = Stream(x)
    stream.add(seen, torch.full((2, 3, SHAPE[-1]), 0.5))
    first = stream.norm(None, None, eps=1e-6)
    stream.add(context)
    (first.float().square().sum() + stream.total().float().sum()).backward()
    for tensor, expected in ((seen, 0.5), (context, 1.0)):
        assert torch.allclose(tensor.grad.float(), torch.tensor(expected), atol=0.05)
