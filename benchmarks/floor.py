"""The least time that a forward can take: its matrix products and its attention, at the best rates that were measured.

Rates: one H200, random bf16 inputs, 17,000 or 51,000 rows, 2026-11-22: matrix products through torch 2.11 (cuBLAS),
attention with heads of 128 through FlashAttention-3; the most that any run showed. A matrix product of a width not
listed counts at the best rate of its model.
"""

from __future__ import annotations

from skyreels_fast.config import TransformerConfig

GPU = "H200"
GEMM_TFLOPS = {  # (in, out) features
    (5120, 5120): 822,
    (5120, 15360): 723,
    (5120, 13824): 718,
    (13824, 5120): 722,
    (1536, 1536): 633,
    (1536, 8960): 618,
    (8960, 1536): 686,
}
ATTENTION_TFLOPS = 690
IMAGE_TOKENS = 257


def gemms(config: TransformerConfig, context_keys: int | None = None) -> dict[str, tuple[int, int]]:
    """(in, out) of each matrix product that a block does over all tokens; the context's are done once a video.

    context_keys: those that `ops.attention_weights` weighs, where attention to the context is a product of its weights.
    """
    dim, ffn = config.dim, config.ffn_dim
    weighed = dim if context_keys is None else config.num_heads * context_keys
    square = dict.fromkeys(("attention out", "cross q"), (dim, dim))
    return {"qkv": (dim, 3 * dim), **square, "cross out": (weighed, dim), "ffn in": (dim, ffn), "ffn out": (ffn, dim)}


def block_flops(config: TransformerConfig, grid: tuple[int, int, int], block: int | None = None) -> tuple[int, int]:
    """Flops of one block's (matrix products, attention) on f * h * w tokens; `block`: frames of a causal block."""
    frames, per_frame = grid[0], grid[1] * grid[2]
    tokens = frames * per_frame
    seen = frames * frames
    if block is not None:
        starts = range(0, frames, block)
        seen = sum((min(start + block, frames) - start) * min(start + block, frames) for start in starts)
    context = config.text_len + (IMAGE_TOKENS if config.model_type == "i2v" else 0)
    products = sum(2 * tokens * wide * narrow for wide, narrow in gemms(config).values())
    return products, 4 * config.dim * (seen * per_frame**2 + tokens * context)


def products_ms(config: TransformerConfig, tokens: int, context_keys: int | None = None) -> float | None:
    """Milliseconds of a forward's matrix products over `tokens` tokens; None for a width that was not measured.

    context_keys: as in `gemms`.
    """
    rates = {shape: rate for shape, rate in GEMM_TFLOPS.items() if config.dim in shape}
    if not rates:
        return None
    best = max(rates.values())
    products = sum(2 * tokens * a * b / rates.get((a, b), best) for a, b in gemms(config, context_keys).values())
    return config.num_layers * products / 1e9


def forward_ms(
    config: TransformerConfig, grid: tuple[int, int, int], block: int | None = None, *, gpu: str
) -> float | None:
    """Milliseconds of a forward at the measured rates; None for a GPU or a width that they were not measured on."""
    products = products_ms(config, grid[0] * grid[1] * grid[2])
    if GPU not in gpu or products is None:
        return None
    return products + config.num_layers * block_flops(config, grid, block)[1] / ATTENTION_TFLOPS / 1e9
