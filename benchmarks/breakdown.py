"""Where the time of a forward goes: `python -m benchmarks.breakdown --model 14B`.

The kernels of one forward at 540P and 97 frames (random weights, one branch), by torch's profiler, added up by what
they do, each part beside the least it can take: its flops at the best rates that were measured (`floor`), or its bytes
at the rate of a device copy in the same run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

import skyreels_fast as sf
from benchmarks import floor, harness
from benchmarks.cases import CONTEXT_KEYS
from benchmarks.models import GRID, RandomCheckpoint, config
from benchmarks.options import Parser, at_least_one
from benchmarks.ours import CONTEXT_TOKENS
from benchmarks.products import TOKENS, WIDTHS
from skyreels_fast.config import TransformerConfig
from skyreels_fast.ops.adaln import norm_scale_shift_cost, scale_residual_norm_scale_shift_cost
from skyreels_fast.ops.attention_weights import attention_weights_cost
from skyreels_fast.ops.qk_norm_rope3d import qk_norm_rope3d_cost

SELF, CONTEXT, PRODUCTS, NORMS, ROPE, OTHER = PARTS = (
    "self-attention", "attention to the text", "matrix products", "norms, modulation, gates, residual",
    "norms of q and k, RoPE", "all else",
)  # fmt: skip
_NAMED = (  # the first whose words the kernel's name has
    (CONTEXT, ("_attention_weights",)),
    (SELF, ("flash", "fmha", "sdpa", "attention")),
    (NORMS, ("_adaln",)),
    (ROPE, ("norm_kernel", "norm_rope")),
    (PRODUCTS, ("nvjet", "gemm", "cutlass")),
)


class Kernel(NamedTuple):
    name: str
    ms: float


def part_of(name: str) -> str:
    """What a kernel does, by its name; attention to the text by kernels of self-attention counts as that here."""
    lowered = name.lower()
    return next((part for part, words in _NAMED if any(word in lowered for word in words)), OTHER)


def by_part(kernels: Iterable[Kernel]) -> dict[str, list[float]]:
    """Milliseconds of each part's kernels. Attention that takes less than a fifth of the longest is to the text."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for kernel in kernels:
        found[part_of(kernel.name)].append(kernel.ms)
    attention, longest = found[SELF], max(found[SELF], default=0.0)
    found[SELF] = [ms for ms in attention if 5 * ms >= longest]
    found[CONTEXT] += [ms for ms in attention if 5 * ms < longest]
    return found


def floors_ms(config: TransformerConfig, grid: tuple[int, int, int], copy_gbps: float) -> dict[str, float | None]:
    """The least that each part can take in bfloat16; None where no rate was measured."""
    tokens = math.prod(grid)
    shape, heads = (1, tokens, config.dim), (1, tokens, config.num_heads, config.head_dim)
    wide, narrow = 4, 2
    norms = (  # those before self-attention, before attention to the context, and before the feed-forward
        scale_residual_norm_scale_shift_cost(shape, grid[0], residual_bytes=wide, residual_out_bytes=narrow),
        norm_scale_shift_cost(shape, grid[0], residual_bytes=narrow),
        scale_residual_norm_scale_shift_cost(
            shape, grid[0], residual_bytes=narrow, addend_bytes=narrow, residual_out_bytes=wide
        ),
    )
    moved = {NORMS: sum(cost[0] for cost in norms), ROPE: qk_norm_rope3d_cost(heads)[0]}
    moved[CONTEXT] = attention_weights_cost(heads, CONTEXT_KEYS, norm=True)[0]
    result: dict[str, float | None] = {part: config.num_layers * moved[part] / copy_gbps / 1e6 for part in moved}
    result[SELF] = config.num_layers * 4 * config.dim * tokens**2 / floor.ATTENTION_TFLOPS / 1e9
    products = floor.products_ms(config, tokens, context_keys=CONTEXT_KEYS)
    return {**dict.fromkeys(PARTS), **result, PRODUCTS: products}


@torch.no_grad()
def measure(model: str, device: torch.device, forwards: int) -> tuple[list[Kernel], float]:
    """The kernels of one forward, and its milliseconds without the profiler."""
    checkpoint = RandomCheckpoint.of(model, "sync", device, torch.bfloat16, text=False)
    dit, _ = sf.Pipeline(checkpoint, device, torch.bfloat16, offload=False, mode="df")._load()
    context = dit.encode_context(torch.randn(1, CONTEXT_TOKENS[0], checkpoint.config.text_dim, device=device))
    latents = torch.randn(1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2], device=device)
    timestep = torch.full((1, GRID[0]), 500, device=device)

    def forward() -> None:
        dit(latents, timestep, context, 24)

    timing = harness.measure(forward, device, repeats=(forwards, forwards), warm_up=2, flush=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(forwards):
            forward()
        harness.synchronize(device)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [Kernel(event.name, event.time_range.elapsed_us() / 1e3 / forwards) for event in events]
    return kernels, timing.median * 1e3


def rows_of(model: str, kernels: Iterable[Kernel], forward_ms: float, copy_gbps: float) -> Iterator[dict[str, Any]]:
    """A row for each part, that which takes most first."""
    floors = floors_ms(config(model, "sync"), GRID, copy_gbps)
    for part, times in sorted(by_part(kernels).items(), key=lambda item: -sum(item[1])):
        row: dict[str, Any] = {"bench": "breakdown", "impl": "skyreels_fast", "model": model, "part": part}
        row |= {"tokens": TOKENS, "ms": sum(times), "floor_ms": floors[part]}
        yield row | {"forward_ms": forward_ms, "copy_gbps": copy_gbps}


def line(row: dict[str, Any]) -> str:
    least = "" if row["floor_ms"] is None else f"{row['floor_ms']:9.1f} ms at least, {row['ms'] / row['floor_ms']:.2f}x"
    return f"{row['model']:5} {row['part']:36} {row['ms']:9.1f} ms {row['ms'] / row['forward_ms']:6.1%} {least}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "breakdown", device=False)
    parser.add_argument("--model", choices=WIDTHS, action="append", help="may be given twice (default: both)")
    parser.add_argument("--forwards", type=at_least_one, default=3, help="to take the mean of (default: %(default)s)")
    args = parser.parse_args(argv)
    device, out = args.device, args.out
    if device.type != "cuda":
        parser.error("a breakdown is of a GPU's kernels, and there is none here")
    print(harness.provenance(device))
    for model in args.model or WIDTHS:
        copy_gbps = harness.copy_gbps(device)
        kernels, forward_ms = measure(model, device, args.forwards)
        rows = rows_of(model, kernels, forward_ms, copy_gbps)
        harness.keep((row | harness.common(device) for row in rows), line, out)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
