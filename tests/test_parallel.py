"""Attention and exchanges over processes, against one process that has everything."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from conftest import rel_l2
from processes import together
from torch import Tensor

from skyreels_fast import ops
from skyreels_fast.conditions import image_channels
from skyreels_fast.media import VideoError
from skyreels_fast.ops.attention import attention_ref
from skyreels_fast.parallel import (
    Degrees,
    Layout,
    LeaderError,
    RefusedError,
    World,
    choose_layout,
    is_lost_peer,
    require,
    sequence,
    settled,
)
from skyreels_fast.parallel.chain import Chain
from skyreels_fast.parallel.layout import cut, slices
from skyreels_fast.parallel.ring import RingBuffers
from skyreels_fast.parallel.sequence import SequenceAttention
from skyreels_fast.parallel.team import Team
from skyreels_fast.parallel.ulysses import contiguous
from skyreels_fast.vae import VAE, tiles
from skyreels_fast.vae.chain import stages_of
from skyreels_fast.vae.layers import flow

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 4, 8


def draw(frames: int, tokens: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(frames * 100 + tokens)
    shape = (2, frames, tokens, heads, HEAD_DIM)
    return [(torch.randn(shape, generator=generator) * 1.5).to(dtype) for _ in range(3)]


def _attend_sharded(
    rank: int, layout: Layout, frames: int, tokens: int, block: int | None, new: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """This process's result, and the same part of one process's; queries of the last `new` frames."""
    start, stop = slices(tokens, layout.sequence)[rank % layout.sequence]
    groups = World(CPU).groups(layout)
    attend = SequenceAttention(layout, groups, rank % layout.sequence, tokens, None)
    q, k, v = draw(frames, tokens, dtype=dtype)
    q = q[:, frames - new :]
    block_tokens = None if block is None else block * tokens
    own = attend(*(x[:, :, start:stop].flatten(1, 2) for x in (q, k, v)), block_tokens=block_tokens)
    exact = [x.flatten(1, 2).double() for x in (q, k, v)]
    whole = attention_ref(*exact, block_tokens=block_tokens, math_dtype=torch.float64)
    return own, whole.unflatten(1, (new, tokens))[:, :, start:stop].flatten(1, 2)


LAYOUTS = {
    "ulysses of 2": Layout(2),
    "ulysses of 4": Layout(4),
    "ring of 2": Layout(1, 2),
    "ring of 3": Layout(1, 3),
    "ring of 4": Layout(1, 4),
    "ulysses 2 x ring 2": Layout(2, 2),
    "two branches of 2": Layout(2, 1, 2),
}


@pytest.mark.parametrize("block", [None, 1, 2, 3])
@pytest.mark.parametrize("tokens", [8, 7, 5])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_over_shards(layout: Layout, tokens: int, block: int | None) -> None:
    """Slices alike and not, dense and by causal blocks, of which the last may be short."""
    for own, expected in together(layout.size, _attend_sharded, layout, 5, tokens, block, 5, torch.float32):
        assert own.shape == expected.shape
        assert rel_l2(own, expected) < 2e-6


@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2), Layout(2, 2)], ids=str)
def test_queries_may_be_of_the_last_frames(layout: Layout) -> None:
    for own, expected in together(layout.size, _attend_sharded, layout, 6, 5, 2, 3, torch.float32):
        assert own.shape == expected.shape
        assert rel_l2(own, expected) < 2e-6


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(1, 4)], ids=str)
def test_half_precision_is_rounded_once_for_each_part_and_once_in_all(layout: Layout) -> None:
    for own, expected in together(4, _attend_sharded, layout, 3, 8, None, 3, torch.bfloat16):
        assert own.dtype == torch.bfloat16
        assert rel_l2(own, expected) < 1.6 * rel_l2(expected.bfloat16(), expected)


def _begun(rank: int) -> dict[str, object]:
    """What a call of Ulysses has done before it is given v; and what it has in memory for attention."""
    group = World(CPU).groups(Layout(2))
    attend = SequenceAttention(Layout(2), group, rank, 6, None)
    q, k, v = (x[:, :, 3 * rank : 3 * rank + 3].flatten(1, 2) for x in draw(2, 6))
    seen: dict[str, object] = {"sent": 0}
    exchange, attention = dist.all_to_all_single, sequence.attention

    def counted(*args: object, **options: object) -> object:
        seen["sent"] += 1
        return exchange(*args, **options)

    def spied(q: Tensor, *args: Tensor, **options: object) -> Tensor:
        seen["room"] = q.untyped_storage().nbytes() // (q.stride(1) * q.itemsize)
        return attention(q, *args, **options)

    dist.all_to_all_single, sequence.attention = counted, spied
    end = attend.begin(q, k)
    seen["before v"] = seen["sent"]
    end(v)
    return seen


def test_ulysses_sends_queries_and_keys_before_there_are_values() -> None:
    for seen in together(2, _begun):
        assert (seen["before v"], seen["sent"]) == (2, 4)
        assert seen["room"] == ops.query_rows(12)


def _compiled(rank: int) -> tuple[Tensor, Tensor]:
    attend = SequenceAttention(Layout(2), World(CPU).groups(Layout(2)), rank, 6, None)
    q, k, v = (x[:, :, 3 * rank : 3 * rank + 3].flatten(1, 2) for x in draw(2, 6))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, block_tokens=6)

    with torch.no_grad():
        return torch.compile(run, fullgraph=True, backend="eager")(q, k, v), run(q, k, v)


def test_ulysses_is_compiled_without_a_graph_break() -> None:
    for compiled, eager in together(2, _compiled):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [6, 8])
def test_contiguous_is_torchs(channels: int, dtype: torch.dtype) -> None:
    """Whatever the strides, and whether elements of 16 bytes fit or not."""
    x = torch.randn(3, 4, 6, channels, dtype=dtype)
    x.view(torch.int16)[0, 0, 0, 0] = 0x7FA5  # in bfloat16, a NaN with bits of its own
    for given in (x, x.transpose(0, 2), x[:, 1:, ::2], x[..., 1:], x.mT, x.flatten()[1:].unfold(0, channels, 3), x[:0]):
        found = contiguous(given)
        assert found.is_contiguous()
        assert found.shape == given.shape
        assert torch.equal(found.view(torch.int16), given.contiguous().view(torch.int16))


def _attend_in_turn(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Results of one ring, and one process's: of longer and shorter videos, in two dtypes, kept until all are there."""
    attend = SequenceAttention(Layout(1, 2), World(CPU).groups(Layout(1, 2)), rank, 5, None)
    start, stop = slices(5, 2)[rank]
    results = []
    for frames, dtype in ((2, torch.float32), (4, torch.float32), (3, torch.float32), (3, torch.bfloat16)):
        drawn = draw(frames, 5, dtype=dtype)
        own = attend(*(x[:, :, start:stop].flatten(1, 2).requires_grad_() for x in drawn))
        whole = attention_ref(*(x.flatten(1, 2).double() for x in drawn), math_dtype=torch.float64)
        results.append((own, whole.unflatten(1, (frames, 5))[:, :, start:stop].flatten(1, 2)))
    return results


def test_a_ring_takes_any_shapes_in_turn() -> None:
    for results in together(2, _attend_in_turn):
        assert [own.dtype for own, _ in results] == [torch.float32] * 3 + [torch.bfloat16]
        assert all(rel_l2(own, whole) < 2e-6 for own, whole in results[:3])
        assert rel_l2(*results[3]) < 2 * 2**-8


def test_a_ring_has_memory_of_its_own() -> None:
    """Which is made anew only where it does not fit."""
    buffers, small = RingBuffers(), torch.empty(0)
    first = buffers.pair(small, 12)
    assert first.shape == (2, 12)
    assert buffers.pair(small, 7) is first
    assert buffers.pair(small, 13).shape == (2, 13)
    assert buffers.pair(small.bfloat16(), 12).dtype == torch.bfloat16


def _exchange(rank: int) -> dict[str, object]:
    world = World(CPU)
    seen: dict[str, object] = {"agreed": world.agree(rank + 10), "least": world.least(7 - rank)}
    seen["first"] = world.first(lambda: [torch.full((2,), rank + 1.0, dtype=torch.bfloat16), None])
    try:
        world.first(lambda: 1 / 0)
    except (ZeroDivisionError, LeaderError) as error:
        seen["error"] = type(error)
    seen["after"] = world.agree("still together" if rank == 0 else "")
    return seen


def test_what_the_leader_has_and_what_all_have() -> None:
    for rank, seen in enumerate(together(3, _exchange)):
        assert seen["agreed"] == 10 and seen["least"] == 5 and seen["after"] == "still together"
        values, none = seen["first"]
        assert torch.equal(values, torch.ones(2, dtype=torch.bfloat16)) and none is None
        assert seen["error"] is (LeaderError if rank else ZeroDivisionError)


def _gather(rank: int, layout: Layout, count: int) -> list[Tensor]:
    team = Team(World(CPU), layout, 15, None)
    latents = [_velocity(branch) for branch in range(count)]
    start, stop = team.token_range
    parts = []
    for branch in team.branches(count):
        tokens = latents[branch].unflatten(4, (5, 2)).unflatten(3, (3, 2))  # [1, 16, f, h, 2, w, 2]
        tokens = tokens.transpose(4, 5).flatten(3, 4)[:, :, :, start:stop]  # [1, 16, f, own, 2, 2]
        parts.append(tokens.transpose(3, 4).flatten(4, 5))
    return team.whole(parts, (2, 3, 5))


def _velocity(branch: int) -> Tensor:
    return torch.arange(2.0 * 16 * 60).view(2, 16, 60).transpose(0, 1).reshape(1, 16, 2, 6, 10) + 0.5 * branch


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 2), Layout(2, 1, 2), Layout(1, 1, 2)], ids=str)
def test_every_process_has_every_branch_whole(layout: Layout, count: int) -> None:
    for velocities in together(layout.size, _gather, layout, count):
        assert len(velocities) >= count
        assert all(torch.equal(velocities[branch], _velocity(branch)) for branch in range(count))


def _lose(rank: int) -> bool | None:
    world = World(CPU)
    world.wait()
    if rank == 1:
        dist.destroy_process_group()
        return None
    try:
        world.agree(0)
        for _ in range(3):
            world.wait()
    except RuntimeError as error:
        return is_lost_peer(error)
    return False


def test_a_process_that_leaves_is_told_from_other_errors() -> None:
    assert together(2, _lose) == [True, None]
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(VideoError("a broken pipe drips.mp4 cannot be written"))
    assert not is_lost_peer(RuntimeError("CUDA error: the launch timed out and was terminated"))
    assert is_lost_peer(dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"))


def _settle(rank: int, reasons: list[str | None]) -> list[str]:
    return settled(reasons[rank])


@pytest.mark.parametrize("reasons", [[None, None, None], [None, "no disk", None], ["b", "a", "b"]])
def test_what_one_has_against_it_all_know_once(reasons: list[str | None]) -> None:
    expected = list(dict.fromkeys(filter(None, reasons)))
    assert together(3, _settle, reasons) == [expected] * 3


def _settle_on_hosts(rank: int, reasons: list[str | None]) -> list[str]:
    platform.node = lambda: f"node{rank // 2}"
    return settled(reasons[rank])


def test_a_reason_of_some_hosts_names_them() -> None:
    assert together(4, _settle_on_hosts, ["full", "full", None, None])[3] == ["full (on node0)"]
    assert together(4, _settle_on_hosts, ["full", None, None, "full"])[0] == ["full"]
    assert together(4, _settle_on_hosts, [None, "a", "b", None])[1] == ["a (on node0)", "b (on node1)"]


def _join_or_refuse(rank: int) -> list[str]:
    if rank == 1:
        return settled("--image first.png: there is no such file")
    with pytest.raises(RefusedError) as error:
        World.join(CPU)
    return error.value.reasons


def test_a_process_that_refuses_keeps_none_waiting() -> None:
    assert together(3, _join_or_refuse) == [["--image first.png: there is no such file"]] * 3


def _two_layouts(rank: int) -> bool:
    world = World(CPU)
    first, other = Layout(2), Layout(1, 2)
    groups = world.groups(first)
    return world.groups(other).ring is not None and world.groups(first) is groups


def test_groups_are_made_once_a_layout() -> None:
    assert together(2, _two_layouts) == [True, True]


def _decode_with_neighbours(rank: int, local: int) -> tuple[list[Tensor], int]:
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    world = World(CPU)
    torch.manual_seed(0)
    vae = VAE(8)
    return list(vae.decode_stream(torch.randn(1, 16, 3, 4, 6), shared=Chain(world))), len(world._links)


def test_frames_of_the_vae_stay_on_the_leaders_host() -> None:
    (alone, _), *_ = together(1, _decode_with_neighbours, 1)
    (first, links), (second, others), (third, none) = together(3, _decode_with_neighbours, 2)
    assert all(map(torch.equal, first, alone)) and len(first) == len(alone)
    assert second == third == [] and (links, others, none) == (1, 1, 0)


PLACES = [
    # processes, heads, guided, asked → ulysses, ring, branches
    (1, 12, True, Degrees(), (1, 1, 1)),
    (2, 12, True, Degrees(), (1, 1, 2)),
    (2, 12, False, Degrees(), (2, 1, 1)),
    (3, 12, True, Degrees(), (3, 1, 1)),
    (5, 40, True, Degrees(), (5, 1, 1)),
    (7, 40, True, Degrees(), (1, 7, 1)),
    (8, 12, True, Degrees(), (4, 1, 2)),
    (8, 12, False, Degrees(), (4, 2, 1)),
    (8, 12, True, Degrees(cfg_parallel=False), (4, 2, 1)),
    (8, 40, True, Degrees(), (4, 1, 2)),
    (8, 40, True, Degrees(cfg_parallel=False), (8, 1, 1)),
    (8, 40, True, Degrees(ring=2), (2, 2, 2)),
    (8, 40, True, Degrees(ulysses=2), (2, 2, 2)),
    (8, 40, True, Degrees(ulysses=8), (8, 1, 1)),
    (8, 40, True, Degrees(2, 4), (2, 4, 1)),
    (16, 40, True, Degrees(), (8, 1, 2)),
]


@pytest.mark.parametrize(("size", "heads", "guided", "asked", "expected"), PLACES)
def test_layouts(size: int, heads: int, guided: bool, asked: Degrees, expected: tuple[int, int, int]) -> None:
    layout = choose_layout(asked, size, heads=heads, guided=guided, tokens_per_frame=2040)
    assert layout == expected and layout.size == size


@pytest.mark.parametrize(
    ("size", "asked", "message"),
    [
        (8, Degrees(ulysses=8), "--ulysses_degree 8: does not fit 12 heads and 8 processes; .* 4 x 2, 4 x 1, 2 x 4"),
        (8, Degrees(3), "--ulysses_degree 3"),
        (8, Degrees(5, cfg_parallel=True), "12 heads and 8 processes, 4 for each guidance branch with --cfg_parallel;"),
        (8, Degrees(2, 3), "--ulysses_degree 2 --ring_degree 3"),
        (8, Degrees(ring=3), "--ring_degree 3"),
        (4, Degrees(ring=0), "--ring_degree 0: must be at least 1"),
        (3, Degrees(cfg_parallel=True), "3 processes do not make two halves"),
        (32, Degrees(), "32 processes are too many for frames of 15 tokens"),
    ],
)
def test_layouts_that_do_not_work_are_named(size: int, asked: Degrees, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layout(asked, size, heads=12, guided=True, tokens_per_frame=15)


def test_no_halves_without_guidance() -> None:
    with pytest.raises(ValueError, match=r"^--cfg_parallel: guidance_scale=0\.5 leaves a single branch"):
        choose_layout(Degrees(cfg_parallel=True), 4, heads=12, guided=False, tokens_per_frame=15, guidance_scale=0.5)


def test_ranks_are_laid_out_with_neighbours_in_a_ulysses_group() -> None:
    layout = Layout(2, 3, 2)
    assert layout.ulysses_ranks()[:3] == [[0, 1], [2, 3], [4, 5]]
    assert layout.ring_ranks() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_slices_are_as_even_as_can_be() -> None:
    assert slices(8, 2) == [(0, 4), (4, 8)]
    assert slices(7, 3) == [(0, 3), (3, 5), (5, 7)]


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=N"):
        require(CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    require(CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need xfuser; pip install 'skyreels-fast\[parallel\]'"):
        require(torch.device("cuda", 0))


def _vae(seed: int) -> VAE:
    torch.manual_seed(seed)
    vae = VAE(base_dim=8).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    return vae


@torch.no_grad()
def _chained(rank: int, latents: Tensor, video: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    vae, chain = _vae(0), Chain(World(CPU))
    encoded = vae.encode_stream(video.split(3, dim=2), chain)
    return encoded, list(vae.decode_stream(latents, shared=chain)), image_channels(vae, video[:, :, :1], 3, chain)


@pytest.mark.parametrize(
    ("size", "batch", "frames", "height", "width"), [(2, 1, 3, 6, 5), (3, 2, 2, 7, 1), (4, 1, 3, 3, 4), (4, 1, 1, 1, 1)]
)
@torch.no_grad()
def test_the_vae_in_a_chain(size: int, batch: int, frames: int, height: int, width: int) -> None:
    """The bits are those of one process. Two frames of the video are past its last group of four."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    video = torch.rand(batch, 3, 4 * frames - 1, 8 * height, 8 * width, generator=generator) * 2 - 1
    vae = _vae(0)
    decoded, encoded, given = vae.decode(latents), vae.encode(video), image_channels(vae, video[:, :, :1], 3)
    for rank, (own, chunks, channels) in enumerate(together(size, _chained, latents, video)):
        assert torch.equal(own, encoded)
        assert torch.equal(channels, given)
        if rank == 0:
            assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (frames - 1)
            assert torch.equal(torch.cat(chunks, dim=2), decoded)
        else:
            assert not chunks


@torch.no_grad()
def _tiled(rank: int, latents: Tensor, budget: int) -> list[Tensor]:
    return list(_vae(0).decode_stream(latents, budget, Chain(World(CPU))))


@torch.no_grad()
def test_tiles_are_those_of_one_process() -> None:
    latents = torch.randn(1, 16, 2, 24, 16, generator=torch.Generator().manual_seed(2))
    vae, budget = _vae(0), tiles.decode_bytes(_vae(0), (1, 16, 2, 16, 16))
    expected = torch.cat(list(vae.decode_stream(latents, budget)), dim=2)
    assert not torch.equal(expected, vae.decode(latents))
    first, second = together(2, _tiled, latents, budget)
    assert torch.equal(torch.cat(first, dim=2), expected) and not second


@torch.no_grad()
def _few_layers(rank: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """What comes out of two layers in a chain, and in this process alone."""
    layers = _vae(0).decoder.stages[-2:]
    frames = torch.rand(count, 1, 4, 4, 8, generator=torch.Generator().manual_seed(3))
    stages = stages_of(layers, tuple(frames.shape))
    return list(Chain(World(CPU)).flow(stages, iter(frames), frames.dtype)), list(flow(layers, iter(frames)))


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_more_processes_than_layers_or_frames(size: int, count: int) -> None:
    (own, expected), *others = together(size, _few_layers, count)
    assert len(own) == count
    assert all(torch.equal(*pair) for pair in zip(own, expected, strict=True))
    assert not any(frames for frames, _ in others)


class _Slow(torch.nn.Module):
    """A layer that takes its time for every frame, but no processor."""

    def flow(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        for frame in frames:
            time.sleep(0.03)
            yield frame + 1

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def cost(self, shape: tuple[int, ...]) -> int:
        return 1


def _timed(rank: int, count: int) -> tuple[list[Tensor], float]:
    world, frames = World(CPU), torch.zeros(count, 1, 1, 1, 1)
    stages = stages_of([_Slow(), _Slow(), _Slow()], tuple(frames.shape))
    world.wait()
    start = time.perf_counter()
    return list(Chain(world).flow(stages, iter(frames), frames.dtype)), time.perf_counter() - start


def test_processes_of_a_chain_work_at_the_same_time() -> None:
    """They take little longer than one layer does; one after the other the three would take thrice that."""
    (frames, seconds), *_ = together(3, _timed, 20)
    assert torch.equal(torch.cat(frames), torch.full((20, 1, 1, 1), 3.0))
    assert seconds < 2 * 20 * 0.03


def test_layers_are_cut_where_the_dearest_part_is_cheapest() -> None:
    generator = torch.Generator().manual_seed(4)
    for count in range(1, 8):
        costs = torch.randint(1, 20, (count,), generator=generator).tolist()
        for parts in range(1, 10):
            found = cut(costs, parts)
            assert len(found) <= parts and found[0][0] == 0 and found[-1][1] == count
            assert all(start < stop for start, stop in found)
            assert all(stop == start for (_, stop), (start, _) in pairwise(found))
            places = [(0, *places, count) for places in combinations(range(1, count), min(parts, count) - 1)]
            best = min(max(sum(costs[a:b]) for a, b in pairwise(cuts)) for cuts in places)
            assert max(sum(costs[start:stop]) for start, stop in found) == best


@pytest.mark.parametrize(("size", "least"), [(2, 1.9), (4, 3.2), (8, 5.5)])
def test_the_published_decoder_is_cut_evenly(size: int, least: float) -> None:
    """By its layers' costs at 540P, the slowest of so many processes has a `least`-th of the work or less."""
    with torch.device("meta"):
        layers = VAE().decoder.stages
    costs = [stage.cost for stage in stages_of(layers, (25, 1, 68, 120, 16))]
    assert sum(costs) / max(sum(costs[start:stop]) for start, stop in cut(costs, size)) > least
