"""The tables that `benchmarks.report` makes of rows, in Markdown.

Of each thing measured the latest row counts. "times ours" is taken within one run, where we were measured beside them,
and so stands beside what we took in that run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import compare, harness
from skyreels_fast._words import counted

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

OURS = "skyreels_fast"
EMPTY = "_Not measured yet._"
_WHAT = ("gpu", "model", "resolution", "frames", "mode", "gpus", "layout", "offload", "vram", "precision",
         "attention_asked", "guidance", "ar_step", "causal_block_size", "teacache", "use_ret_steps", "base_frames",
         "overlap", "weights", "steps")  # fmt: skip
_IMPLS = (
    OURS,
    "diffusers-accelerated",
    "diffusers",
    "diffusers-compiled",
    "reference",
    "lightx2v",
    "lightx2v-compiled",
)


def _latest(rows: Iterable[Row], keys: tuple[str, ...]) -> list[Row]:
    """The last row of each thing measured, in order of these things."""
    last = {tuple(str(row.get(key)) for key in keys): row for row in rows}
    return [last[key] for key in sorted(last)]


def _latest_video(rows: list[Row]) -> list[Row]:
    """The latest video rows, the biggest model last and ourselves before the peers.

    Each has what we took beside it, `ours_ms`, and `times_ours`. Their `steps` are None where all steps are alike, so
    that their number does not matter.
    """
    video = [row for row in rows if row["bench"] == "video"]
    video = [row | {"steps": None} if row.get("uniform", True) else row for row in video]
    ours = {(row["run_id"], *(row.get(key) for key in _WHAT[:5])): row for row in video if row["impl"] == OURS}
    latest = _latest(video, ("impl", *_WHAT))
    for row in latest:
        beside = ours.get((row["run_id"], *(row.get(key) for key in _WHAT[:5])))
        row["ours_ms"] = beside["ms_per_forward"] if beside else None
        row["times_ours"] = row["ms_per_forward"] / row["ours_ms"] if beside else None
    order = {name: place for place, name in enumerate(_IMPLS)}
    return sorted(latest, key=lambda row: (*_place(row), order.get(row["impl"], len(order)), row["gpus"]))


def _place(row: Row) -> tuple:
    return row["model"] != "1.3B", row["resolution"], row["frames"], row["mode"], row["offload"], row["teacache"] or 0


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _mode(row: Row) -> str:
    notes = [row["mode"]]
    if row["causal_block_size"]:
        notes.append(f"block {row['causal_block_size']}, ar_step {row['ar_step']}")
    if row["teacache"]:
        notes.append(f"TeaCache {row['teacache']:g}{' with use_ret_steps' if row.get('use_ret_steps') else ''}")
    if row.get("computed_calls", 0) < row.get("calls", 0):
        notes.append(f"{row['computed_calls']} of {row['calls']} calls computed")
    if row["offload"]:
        notes.append("offload")
    if row.get("vram"):
        notes.append(f"--vram {row['vram']:g}")
    if unguided(row):
        notes.append("no guidance")
    if row.get("steps"):
        notes.append(counted(row["steps"], "step"))
    return ", ".join(notes)


def _table(rows: list[Row], texts: Columns, numbers: Columns) -> str:
    """A Markdown table, columns by their heads, with a line on where its numbers come from."""
    if not rows:
        return EMPTY
    columns = {**texts, **numbers}
    rule = ["---"] * len(texts) + ["---:"] * len(numbers)
    lines = [list(columns), rule, *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _source(rows)])


def _source(rows: list[Row]) -> str:
    runs = {}
    for row in rows:
        commit = (row["commit"] or "unknown")[:10] + ("+changes" if row["dirty"] else "")
        source = row.get("source") or f"commit {commit}"
        runs[f"{row['gpu']}, torch {row['versions']['torch']}, {row['time'][:10]}, {source}"] = None
    return f"{'; '.join(runs)}."


_VIDEO: Columns = {
    "model": lambda row: row["model"],
    "video": lambda row: f"{row['resolution']}, {row['frames']} frames",
    "mode": _mode,
    "GPUs": lambda row: str(row["gpus"]),
}


def _column(key: str, digits: int = 2) -> Callable[[Row], str]:
    return lambda row: _number(row[key], digits)


def denoise_peak(row: Row) -> float | None:
    """GiB while denoising, which is all that the peers do."""
    return row.get("peaks_gib", {}).get("denoise", [row["peak_allocated_gib"]])[0]


def forward_table(rows: list[Row]) -> str:
    """One forward by us and by the peers."""
    texts = _VIDEO | {"by": lambda row: row["impl"], "attention": lambda row: row["attention"] or ""}
    numbers = {"ms a forward": _column("ms_per_forward", 0), "ours in the same run, ms": _column("ours_ms", 0)}
    numbers |= {"times ours": _column("times_ours")}
    numbers |= {"s a step": _column("s_per_step"), "peak GiB": lambda row: _number(denoise_peak(row), 1)}
    plain = [row for row in rows if row["bench"] == "video" and row["gpus"] == 1 and not row["offload"]]
    return _table(_latest_video(plain), texts, numbers)


def stages_table(rows: list[Row]) -> str:
    """Our stages on one GPU."""
    numbers = {"text s": _column("text_s"), "s a step": _column("s_per_step")}
    numbers |= {"VAE decode s": _column("vae_decode_s"), "VAE encode s": _column("vae_encode_s")}
    numbers |= {"peak GiB": _column("peak_allocated_gib", 1), "reserved GiB": _column("peak_reserved_gib", 1)}
    return _table([row for row in _latest_video(rows) if (row["impl"], row["gpus"]) == (OURS, 1)], _VIDEO, numbers)


def parallel_table(rows: list[Row]) -> str:
    """Several GPUs beside one, of what was measured on several.

    GPUs that compute a single branch are shown as half of twice as many, beside one GPU that computes both: what two
    such halves would take, but for the exchange between them.
    """
    ours = [row for row in _latest_video(rows) if row["impl"] == OURS]
    alone = [row for row in ours if row["gpus"] == 1]
    single = {_alike(row): row["s_per_step"] for row in alone}
    guided = {_alike(row, but="guidance"): _alike(row) for row in alone if not unguided(row)}

    def work(row: Row) -> tuple[str, ...]:
        """What a row is a part of, or all: without guidance that with guidance, where one GPU has done it."""
        return guided.get(_alike(row, but="guidance"), _alike(row)) if unguided(row) else _alike(row)

    def is_half(row: Row) -> bool:
        return row["gpus"] > 1 and work(row) != _alike(row)

    def times_one(row: Row) -> float | None:
        one = single.get(work(row))
        return None if one is None else one / row["s_per_step"]

    def linear(row: Row) -> str:
        gpus = row["gpus"] * (2 if is_half(row) else 1)
        return "" if (times := times_one(row)) is None else f"{times / gpus:.0%}"

    texts: Columns = {
        **_VIDEO,
        "GPUs": lambda row: f"{row['gpus']}, as half of {2 * row['gpus']}" if is_half(row) else str(row["gpus"]),
        "ulysses × ring × branches": lambda row: " × ".join((row.get("layout") or "1x1x1").split("x")),
    }
    numbers: Columns = {"s a step": _column("s_per_step"), "times one GPU": lambda row: _number(times_one(row), 2)}
    numbers |= {"of linear": linear, "VAE decode s": _column("vae_decode_s")}
    numbers |= {"peak GiB a GPU": _column("peak_allocated_gib", 1)}
    several = {work(row) for row in ours if row["gpus"] > 1}
    return _table([row for row in ours if row["gpus"] > 1 or _alike(row) in several], texts, numbers)


def unguided(row: Row) -> bool:
    return row.get("guidance") == 1


def _alike(row: Row, *, but: str = "") -> tuple[str, ...]:
    """What rows have in common that differ in their GPUs alone, or in one key besides."""
    return tuple(str(row.get(key)) for key in _WHAT if key not in ("gpus", "layout", but))


def ops_table(rows: list[Row]) -> str:
    """Each kernel that is no yardstick itself; its rate is what bounds it, bytes or arithmetic."""

    def rate(row: Row) -> str:
        return f"{row['gbps']:,.0f} GB/s" if harness.memory_bound(row) else f"{row['tflops']:,.0f} TFLOP/s"

    latest = _latest((row for row in rows if row["bench"] == "ops"), ("op", "variant", "dtype", "shape", "impl", "gpu"))
    texts: Columns = {
        "op": lambda row: " ".join(filter(None, (row["op"], row["variant"] and f"({row['variant']})"))),
        "shape": lambda row: "×".join(map(str, row["shape"])),
        "dtype": lambda row: row["dtype"],
        "kernel": lambda row: row["impl"],
    }
    numbers: Columns = {
        "µs": _column("us_median", 0),
        "rate": rate,
        "of copy": lambda row: f"{row['share_of_copy']:.0%}" if harness.memory_bound(row) else "",
        "× eager": _column("x_eager"),
        "× compiled": _column("x_compiled"),
    }
    return _table([row for row in latest if row["impl"] not in compare.YARDSTICKS], texts, numbers)


def breakdown_table(rows: list[Row]) -> str:
    """Where the time of a forward goes."""
    latest = _latest((row for row in rows if row["bench"] == "breakdown"), ("model", "part", "gpu"))
    latest.sort(key=lambda row: (row["model"] != "1.3B", -row["ms"]))
    texts: Columns = {"model": lambda row: row["model"], "part": lambda row: row["part"]}
    numbers: Columns = {"ms": _column("ms", 1), "share": lambda row: f"{row['ms'] / row['forward_ms']:.1%}"}
    numbers |= {"ms at least": _column("floor_ms", 1)}
    numbers |= {"times": lambda row: _number(row["floor_ms"] and row["ms"] / row["floor_ms"], 2)}
    return _table(latest, texts, numbers)


def algorithms_table(rows: list[Row]) -> str:
    """Torch's matrix products beside the fastest algorithm that cuBLASLt offers for them."""
    what = ("model", "rows", "inner", "outer", "gelu")
    measured = [row for row in rows if row["bench"] == "algorithms"]
    offered = [row for row in measured if row["impl"] != "torch"]
    lines = []
    for row in _latest((row for row in measured if row["impl"] == "torch"), (*what, "gpu")):
        others = [one for one in offered if all(one[key] == row[key] for key in (*what, "run_id"))]
        lines.append(row | {"best_ms": min((one["ms_median"] for one in others), default=None)})
    lines.sort(key=lambda row: (row["model"] != "1.3B", row["rows"], row["inner"], row["outer"]))
    texts: Columns = {
        "model": lambda row: row["model"],
        "product": lambda row: f"{row['rows']:,} × {row['inner']} → {row['outer']}{', GELU' if row['gelu'] else ''}",
    }
    numbers: Columns = {"torch ms": _column("ms_median", 3), "TFLOP/s": _column("tflops", 0)}
    numbers |= {"best of cuBLASLt's, ms": _column("best_ms", 3)}
    return _table(lines, texts, numbers)


def loading_table(rows: list[Row]) -> str:
    """Loading a model's weights beside reading its file."""
    measured = [row for row in rows if row["bench"] == "loading" and row["way"] != "read"]
    texts: Columns = {
        "model": lambda row: f"{row['model']}, {row['bytes'] / 1e9:.1f} GB",
        "weights go": lambda row: {"resident": "to the GPU", "offload": "to pinned host memory"}[row["way"]],
        "page cache": lambda row: row["cache"],
    }
    reads = {(row["run_id"], row["cache"]): row for row in rows if row["bench"] == "loading" and row["way"] == "read"}

    def alone(row: Row) -> float | None:
        return reads.get((row["run_id"], row["cache"]), {}).get("seconds")

    numbers: Columns = {"s": _column("seconds"), "GB/s": _column("gb_per_s", 1)}
    numbers |= {"reading the file alone, s": lambda row: _number(alone(row), 2)}
    numbers |= {"PCIe alone, s": lambda row: _number(row["bytes"] / row["pcie_gb_per_s"] / 1e9, 2)}
    return _table(_latest(measured, ("model", "way", "cache", "gpu")), texts, numbers)


def fidelity_table(rows: list[Row]) -> str:
    """What bfloat16 costs the VAE."""
    latest = _latest((row for row in rows if row["bench"] == "fidelity"), ("video", "gpu"))
    texts: Columns = {
        "video": lambda row: row["video"],
        "size": lambda row: f"{row['width']}×{row['height']}, {row['frames']} frames",
    }
    numbers: Columns = {"decoded, dB": _column("decoded_db", 1), "encoded and decoded, dB": _column("both_db", 1)}
    return _table(latest, texts, numbers)


def hostmemory_table(rows: list[Row]) -> str:
    """What a command takes of host memory, by the length of its video."""
    latest = _latest((row for row in rows if row["bench"] == "hostmemory"), ("model_id", "frames"))
    latest.sort(key=lambda row: row["frames"])
    texts: Columns = {"model": lambda row: row["model_id"], "frames": lambda row: f"{row['frames']:,}"}
    return _table(latest, texts, {"peak host memory, MiB": _column("peak_host_mib", 0)})


def products_table(rows: list[Row]) -> str:
    """The ways to take a block's products, the forward's in bold."""
    latest = _latest((row for row in rows if row["bench"] == "products"), ("model", "op", "impl", "gpu"))
    ways = Counter((row["model"], row["op"]) for row in latest)
    shown = [row for row in latest if ways[row["model"], row["op"]] > 1]
    shown.sort(key=lambda row: (row["model"] != "1.3B", row["op"], row["ms_median"]))
    texts: Columns = {
        "model": lambda row: row["model"],
        "product": lambda row: row["op"],
        "taken as": lambda row: f"**{row['impl']}**" if row["chosen"] else row["impl"],
    }
    return _table(shown, texts, {"ms": _column("ms_median", 2), "MHz": _column("sm_mhz", 0)})


def power_table(rows: list[Row]) -> str:
    """The clock that a GPU at its power limit keeps."""
    latest = _latest((row for row in rows if row["bench"] == "power"), ("what", "gpu"))
    texts: Columns = {"what": lambda row: row["what"]}
    numbers: Columns = {"samples": _column("samples", 0), "W": _column("watts", 0), "MHz": _column("sm_mhz", 0)}
    numbers |= {"p20 to p80": lambda row: f"{row['sm_mhz_p20']:,} to {row['sm_mhz_p80']:,}"}
    return _table(latest, texts, numbers | {"at most": _column("most_mhz", 0)})


TABLES = {
    "forward": forward_table,
    "stages": stages_table,
    "parallel": parallel_table,
    "ops": ops_table,
    "breakdown": breakdown_table,
    "algorithms": algorithms_table,
    "loading": loading_table,
    "fidelity": fidelity_table,
    "hostmemory": hostmemory_table,
    "products": products_table,
    "power": power_table,
}
