"""The benchmarks' harness, and ops on toy sizes: statistics, rows, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import rel_l2

from benchmarks import breakdown, cases, fidelity, floor, harness, ops, products, vae_layers
from benchmarks.correctness import RedError, require_within_twice
from benchmarks.harness import Timing
from benchmarks.models import config
from skyreels_fast.ops import residual_reuse
from skyreels_fast.ops.attention import attention

CPU = torch.device("cpu")
COMMON = {"run_id", "time", "gpu", "versions", "commit", "dirty"}


def test_timing_is_median_and_percentiles():
    assert Timing.of([5, 1, 4, 2, 3, 6]) == Timing(median=3.5, p20=2.0, p80=5.0, repeats=6)
    with pytest.raises(ValueError, match="no repeat"):
        Timing.of([])


def test_measure_warms_up_and_keeps_within_its_budget():
    calls = []

    def work():
        calls.append(1)
        time.sleep(0.002)

    timing = harness.measure(work, CPU, budget_s=0.03, repeats=(3, 50), warm_up=2)
    assert 3 <= timing.repeats <= 15
    assert len(calls) == timing.repeats + 2
    assert 0.002 <= timing.p20 <= timing.median <= timing.p80
    assert harness.measure(lambda: None, CPU, repeats=(3, 7)).repeats == 7


def test_rows_are_json_lines(tmp_path: Path):
    file = tmp_path / "results" / "x.jsonl"
    harness.append(file, {"bench": "ops", "us": 1 / 3, "pair": (1.0, None)})
    harness.append(file, {"bench": "ops", "us": 2})
    assert harness.read(file) == [{"bench": "ops", "us": 0.333333, "pair": [1.0, None]}, {"bench": "ops", "us": 2}]
    with pytest.raises(ValueError, match="JSON"):
        harness.append(file, {"bench": "ops", "us": float("nan")})
    assert len(harness.read(file)) == 2
    for bad in ("{", "3", '{"impl": "x"}'):
        file.write_text('{"bench": "ops"}\n' + bad + "\n")
        with pytest.raises(ValueError, match=r"x\.jsonl:2"):
            harness.read(file)


def test_rows_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch):
    harness.commit.cache_clear()
    monkeypatch.setenv(harness.COMMIT_VARIABLE, "0123abc-dirty")
    row = harness.common(CPU)
    harness.commit.cache_clear()
    assert set(row) == COMMON
    assert (row["commit"], row["dirty"], row["gpu"]) == ("0123abc", True, "cpu")
    assert row["run_id"] == harness.common(CPU)["run_id"]
    assert {"python", "torch", "cuda", "driver", "triton", "extension"} <= set(row["versions"])
    json.dumps(row)


def test_there_are_no_peaks_on_a_cpu():
    assert harness.peaks_gib(CPU) == (None, None)


def test_the_rule_is_by_token_too():
    exact = torch.randn(1, 6, 64, dtype=torch.float64)
    exact[:, 0] *= 100  # its error is allowed to be as large; that of the others is not
    low = exact.bfloat16()
    require_within_twice("op", low, low, exact)
    wrong = low.clone()
    wrong[0, 3, 5] += 0.2
    assert (wrong.double() - exact).abs().amax() < (low.double() - exact).abs().amax() * 2
    with pytest.raises(RedError, match="1 of 6 tokens"):
        require_within_twice("op", wrong, low, exact)
    with pytest.raises(RedError):
        require_within_twice("op", low * torch.nan, low, exact)


def toy_cases(family: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, cases.Case]:
    made = cases.CASES[family]((5, 2, 3), 128, 64, dtype, CPU)
    return {" ".join(filter(None, (case.op, case.variant))): case for case in made}


@pytest.mark.parametrize("family", cases.CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_case_runs_and_its_reference_passes(family: str, dtype: torch.dtype):
    for case in toy_cases(family, dtype).values():
        outputs = case.function(**case.args, backend="ref")
        case.check("ref", outputs)
        first, eager = (value[0] if isinstance(value, tuple) else value for value in (outputs, case.eager[1]()))
        if case.op == "attention":
            eager = eager.transpose(1, 2)
        assert rel_l2(eager, first) < 1e-2
        assert case.dtype == str(dtype).removeprefix("torch.")
        assert min(case.cost) > 0
        tensors = [value for value in case.args.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.count_nonzero() > 0.99 * tensor.numel() for tensor in tensors)


def test_a_wrong_frame_is_red():
    case = toy_cases("adaln")["scale_residual_norm_scale_shift gated, addend, modulated"]
    total, y = case.function(**case.args)
    y[:, -1] += 0.5
    with pytest.raises(RedError, match="modulated 1x30x128 triton"):
        case.check("triton", (total, y))


def test_attention_that_sees_too_much_is_red():
    case = toy_cases("attention")["attention block-causal"]
    dense = attention(*(case.args[name] for name in "qkv"))
    with pytest.raises(RedError):
        case.check("fa", dense)


def test_rope_at_the_wrong_frame_is_red():
    case = toy_cases("qk_norm_rope3d")["qk_norm_rope3d"]
    with pytest.raises(RedError):
        case.check("triton", case.function(**case.args, frame_offset=1))


def test_ops_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "ops.jsonl"
    options = ["--grid", "5x2x3", "--dim", "64", "--head_dim", "32", "--no_compile", "--out", str(file)]
    assert ops.main([*options, "--device", "cpu"]) == 0
    rows = harness.read(file)
    assert {row["op"] for row in rows} >= {"norm_scale_shift", "qk_norm", "qk_norm_rope3d", "attention", "relative_l1"}
    assert len({row["run_id"] for row in rows}) == 1
    for row in rows:
        assert set(row) >= COMMON | {"bench", "impl", "op", "shape", "dtype", "us_median", "us_p20", "us_p80"}
        assert row["us_p20"] <= row["us_median"] <= row["us_p80"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us_median"] / 1e3, rel=1e-4)
        assert row["tflops"] == pytest.approx(row["flops"] / row["us_median"] / 1e6, rel=1e-4)
        assert row["share_of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"], rel=1e-4)
        assert row["x_compiled"] is None
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2


def test_no_time_is_taken_of_a_red_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(cases, "_backends", lambda *_: ["ref", "triton"])
    monkeypatch.setattr(residual_reuse, "residual_add", lambda x, residual, backend: x + 1.1 * residual)
    monkeypatch.setattr(residual_reuse, "residual_save", lambda after, before, backend: after - before)
    file = tmp_path / "ops.jsonl"
    options = ["--op", "residual_reuse", "--grid", "2x2x2", "--dim", "128", "--no_compile", "--out", str(file)]
    assert ops.main([*options, "--device", "cpu"]) == 1
    timed = {(row["op"], row["impl"]) for row in harness.read(file)}
    assert ("residual_add", "triton") not in timed and ("residual_add", "ref") in timed
    assert ("residual_save", "triton") in timed
    said = capsys.readouterr().out
    assert "REFUSED  residual_add 1x8x128 triton: largest error" in said
    # The third op's kernel is asked for and not there, which is nobody's fault.
    assert "relative_l1" in said and "FAILED" not in said


@pytest.mark.parametrize("options", [["--grid", "5x2"], ["--grid", "5x0x1"], ["--dim", "100"], ["--head_dim", "0"]])
def test_ops_says_what_is_wrong(options: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="2"):
        ops.main(options)
    assert options[1].split("x")[0] in capsys.readouterr().err


def test_every_way_to_convolve_is_timed_once_it_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(vae_layers, "LEVELS", ((2, 32),))
    file = tmp_path / "rows.jsonl"
    words = ["--size", "1x2", "--dtype", "float32", "--device", "cpu", "--out", str(file)]
    assert vae_layers.main(words) == 0
    rows = harness.read(file)
    timed = {row["impl"] for row in rows if "refused" not in row}
    assert {"op, conv2d", "op, conv3d", "3 conv2d, added up", "conv3d, 6 frames, alone", "op"} <= timed
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
    for row in rows:
        assert row.keys() >= COMMON | {"shape", "bytes", "flops"}
        assert "refused" in row or row["us_median"] > 0

    monkeypatch.setattr(vae_layers, "causal_conv3d", lambda frames, *_args, **_options: torch.zeros_like(frames[0]))
    refused = {row["impl"] for row in vae_layers.rows_of((1, 2), torch.float32, CPU) if "refused" in row}
    assert refused == {"op, triton", "op, conv2d", "op, conv3d"}


def test_host_memory_that_grows_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import hostmemory

    peaks = {"145": 1000.0, "289": 1040.0, "577": 1070.0}
    asked: list[str] = []

    def run(words: list[str]) -> dict[str, float]:
        asked.extend(words)
        return {"peak_host_mib": peaks[words[-1]], "seconds": 1.0}

    monkeypatch.setattr(hostmemory, "run", run)
    out = tmp_path / "rows.jsonl"
    assert hostmemory.main(["--frames", "145", "289", "--out", str(out)]) == 0
    assert hostmemory.main(["--frames", "145", "577", "--out", str(out)]) == 1
    rows = harness.read(out)
    assert [(row["bench"], row["frames"], row["peak_host_mib"]) for row in rows[:2]] == [
        ("hostmemory", 145, 1000.0),
        ("hostmemory", 289, 1040.0),
    ]
    assert "--overlap_history" in asked


def test_every_way_to_take_a_product_gives_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(products, "WIDTHS", {"1.3B": (16, 24)})
    file = tmp_path / "rows.jsonl"
    words = ["--tokens", "12", "--seconds", "0.01", "--dtype", "float32", "--device", "cpu", "--out", str(file)]
    assert products.main(words) == 0
    rows = harness.read(file)
    assert {(row["op"], row["impl"]) for row in rows if row["chosen"]} == {
        ("q, k, v", "three products"), ("square", "linear"), ("feed-forward", "3 chunks"),
        ("text", "weights of few keys"),
    }  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
    assert all(row.keys() >= COMMON and row["tflops"] > 0 for row in rows)


def test_the_ways_to_take_a_product_agree() -> None:
    torch.manual_seed(0)
    outs: dict[str, list[torch.Tensor]] = {}
    for form in products.forms_of(12, 16, 24, CPU, torch.float64):
        out = form.run()
        if isinstance(out, (list, torch.Tensor)):
            outs.setdefault(form.op, []).append(torch.cat(out, 1) if isinstance(out, list) else out)
    counts = {op: len(found) for op, found in outs.items()}
    assert counts["q, k, v"] == 2 and counts["text"] == 3
    for found in outs.values():
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


def test_kernels_are_told_apart_by_what_they_do():
    names = {
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90>": breakdown.SELF,
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": breakdown.SELF,
        "nvjet_sm90_tst_256x152_64x4_bias_TNT": breakdown.PRODUCTS,
        "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64>": breakdown.PRODUCTS,
        "_adaln_kernel": breakdown.NORMS,
        "void skyreels_fast::(anonymous namespace)::norm_kernel<8>": breakdown.ROPE,
        "Memset (Device)": breakdown.OTHER,
    }
    assert {name: breakdown.part_of(name) for name in names} == names
    kernels = [breakdown.Kernel("flash", 80.0), breakdown.Kernel("fmha", 0.5), breakdown.Kernel("flash", 79.0)]
    parts = breakdown.by_part(kernels)
    assert parts[breakdown.SELF] == [80.0, 79.0] and parts[breakdown.CONTEXT] == [0.5]


def test_the_floor_of_each_part_is_its_work_at_a_rate():
    cfg, tokens = config("14B", "sync"), 51_000
    floors = breakdown.floors_ms(cfg, (25, 34, 60), copy_gbps=4000.0)
    assert floors[breakdown.SELF] == pytest.approx(40 * 4 * 5120 * tokens**2 / floor.ATTENTION_TFLOPS / 1e9)
    residuals = 40 * tokens * 5120 * 2 * 14 / 4000e6  # tensors of bfloat16, a float32 one as two
    assert floors[breakdown.NORMS] == pytest.approx(residuals, rel=0.01)  # and the modulation of each frame
    least = floor.forward_ms(cfg, (25, 34, 60), gpu="NVIDIA H200")
    products = floor.products_ms(cfg, tokens)
    assert floors[breakdown.SELF] + products == pytest.approx(least, rel=0.01)
    saved = 40 * 2 * tokens * 5120 * 40 * (128 - 104) / 822e9  # 104 weights a head are projected, not 128 channels
    assert floors[breakdown.PRODUCTS] == pytest.approx(products - saved)
    assert floors[breakdown.OTHER] is None


def test_a_camera_moves_over_a_picture():
    x = torch.linspace(-1, 1, 60).expand(1, 3, 40, 60)
    video = fidelity.pan(x, 5, (32, 48))
    assert video.shape == (1, 3, 5, 32, 48)
    brightness = video.mean((0, 1, 3, 4))
    assert (brightness.diff() > 0).all() and brightness[2].abs() < 1e-3  # from left to right, through the middle
    spread = video[0, 0, :, 16, -1] - video[0, 0, :, 16, 0]
    assert (spread.diff() < 0).all() and spread[0] > 1.5  # and nearer
    assert fidelity.psnr_db(video, video + 0.02) == pytest.approx(40, abs=1e-3)
