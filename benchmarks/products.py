"""What a block's matrix products cost, and what other ways to take them would: `python -m benchmarks.products`.

Each product of a DiT block at 540P and 97 frames, in the widths of 1.3B and 14B, as the forward takes it and otherwise:
q, k and v in one product or three, GELU in the epilogue or after it, the feed-forward whole or in token chunks,
attention to a prompt of 100 tokens (with its query's and its output's product) by its weights or as attention. They run
for `--seconds` without a pause, for a GPU at its power limit lowers its clock: the row says what clock and power were
left at the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.models import GRID, config
from benchmarks.options import Parser, at_least_one
from skyreels_fast.config import TransformerConfig
from skyreels_fast.dit.block import CrossAttention
from skyreels_fast.dit.context import counted_padding, log_counts_of
from skyreels_fast.ops import attention, linear_gelu, qk_norm

TOKENS = math.prod(GRID)
WIDTHS = {model: (config(model, "sync").dim, config(model, "sync").ffn_dim) for model in ("1.3B", "14B")}
CHUNKS = (2, 3, 6)
HEAD_CHANNELS, TEXT_TOKENS = 128, 100


class Form(NamedTuple):
    """One way to take a product; `chosen`: the forward's."""

    op: str
    impl: str
    run: Callable[[], object]
    flops: int
    chosen: bool = False


def layer(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns, device=device) * columns**-0.5
    return weight.to(dtype), torch.randn(rows, device=device).to(dtype)


def forms_of(tokens: int, dim: int, hidden: int, device: torch.device, dtype: torch.dtype) -> Iterator[Form]:
    """The products of a block of width `dim`; inputs and weights are drawn at random."""
    x = torch.randn(tokens, dim, device=device).to(dtype)
    weight, bias = layer(3 * dim, dim, device, dtype)
    parts = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
    flops = 2 * tokens * dim * dim
    yield Form("q, k, v", "three products", lambda: [functional.linear(x, *part) for part in parts], 3 * flops, True)
    yield Form("q, k, v", "one product", lambda: functional.linear(x, weight, bias), 3 * flops)
    yield Form("square", "linear", lambda: functional.linear(x, *parts[0]), flops, True)
    yield from _attention_to_text(x[None], device, dtype)
    yield from _feed_forward(x, hidden, device, dtype)


def _attention_to_text(x: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[Form]:
    dim, padding = x.shape[-1], 512 - TEXT_TOKENS
    heads = max(1, dim // HEAD_CHANNELS)
    kept = counted_padding(TEXT_TOKENS, padding, most=HEAD_CHANNELS)
    attn = CrossAttention(TransformerConfig("t2v", 16, dim, dim, heads, 1)).to(device, dtype)
    text = torch.randn(1, TEXT_TOKENS + padding, dim, device=device).to(dtype)
    text[:, TEXT_TOKENS:] = text[:, -1:]
    logs = log_counts_of(TEXT_TOKENS, kept, padding, device)
    few = attn.keys_values(text[:, : TEXT_TOKENS + kept], None, logs)
    all_keys = attn.keys_values(text)

    def masked() -> Tensor:
        q = qk_norm(attn.q(x).unflatten(-1, (heads, -1)), attn.norm_q.weight, eps=attn.eps)
        mask = logs.to(dtype).expand(1, 1, len(x[0]), -1)
        heads_first = (tensor.transpose(1, 2) for tensor in (q, *few[0][:2]))
        return attn.o(functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).flatten(2))

    keys, each = TEXT_TOKENS + kept, 2 * len(x[0]) * dim  # flops for each channel or key that a channel meets
    yield Form("text", "weights of few keys", lambda: attn(x, few, attention), each * (dim + keys + heads * keys), True)
    yield Form("text", "few keys, torch's mask", masked, each * (2 * dim + 2 * keys))
    yield Form("text", "all 512 keys", lambda: attn(x, all_keys, attention), each * (2 * dim + 2 * 512))


def _feed_forward(x: Tensor, hidden: int, device: torch.device, dtype: torch.dtype) -> Iterator[Form]:
    up, down = layer(hidden, x.shape[1], device, dtype), layer(x.shape[1], hidden, device, dtype)
    flops = 2 * len(x) * x.shape[1] * hidden
    out = torch.empty_like(x)

    def whole() -> Tensor:
        return functional.linear(linear_gelu(x, *up), *down)

    def chunked(count: int) -> None:
        for tokens, into in zip(x.chunk(count), out.chunk(count), strict=True):
            torch.addmm(down[1], linear_gelu(tokens, *up), down[0].t(), out=into)

    wide = linear_gelu(x, *up)
    yield Form("up", "GELU in the epilogue", lambda: linear_gelu(x, *up), flops)
    yield Form("up", "GELU after it", lambda: linear_gelu(x, *up, backend="ref"), flops)
    yield Form("down", "linear", lambda: functional.linear(wide, *down), flops)
    yield Form("feed-forward", "whole", whole, 2 * flops)
    for count in CHUNKS:
        yield Form("feed-forward", f"{count} chunks", lambda count=count: chunked(count), 2 * flops, count == 3)


def _state(device: torch.device) -> dict[str, float | None]:
    """The GPU's clock and power draw now, where they can be read."""
    if device.type != "cuda":
        return {"sm_mhz": None, "watts": None}
    try:
        return {"sm_mhz": torch.cuda.clock_rate(device), "watts": torch.cuda.power_draw(device) / 1e3}
    except (ModuleNotFoundError, RuntimeError):
        return {"sm_mhz": None, "watts": None}


def rows_of(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> Iterator[dict[str, object]]:
    """A row for each form of one model's products."""
    dim, hidden = WIDTHS[model]
    for i, form in enumerate(forms_of(tokens, dim, hidden, device, dtype)):
        if i == 0:  # untimed: a GPU that has rested is not yet at its power limit
            harness.measure(form.run, device, budget_s=seconds, repeats=(1, 2000), flush=False)
        timing = harness.measure(form.run, device, budget_s=seconds, repeats=(3, 2000), flush=False)
        state = _state(device)
        row = {"bench": "products", "model": model, "op": form.op, "impl": form.impl, "chosen": form.chosen}
        row |= {"tokens": tokens, "dim": dim, "hidden": hidden, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"ms_median": timing.median * 1e3, "ms_p20": timing.p20 * 1e3, "ms_p80": timing.p80 * 1e3}
        yield row | {"tflops": form.flops / timing.median / 1e12, **state, **harness.common(device)}


def line(row: dict) -> str:
    """A row as the terminal shows it."""
    state = f"  {row['sm_mhz']:.0f} MHz {row['watts']:.0f} W" if row["sm_mhz"] is not None else ""
    mark = "*" if row["chosen"] else " "
    what = f"{row['model']:5} {row['op']:13} {mark}{row['impl']:22}"
    return f"{what} {row['ms_median']:9.3f} ms {row['tflops']:7.1f} TFLOP/s{state}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "products")
    parser.add_argument("--model", choices=WIDTHS, action="append", help="may be given twice (default: both)")
    parser.add_argument("--tokens", type=at_least_one, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each form (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    device, out = args.device, args.out
    print(f"{harness.provenance(device)}; * as the forward takes it")
    with torch.inference_mode():
        for model in args.model or WIDTHS:
            rows = rows_of(model, args.tokens, device, getattr(torch, args.dtype), args.seconds)
            harness.keep(rows, line, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
