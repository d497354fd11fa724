"""What causal attention leaves out of a model call, and that leaving it out changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import rel_l2
from torch import Tensor

from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit import DiT
from skyreels_fast.dit.past import Past
from skyreels_fast.dit.stream import Stream
from skyreels_fast.sampling import denoise as loop
from skyreels_fast.sampling.denoise import denoise
from skyreels_fast.sampling.spans import causal_spans, whole_spans
from skyreels_fast.sampling.teacache import TeaCacheSettings
from skyreels_fast.sampling.timesteps import Schedule, hold, sigma_schedule, timestep_matrix, timestep_schedule

STEPS, SHIFT = 4, 5.0
SIGMAS = sigma_schedule(STEPS, SHIFT)


def schedule_of(frames: int, prefix: int = 0, **options: int) -> Schedule:
    return hold(timestep_matrix(frames, timestep_schedule(STEPS, SHIFT), ready=prefix, **options), prefix, False)


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    return DiT(TransformerConfig("t2v", 16, 48, 96, 2, 3, text_dim=12, text_len=6)).eval()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, dit: DiT) -> list[int]:
    """Frames that each call of the blocks was given."""
    run, frames = dit.run_branches, []

    def noting(
        stream: Stream, e0: Tensor, contexts: list, grid: tuple[int, int, int], **options: object
    ) -> list[Tensor]:
        frames.extend([grid[0]] * len(contexts))
        return run(stream, e0, contexts, grid, **options)

    monkeypatch.setattr(dit, "run_branches", noting)
    return frames


def render(dit: DiT, schedule: Schedule, block: int, **options: object) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, len(schedule.index[0]), 4, 6, generator=draw)
    contexts = [dit.encode_context(torch.randn(1, 5, 12, generator=draw)) for _ in range(2)]
    options = {"noise_generator": torch.Generator().manual_seed(2), **options}
    return denoise(
        dit, latents, schedule, SIGMAS, *contexts, guidance_scale=3.0, causal_block_size=block, in_place=True, **options
    )


CASES = {
    "a frame a block": (schedule_of(6, ar_step=2), 1, {}),
    "two a block": (schedule_of(8, ar_step=2, block=2), 2, {}),
    "in step": (schedule_of(6, block=2), 2, {}),
    "given frames": (schedule_of(8, prefix=3, ar_step=1, block=2), 2, {"prefix": 3}),
    "noised given frames": (schedule_of(8, prefix=3, ar_step=1, block=2), 2, {"prefix": 3, "addnoise": 20}),
    "an interval that moves on": (schedule_of(10, ar_step=2, block=2, base=4), 2, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes(name: str, dit: DiT, monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    schedule, block, options = CASES[name]
    kept = render(dit, schedule, block, **options)
    kept_frames, computed[:] = sum(computed), []
    started = render(dit, schedule, block, past_bytes=0, **options)
    started_frames, computed[:] = sum(computed), []
    monkeypatch.setattr(loop, "causal_spans", lambda schedule, *_args, **_options: whole_spans(schedule))
    whole = render(dit, schedule, block, **options)
    assert rel_l2(started, whole) < 1e-5
    assert rel_l2(kept, whole) < 1e-5
    assert kept_frames <= started_frames <= sum(computed)


def test_only_what_a_row_advances_is_computed(dit: DiT, computed: list[int]) -> None:
    """Three blocks of two frames, two rows apart: four steps each."""
    render(dit, schedule_of(6, ar_step=2, block=2), 2)
    # One block; two; and a row after a block's last step its final keys and values are computed once more.
    assert computed[::2] == [2, 2, 4, 4, 6, 4, 4, 2]
    assert computed[::2] == computed[1::2]
    computed.clear()
    render(dit, schedule_of(6, ar_step=2, block=2), 2, past_bytes=0)
    assert computed[::2] == [2, 2, 4, 4, 6, 6, 6, 6]


def test_given_frames_are_computed_once(dit: DiT, computed: list[int]) -> None:
    schedule = schedule_of(6, prefix=2, block=2)
    render(dit, schedule, 2, prefix=2)
    assert computed[::2] == [6, 4, 4, 4]
    computed.clear()
    render(dit, schedule, 2, prefix=2, addnoise=20)
    assert computed[::2] == [6, 6, 6, 6]


def test_states_to_go_on_from_need_no_kept_keys(dit: DiT) -> None:
    schedule, block, states = schedule_of(8, ar_step=2, block=2), 2, []
    whole = render(dit, schedule, block, on_state=lambda state: states.append(copy.deepcopy(state)))
    kept_from = next(row for row, span in enumerate(causal_spans(schedule, block, keep=True)) if span.start)
    assert [state.row for state in states] == [*range(kept_from), len(schedule.interval)]
    assert torch.equal(render(dit, schedule, block, state=states[-2]), whole)


def test_spans_cover_what_is_updated() -> None:
    for frames, block, ar_step, base, prefix in [(12, 3, 2, 12, 0), (12, 2, 3, 6, 0), (9, 3, 1, 9, 4), (8, 1, 2, 4, 1)]:
        schedule = schedule_of(frames, prefix=prefix, ar_step=ar_step, block=block, base=base)
        spans = causal_spans(schedule, block, keep=True)
        for row, (span, (first, last)) in enumerate(zip(spans, schedule.interval, strict=True)):
            updated = [column - first for column in range(first, last) if schedule.update[row][column]]
            assert span.start % block == 0 and span.start <= min(updated) and max(updated) < span.stop <= last - first
            for column in range(first, first + span.fixed):
                assert not any(update[column] for update in schedule.update[row:])
                assert len({row[column] for row in schedule.timesteps[row:]}) == 1


def test_teacache_computes_the_row_where_a_block_starts(dit: DiT, computed: list[int]) -> None:
    """Its residual is of other frames there; and nothing is kept, for the rows that are passed over keep nothing."""
    settings = TeaCacheSettings((1.0, 0.0), 1e9)
    render(dit, schedule_of(6, ar_step=2, block=2), 2, teacache=settings)
    assert computed[::2] == [2, 4, 6, 6]


def test_past_gives_all_keys_and_overwrites_what_is_not_kept() -> None:
    past = Past(4)
    k, v = (torch.randn(1, 6, 2, 4) for _ in range(2))  # three frames of two tokens
    keys, values = past.keys(0, k, 3), past.values(0, v, 3)
    assert torch.equal(keys, k) and torch.equal(values, v)
    past.keep(1)
    new_k, new_v = (torch.randn(1, 6, 2, 4) for _ in range(2))
    keys, values = past.keys(0, new_k, 3), past.values(0, new_v, 3)
    assert torch.equal(keys, torch.cat([k[:, :2], new_k], 1)) and torch.equal(values, torch.cat([v[:, :2], new_v], 1))
    assert Past.nbytes(1, 8, 8, 4) == sum(kept.untyped_storage().nbytes() for kept in (keys, values))


def test_keys_are_kept_for_causal_attention_alone(dit: DiT) -> None:
    x, _, e0, grid = dit.embed(torch.zeros(1, 16, 2, 4, 4), torch.tensor([3]))
    with pytest.raises(ValueError, match="give causal_block_size"):
        dit.run_blocks(x, e0, dit.encode_context(torch.zeros(1, 5, 12)), grid, pasts=[Past(2)])
