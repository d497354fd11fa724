"""Did anything get slower, or hungrier, from one file of rows to another?

Rows are paired by what they measured and where (`IDENTITY`), the last of each file counting. A number got worse when it
grew by more than NOISE and, where both rows tell their spread, the new 20th percentile lies above the old 80th.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

NOISE = 0.03
YARDSTICKS = ("ref", "ref-compiled", "torch-sdpa", "diffusers", "diffusers-compiled")  # what we compare ourselves with
_OP = ("op", "variant", "shape", "frames", "block_tokens", "dtype")
_VIDEO = (
    "model resolution frames mode gpus layout offload vram precision attention_asked steps guidance ar_step "
    "causal_block_size teacache use_ret_steps base_frames overlap weights"
)
IDENTITY = {
    "ops": ("bench", "gpu", "impl", *_OP),
    "video": ("bench", "gpu", "impl", *_VIDEO.split()),
}
# Names of each number and of its 20th and 80th percentile.
_SPREAD = {"us_median": ("us_p20", "us_p80"), "ms_per_forward": ("ms_per_forward_p20", "ms_per_forward_p80")}
METRICS = {
    "ops": ("us_median",),
    "video": ("ms_per_forward", "text_s", "vae_encode_s", "vae_decode_s", "peak_allocated_gib", "peak_reserved_gib"),
}


@dataclass(frozen=True)
class Change:
    """One number of one row, before and after. verdict: "worse", "better" or "same"; a yardstick's never counts."""

    name: str
    metric: str
    before: float
    after: float
    verdict: str
    counts: bool

    def __str__(self) -> str:
        share = f"{100 * (self.after / self.before - 1):+.1f} %" if self.before else "from 0"
        note = "" if self.counts else " (a yardstick)"
        return f"{self.verdict:6} {self.name}: {self.metric} {self.before:.4g} -> {self.after:.4g} ({share}){note}"


def identity(row: Row) -> tuple:
    values = (row.get(key) for key in IDENTITY.get(row["bench"], ()))
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _name(row: Row) -> str:
    return " ".join(_shown(key, row[key]) for key in IDENTITY[row["bench"]][2:] if row.get(key))


def _shown(key: str, value: Any) -> str:
    if value is True:
        return key
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def verdict(base: Row, new: Row, metric: str) -> str:
    before, after = base[metric], new[metric]
    low, high = _SPREAD.get(metric, (None, None))
    # Where rows do unlike work (`uniform` false) their spread is not one of the measurement.
    told = base.get("uniform", True) and None not in (base.get(low), base.get(high), new.get(low), new.get(high))
    if after > before * (1 + NOISE) and not (told and new[low] <= base[high]):
        return "worse"
    if after < before * (1 - NOISE) and not (told and new[high] >= base[low]):
        return "better"
    return "same"


def changes(base: list[Row], new: list[Row]) -> list[Change]:
    """Every number that both have. Raises ValueError where not one row has its like."""
    known = [{identity(row): row for row in rows if row["bench"] in IDENTITY} for rows in (base, new)]
    common = [key for key in known[0] if key in known[1]]
    if not common:
        raise ValueError("no row of the new file measures what a row of the base does, on the same GPU")
    found = []
    for key in common:
        before, after = (rows[key] for rows in known)
        for metric in METRICS[before["bench"]]:
            if before.get(metric) is None or after.get(metric) is None:
                continue
            counts = before["impl"] not in YARDSTICKS
            values = (before[metric], after[metric], verdict(before, after, metric))
            found.append(Change(_name(before), metric, *values, counts))
    return found


def regressions(found: list[Change]) -> list[Change]:
    return [change for change in found if change.verdict == "worse" and change.counts]


def report(base: list[Row], new: list[Row]) -> tuple[str, bool]:
    """(lines for the terminal: all that changed and a count, whether something of ours got worse)."""
    found = changes(base, new)
    lines = [str(change) for change in found if change.verdict != "same"]
    missing = {identity(row): row for row in base if row["bench"] in IDENTITY}
    for key in {identity(row) for row in new}:
        missing.pop(key, None)
    lines += [f"absent {_name(row)}: not measured in the new file" for row in missing.values()]
    worse = regressions(found)
    lines.append(f"{len(found)} numbers compared, {len(worse)} worse beyond noise ({100 * NOISE:g} % and p20-p80)")
    return "\n".join(lines), bool(worse)
