"""What is made of benchmark rows: the README's tables and plots, and the comparison of two files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import compare, harness, plots, report, tables, video

COMMON = ("run_id", "time", "gpu", "versions", "commit", "dirty")


def video_row(impl: str = "skyreels_fast", **values) -> dict:
    row = dict.fromkeys(video.KEYS) | {
        "bench": "video", "impl": impl, "model": "14B", "resolution": "540P", "frames": 97, "mode": "sync", "gpus": 1,
        "offload": False, "precision": "bf16", "attention": "fa3", "ms_per_forward": 4700.0, "s_per_step": 9.4,
        "ms_per_forward_p20": 4690.0, "ms_per_forward_p80": 4710.0, "vae_decode_s": 1.3, "vae_encode_s": 0.8,
        "peak_allocated_gib": 32.5, "peak_reserved_gib": 33.0, "run_id": "a", "gpu": "NVIDIA H200", "commit": "c" * 40,
        "versions": {"torch": "2.11.0"}, "time": "2026-11-22T10:00:00+00:00", "dirty": False, "ar_step": 0,
        "causal_block_size": None, "teacache": None, "steps": 3, "uniform": True, "weights": "random",
    }  # fmt: skip
    return row | values


def op_row(impl: str = "cuda", us: float = 100.0, **values) -> dict:
    row = {
        "bench": "ops", "impl": impl, "op": "norm_scale_shift", "variant": "", "shape": [1, 51000, 1536], "frames": 25,
        "dtype": "bfloat16", "us_median": us, "us_p20": us - 1, "us_p80": us + 1, "gbps": 3900.0, "tflops": 7.0,
        "share_of_copy": 0.92, "bytes": 3e8, "flops": 7e8, "x_eager": 5.1, "x_compiled": 1.25, "block_tokens": None,
    }  # fmt: skip
    return row | {key: video_row()[key] for key in COMMON} | values


README = """# Title
<!-- benchmarks:forward -->
<!-- /benchmarks:forward -->
between
<!-- benchmarks:ops -->
old
<!-- /benchmarks:ops -->
<!-- benchmarks:plots -->
<!-- /benchmarks:plots -->
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A repository with committed results, and one file that is not committed."""
    directory = tmp_path / "benchmarks" / "results"
    rows = [
        video_row(),
        video_row("diffusers-compiled", ms_per_forward=5875.0, attention="cudnn", peak_allocated_gib=35.6),
        video_row(ms_per_forward=4600.0, run_id="b", time="2026-11-23T10:00:00+00:00"),
        video_row(gpu="cpu", ms_per_forward=1.0, time="2026-11-24T10:00:00+00:00"),
    ]
    for row in rows:
        harness.append(directory / "video.jsonl", row)
    for row in (op_row(), op_row("ref", 510.0), op_row("triton", 104.0)):
        harness.append(directory / "ops.jsonl", row)
    harness.append(directory / "draft.jsonl", video_row(model="1.3B"))
    for command in (["init", "-q"], ["add", str(directory / "ops.jsonl"), str(directory / "video.jsonl")]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "README.md").write_text(README)
    return directory


def test_several_gpus_beside_one():
    alone, other = video_row(), video_row(model="1.3B")
    two = video_row(gpus=2, layout="1x1x2", s_per_step=4.7, ms_per_forward=2350.0)
    four = video_row(gpus=4, layout="2x1x2", s_per_step=2.5, ms_per_forward=1250.0)
    lines = tables.parallel_table([alone, other, two, four]).splitlines()
    assert lines[2:5] == [
        "| 14B | 540P, 97 frames | sync | 1 | 1 × 1 × 1 | 9.40 | 1.00 | 100% | 1.30 | 32.5 |",
        "| 14B | 540P, 97 frames | sync | 2 | 1 × 1 × 2 | 4.70 | 2.00 | 100% | 1.30 | 32.5 |",
        "| 14B | 540P, 97 frames | sync | 4 | 2 × 1 × 2 | 2.50 | 3.76 | 94% | 1.30 | 32.5 |",
    ]
    assert tables.parallel_table([alone, other]) == tables.EMPTY
    assert "| 2 | 1 × 1 × 2 | 4.70 |  |  |" in tables.parallel_table([two])


def test_gpus_with_one_branch_are_half_of_twice_as_many() -> None:
    alone = video_row(s_per_step=10.0, guidance=6.0)
    half = video_row(s_per_step=2.6, gpus=2, layout="2x1x1", guidance=1.0)
    both = tables.parallel_table([alone, half])
    assert "| 1 | 1 × 1 × 1 | 10.00 | 1.00 | 100% |" in both
    assert "| 2, as half of 4 | 2 × 1 × 1 | 2.60 | 3.85 | 96% |" in both
    assert "| 2 | 2 × 1 × 1 | 2.60 |  |  |" in tables.parallel_table([half])
    own = video_row(s_per_step=5.0, guidance=1.0)
    assert "| 2 | 2 × 1 × 1 | 2.60 | 1.92 | 96% |" in tables.parallel_table([own, half])


def test_tables_are_made_from_committed_rows(results: Path, capsys: pytest.CaptureFixture):
    rows = report.committed_rows(results)
    assert "draft.jsonl" in capsys.readouterr().err
    assert tables.forward_table(rows).splitlines() == [
        "| model | video | mode | GPUs | by | attention | ms a forward | ours in the same run, ms | times ours "
        "| s a step | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| 14B | 540P, 97 frames | sync | 1 | skyreels_fast | fa3 | 4,600 | 4,600 | 1.00 | 9.40 | 32.5 |",
        "| 14B | 540P, 97 frames | sync | 1 | diffusers-compiled | cudnn | 5,875 | 4,700 | 1.25 | 9.40 | 35.6 |",
        "",
        "NVIDIA H200, torch 2.11.0, 2026-11-23, commit cccccccccc; NVIDIA H200, torch 2.11.0, 2026-11-22, "
        "commit cccccccccc.",
    ]
    table = tables.ops_table(rows)
    assert "| norm_scale_shift | 1×51000×1536 | bfloat16 | cuda | 100 | 3,900 GB/s | 92% | 5.10 | 1.25 |" in table
    assert "| triton | 104 |" in table and "| ref |" not in table
    assert "| 14B | 540P, 97 frames | sync | 1 |  | 9.40 | 1.30 | 0.80 | 32.5 | 33.0 |" in tables.stages_table(rows)
    assert tables.ops_table([]) == tables.EMPTY


def test_what_is_compared_can_be_recomputed() -> None:
    """In the README, from the numbers that stand beside each other."""
    lines = tables.forward_table(report.committed_rows(harness.RESULTS)).splitlines()[2:-2]
    cells = [[cell.strip().replace(",", "") for cell in line.split("|")][7:10] for line in lines]
    compared = [[float(cell) for cell in row] for row in cells if row[-1]]
    assert len(compared) > 10
    for theirs, ours, ratio in compared:
        assert ratio == pytest.approx(theirs / ours, abs=0.0065)


def test_rows_of_unlike_steps_are_told_apart_by_their_number() -> None:
    alike = [video_row(steps=3, ms_per_forward=4700.0), video_row(steps=5, ms_per_forward=4600.0)]
    assert "4,700" not in tables.forward_table(alike) and "4,600" in tables.forward_table(alike)
    two = video_row(gpus=2, layout="2x1x1", steps=2, s_per_step=4.7)
    assert "| 2 | 2 × 1 × 1 | 4.70 | 2.00 |" in tables.parallel_table([*alike, two])
    cached = {"teacache": 0.2, "uniform": False, "calls": 60, "computed_calls": 24}
    rows = [
        video_row(**cached | {"steps": 30, "use_ret_steps": False}),
        video_row(**cached | {"steps": 30, "use_ret_steps": True}),
        video_row(**cached | {"steps": 50}),
    ]
    table = tables.forward_table(rows)
    assert "| sync, TeaCache 0.2, 24 of 60 calls computed, 30 steps |" in table
    assert "| sync, TeaCache 0.2 with use_ret_steps, 24 of 60 calls computed, 30 steps |" in table
    assert "| sync, TeaCache 0.2, 24 of 60 calls computed, 50 steps |" in table


def test_readme_is_written_and_checked(results: Path):
    pytest.importorskip("matplotlib")
    readme = results.parents[1] / "README.md"
    options = ["--results", str(results), "--readme", str(readme)]
    assert report.main([*options, "--check"]) == 1
    assert report.main([*options, "--write"]) == 0
    assert report.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and "\nbetween\n" in text and "\nold\n" not in text
    for name in ("latency", "memory"):
        assert f"(benchmarks/results/{name}.png)" in text
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    readme.write_text(text.replace("4,600", "4,500"))
    assert report.main([*options, "--check"]) == 1


@pytest.mark.parametrize("text", ["no markers", "<!-- benchmarks:unheard -->\n<!-- /benchmarks:unheard -->"])
def test_a_readme_without_markers_is_an_error(results: Path, text: str, capsys: pytest.CaptureFixture):
    readme = results.parents[1] / "README.md"
    readme.write_text(text)
    assert report.main(["--results", str(results), "--readme", str(readme), "--check"]) == 2
    assert "README.md: " in capsys.readouterr().err


def test_bars_stand_beside_each_other():
    """Lone forwards of one run: ours without a peer does not count; what was measured apart does, at its best."""
    lone = {"model": "1.3B", "guidance": 1.0}
    apart = lone | {"run_id": "p", "source": "measured apart"}
    later = "2026-11-23T10:00:00+00:00"
    rows = [
        video_row(),
        video_row("diffusers", ms_per_forward=7000.0),
        video_row(ms_per_forward=930.0, run_id="b", **lone),
        video_row("diffusers-compiled", ms_per_forward=1100.0, run_id="b", **lone),
        video_row(ms_per_forward=900.0, run_id="c", time=later, **lone),
        video_row(model="1.3B", ms_per_forward=910.0, run_id="d", time=later),  # half of a step
        video_row("diffusers-compiled", model="1.3B", ms_per_forward=1110.0, run_id="d", time=later),
        video_row("reference", ms_per_forward=1784.0, **apart),
        video_row("reference", ms_per_forward=1277.0, **apart),
        video_row("lightx2v", mode="t2v", ms_per_forward=950.0, **apart),
        video_row("lightx2v-compiled", mode="t2v", ms_per_forward=943.0, **apart),
        video_row(resolution="720P", frames=121, ms_per_forward=1.0),  # with nobody beside it
        video_row(offload=True, ms_per_forward=1.0),
        video_row(mode="async", ms_per_forward=1.0),
    ]
    groups, heights = plots.bars(rows, "ms_per_forward")
    assert list(map(str, groups)) == ["1.3B 540P\n97 frames, no guidance", "14B 540P\n97 frames, with guidance"]
    assert heights == {
        "skyreels_fast": [930.0, 4700.0],
        "diffusers-compiled": [1100.0, None],
        "diffusers": [None, 7000.0],
        "reference": [1277.0, None],
        "lightx2v": [943.0, None],
    }


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (op_row(us=100), op_row(us=110), "worse"),
        (op_row(us=110), op_row(us=100), "better"),
        (op_row(us=100), op_row(us=102.9), "same"),  # within 3 %
        (op_row(us=100, us_p80=115), op_row(us=110), "same"),  # within the spread
        (op_row(us=100), op_row(us=110, us_p20=95), "same"),
        (video_row(), video_row(ms_per_forward=4900.0, ms_per_forward_p20=4890.0), "worse"),
        (video_row(), video_row(peak_allocated_gib=34.0), "worse"),
        (video_row(), video_row(peak_allocated_gib=31.0), "better"),
        (video_row(uniform=False), video_row(uniform=False, ms_per_forward=4900.0), "worse"),
    ],
)
def test_noise_is_no_change(before: dict, after: dict, expected: str):
    verdicts = {change.verdict for change in compare.changes([before], [after])}
    assert verdicts <= {"same", expected} and (expected in verdicts)
    assert compare.report([before], [after])[1] == (expected == "worse")


def test_two_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture):
    base, new = tmp_path / "base.jsonl", tmp_path / "new.jsonl"
    for row in (op_row(us=100), op_row("ref", 500), video_row(), video_row(mode="async")):
        harness.append(base, row)
    # An earlier row of the same thing does not count, and a slower yardstick is no regression of ours.
    for row in (op_row(us=150), op_row(us=100), op_row("ref", 600), video_row()):
        harness.append(new, row)
    assert report.main(["--base", str(base), str(new)]) == 0
    said = capsys.readouterr().out
    assert "worse" in said and "(a yardstick)" in said and "0 worse beyond noise" in said
    assert "absent" in said and "async" in said
    harness.append(new, op_row(us=120))
    assert report.main(["--base", str(base), str(new)]) == 1
    assert "us_median 100 -> 120 (+20.0 %)" in capsys.readouterr().out
    assert report.main(["--base", str(new), str(base)]) == 0
    assert "better" in capsys.readouterr().out
    assert report.main(["--base", str(base), str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize(
    ("key", "values"),
    [("layout", ("1x2x1", "2x1x1")), ("use_ret_steps", (False, True)), ("steps", (30, 50)), ("overlap", (17, 37))],
)
def test_unlike_work_is_not_compared(key: str, values: tuple):
    base = [video_row(**{key: value, "ms_per_forward": ms}) for value, ms in zip(values, (2600.0, 2700.0), strict=True)]
    assert {change.verdict for change in compare.changes(base, base[::-1])} == {"same"}
    with pytest.raises(ValueError, match="measures what"):
        compare.changes(base[:1], base[1:])
    text, worse = compare.report(base, base[:1])
    assert not worse and "absent skyreels_fast 14B" in text


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="same GPU"):
        compare.changes([op_row()], [op_row(gpu="NVIDIA A100")])


def test_where_the_time_goes_and_what_others_take():
    common = {key: video_row()[key] for key in COMMON}
    parts = [("norms", 20.0, 10.0), ("all else", 1.0, None)]
    rows = [
        {"bench": "breakdown", "model": "14B", "part": part, "ms": ms, "floor_ms": least, "forward_ms": 40.0, **common}
        for part, ms, least in parts
    ]
    table = tables.breakdown_table(rows).splitlines()
    assert table[2:4] == ["| 14B | norms | 20.0 | 50.0% | 10.0 | 2.00 |", "| 14B | all else | 1.0 | 2.5% |  |  |"]

    product = {
        "bench": "algorithms",
        "model": "14B",
        "rows": 51000,
        "inner": 5120,
        "outer": 13824,
        "gelu": True,
        **common,
    }
    times = {"torch": 11.0, "cublasLt #0": 11.1, "cublasLt #1": 10.5}
    rows = [product | {"impl": impl, "ms_median": ms, "tflops": 7220 / ms} for impl, ms in times.items()]
    assert "| 14B | 51,000 × 5120 → 13824, GELU | 11.000 | 656 | 10.500 |" in tables.algorithms_table(rows)

    loaded = {"bench": "loading", "model": "14B", "cache": "cold", "bytes": 28.6e9, "gb_per_s": 1.5}
    loaded |= common | {"pcie_gb_per_s": 55.0}
    rows = [loaded | {"way": way, "seconds": seconds} for way, seconds in (("read", 20.0), ("resident", 16.0))]
    assert "| 14B, 28.6 GB | to the GPU | cold | 16.00 | 1.5 | 20.00 | 0.52 |" in tables.loading_table(rows)
