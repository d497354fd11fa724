"""The video benchmark on toy sizes: its rows, its random models, the peers beside it, the floor under it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from processes import together

from benchmarks import floor, harness, models, ours, peers, video
from skyreels_fast.config import TransformerConfig

CPU = torch.device("cpu")
COMMON = {"run_id", "time", "gpu", "versions", "commit", "dirty"}
TOY = ["--model", "toy", "--resolution", "32x48", "--frames", "9", "--steps", "2", "--device", "cpu"]


def test_published_sizes():
    def count(shapes: dict[str, tuple[int, ...]]) -> float:
        return sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9

    def dit(model: str, mode: str) -> float:
        made = models.RandomCheckpoint.of(model, mode, CPU, torch.bfloat16, text=False)
        return count(made.transformer_weights().shapes)

    assert dit("14B", "sync") == pytest.approx(14.29, abs=0.01)
    assert dit("14B", "i2v") == pytest.approx(16.40, abs=0.01)
    assert dit("1.3B", "t2v") == pytest.approx(1.42, abs=0.01)
    assert models.config("1.3B", "sync").inject_sample_info and not models.config("14B", "sync").inject_sample_info
    vae = models.RandomCheckpoint.of("14B", "sync", CPU, torch.bfloat16, text=False).vae_weights()
    assert count(vae.shapes) == pytest.approx(0.127, abs=0.001)
    assert count(models._text_shapes(models._TEXT)) == pytest.approx(5.68, abs=0.01)


def test_random_weights_repeat_and_are_of_the_size_of_trained_ones():
    weights = models.RandomCheckpoint.of("toy", "sync", CPU, torch.bfloat16, text=False).transformer_weights()
    name = "blocks.0.self_attn.q.weight"
    assert torch.equal(weights[name], weights[name]) and weights[name].dtype == torch.bfloat16
    assert not torch.equal(weights[name], weights[name.replace(".q.", ".k.")])
    assert weights[name].float().std() == pytest.approx(128**-0.5, rel=0.05)
    assert weights["blocks.0.norm3.weight"].float().mean() == pytest.approx(1, abs=0.02)
    assert all(weights[name].count_nonzero() > 0 for name in weights)


def test_floor_counts_products_and_attention():
    config = models.config("14B", "sync")
    tokens, dim, ffn = 51_000, 5120, 13824
    products, attended = floor.block_flops(config, (25, 34, 60))
    assert products == 2 * tokens * (3 + 1 + 2) * dim * dim + 2 * 2 * tokens * dim * ffn
    assert attended == 4 * dim * tokens * (tokens + 512)
    dense = 4 * dim * tokens * tokens
    assert floor.block_flops(config, (25, 34, 60), 5)[1] - 4 * dim * tokens * 512 == 0.6 * dense
    seconds = 2 * tokens * dim * (3 * dim / 723 + 3 * dim / 822 + ffn / 718 + ffn / 722) / 1e12
    seconds += attended / floor.ATTENTION_TFLOPS / 1e12
    assert floor.forward_ms(config, (25, 34, 60), gpu="NVIDIA H200") == pytest.approx(40e3 * seconds)
    assert floor.forward_ms(config, (25, 34, 60), gpu="NVIDIA A100") is None
    assert floor.forward_ms(models.config("toy", "sync"), (2, 2, 2), gpu="NVIDIA H200") is None


def test_video_end_to_end_beside_peers(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("diffusers")
    file = tmp_path / "video.jsonl"
    named = ["--peer", "diffusers", "--peer", "diffusers-accelerated"]
    assert video.main([*TOY, *named, "--with_text", "--out", str(file)]) == 0
    mine, theirs, accelerated = harness.read(file)
    for row in (mine, theirs, accelerated):
        assert tuple(row)[: len(video.KEYS)] == video.KEYS
        assert set(row) >= COMMON
        assert (row["bench"], row["model"], row["resolution"], row["frames"]) == ("video", "toy", "32x48", 9)
        assert row["s_per_step"] == pytest.approx(2 * row["ms_per_forward"] / 1e3, rel=1e-4)
    assert mine["run_id"] == theirs["run_id"] == accelerated["run_id"]
    assert (mine["impl"], theirs["impl"]) == ("skyreels_fast", "diffusers")
    assert (accelerated["impl"], accelerated["attention"]) == ("diffusers-accelerated", mine["attention"])
    for key in ("text_s", "vae_encode_s", "vae_decode_s", "load_s", "total_s", "ms_per_forward"):
        assert mine[key] > 0
    assert mine["total_s"] > mine["vae_decode_s"]
    assert len(mine["step_ms"]) == 1  # two steps, the first left out
    assert mine["calls"] == mine["computed_calls"] == 4 and mine["use_ret_steps"] is None
    assert theirs["total_s"] is None
    said = capsys.readouterr().out
    assert "plan: DF 48x32" in said and "times ours" in said and str(file) in said


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        (["async", "--causal_block_size=1"], 4),
        (["causal", "--causal_block_size=3"], 2),
        (["t2v"], 2),
        (["i2v"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_video_modes(mode: list[str], rows: int, tmp_path: Path):
    file = tmp_path / "video.jsonl"
    assert video.main([*TOY, "--no_warm_up", "--mode", *mode, "--out", str(file)]) == 0
    (row,) = harness.read(file)
    assert len(row["step_ms"]) == rows - 1
    assert row["mode"] == mode[0]
    assert row["vae_decode_s"] is None  # a cold one's
    assert (row["causal_block_size"], row["ar_step"]) == {
        "async": (1, 1), "causal": (3, 0), "t2v": (None, 0), "i2v": (None, 0)
    }[mode[0]]  # fmt: skip


def _of_two(rank: int, file: Path) -> int:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    return video.main([*TOY, "--no_warm_up", "--gpus", "2", "--ulysses_degree", "2", "--out", str(file)])


def test_several_processes_make_one_row(tmp_path: Path):
    assert together(2, _of_two, tmp_path / "video.jsonl") == [0, 0]
    (row,) = harness.read(tmp_path / "video.jsonl")
    assert (row["gpus"], row["layout"], len(row["ranks_peak_gib"])) == (2, "2x1x1", 2)
    assert row["ms_per_forward"] > 0 and row["vae_encode_s"] > 0


def test_few_steps_keep_all_blocks_under_way():
    """The row in the middle of an asynchronous run holds five different timesteps, as with 50 steps, 5 rows apart."""
    args = video.parser().parse_args(["--model", "1.3B", "--mode", "async", "--steps", "5"])
    work = video.work_of(args, CPU)
    schedule = peers.timestep_matrix(25, range(999, 0, -200), ar_step=work.ar_step, block=work.block)
    assert len(set(schedule.timesteps[len(schedule.timesteps) // 2])) == 5
    args.steps = 50
    assert video.work_of(args, CPU).ar_step == 5


@pytest.mark.parametrize("mode", models.MODES)
def test_published_sizes_are_planned_without_a_weight(mode: str):
    frames = "121" if mode in ("sync", "t2v", "i2v") else "97"
    args = video.parser().parse_args(["--model", "14B", "--resolution", "720P", "--frames", frames, "--mode", mode])
    work = video.work_of(args, CPU)
    described = ours.prepare(work, args, CPU).describe()
    assert "1280x720: 1 window of " in described and f"{frames} frames out" in described
    assert work.tokens == (31 if frames == "121" else 25) * 45 * 80


def test_long_videos_are_planned_in_windows():
    options = ["--model", "1.3B", "--frames", "257", "--base_frames", "97", "--overlap", "17"]
    args = video.parser().parse_args(options)
    work = video.work_of(args, CPU)
    assert "3 windows of 25" in ours.prepare(work, args, CPU).describe()
    assert work.tokens == 51_000 and not work.uniform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "100x100"], "multiples of 16"),
        (["--resolution", "540"], "HEIGHTxWIDTH"),
        (["--mode", "async", "--frames", "25"], "causal_block_size=5; nearest"),
        (["--gpus", "2"], "torchrun --nproc_per_node=2"),
        (["--weights", "tiny"], "is no toy for --mode sync (dim 256, not 128, ffn_dim 1024, not 384, "),
        (["--weights", "tiny"], "give --model tiny"),
        (["--weights", "tiny", "--mode", "i2v"], "tiny is no image-to-video model"),
        # What would do nothing.
        (["--mode", "t2v", "--ar_step", "1"], "--ar_step needs --mode async or causal"),
        (["--mode", "t2v", "--base_frames", "5"], "--base_frames needs --mode sync, async or causal"),
        (["--mode", "i2v", "--overlap", "5"], "--overlap needs --mode sync, async or causal"),
        (["--overlap", "5"], "--overlap needs --base_frames"),
        (["--base_frames", "9"], "--frames 9 are one window"),
        (["--use_ret_steps"], "--use_ret_steps needs --teacache"),
        (["--teacache"], "--teacache needs --weights"),
        (["--ulysses_degree", "1"], "--ulysses_degree needs --gpus of 2 or more"),
        (["--ring_degree", "1"], "--ring_degree needs --gpus of 2 or more"),
        (["--cfg_parallel"], "--cfg_parallel needs --gpus of 2 or more"),
        (["--no_cfg_parallel"], "--no_cfg_parallel needs --gpus of 2 or more"),
    ],
)
def test_video_errors_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture):
    assert video.main([*TOY, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "50"], "--frames: 50 frames are not 4k + 1; nearest: 49 or 53"),
        (["--base_frames", "6"], "--base_frames: 6 frames are not 4k + 1; nearest: 5 or 9"),
        (["--mode", "async", "--causal_block_size", "0"], "--causal_block_size: 0 is no whole number"),
    ],
)
def test_numbers_are_not_made_into_others(options: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="2"):
        video.main([*TOY, *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_peer_runs_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(video, "require", lambda device: None)
    assert video.main([*TOY, "--gpus", "2", "--peer", "diffusers"]) == 2
    assert "--peer needs --gpus 1" in capsys.readouterr().err


TINY = ["--model", "tiny", *TOY[2:], "--no_warm_up"]


def test_the_bundled_model_takes_a_prompt_as_long_as_it_can(tmp_path: Path):
    file = tmp_path / "video.jsonl"
    for weights in ([], ["--weights", "tiny"]):
        assert video.main([*TINY, *weights, "--steps", "1", "--out", str(file)]) == 0
    random, trained = harness.read(file)
    assert (random["weights"], trained["weights"]) == ("random", "files")
    assert random["weights_gib"] == trained["weights_gib"]


def test_teacache_says_how_many_calls_it_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(TransformerConfig, "teacache_coefficients", lambda *_: (0.0,))
    file, words = tmp_path / "video.jsonl", [*TINY, "--weights", "tiny", "--teacache", "--steps", "6"]
    assert video.main([*words, "--out", str(file)]) == 0
    assert "4 of 12 model calls were computed" in capsys.readouterr().out  # the first row and the last, twice
    assert video.main([*words, "--use_ret_steps", "--peer", "diffusers", "--out", str(file)]) == 0
    assert "diffusers: has no TeaCache" in capsys.readouterr().out
    plain, retained = harness.read(file)
    assert (plain["use_ret_steps"], plain["calls"], plain["computed_calls"]) == (False, 12, 4)
    assert (retained["use_ret_steps"], retained["calls"], retained["computed_calls"]) == (True, 12, 10)


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch):
    work = video.work_of(video.parser().parse_args(["--model", "toy"]), CPU)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "diffusers is not installed" in peers.missing("diffusers", work)


@pytest.mark.parametrize("mode", ["sync", "i2v"])
def test_the_peer_is_of_our_size(mode: str):
    pytest.importorskip("diffusers")
    work = video.work_of(video.parser().parse_args([*TOY, "--mode", mode, "--precision", "bf16"]), CPU)
    theirs = dict(peers.transformer(work, CPU).named_parameters())
    mine = models.RandomCheckpoint.of("toy", mode, CPU, torch.bfloat16, text=False).transformer_weights()
    assert sum(parameter.numel() for parameter in theirs.values()) == sum(mine[name].numel() for name in mine)
    assert theirs["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert theirs["blocks.0.scale_shift_table"].dtype == torch.float32


@pytest.mark.parametrize("options", [["--mode", "sync"], ["--mode", "causal", "--causal_block_size", "3"]])
def test_the_accelerated_peer_does_the_same_work_on_our_ops(options: list[str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("diffusers")
    from skyreels_fast.integrations import _diffusers_block

    work = video.work_of(video.parser().parse_args([*TOY, *options]), CPU)
    model = peers.transformer(work, CPU)
    with torch.inference_mode():
        torch.manual_seed(0)
        theirs = peers.forward_of(model, work, CPU, 8.0)()
        peers._accelerate(model, CPU, work.dtype)
        tokens, attend = [], _diffusers_block.attention

        def spy(q: torch.Tensor, *rest: torch.Tensor, **options) -> torch.Tensor:
            tokens.append(q.shape[1])
            return attend(q, *rest, **options)

        monkeypatch.setattr(_diffusers_block, "attention", spy)
        torch.manual_seed(0)
        ours_under_theirs = peers.forward_of(model, work, CPU, 8.0)()
    assert torch.allclose(ours_under_theirs, theirs, atol=1e-4, rtol=1e-4)
    assert tokens == [work.tokens] * 2 * work.config.num_layers
