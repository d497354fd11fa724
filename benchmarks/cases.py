"""The inputs that each op is timed on: those a DiT block gives it, drawn at random, with its cost and its check.

A family is a function of (grid, dim, head_dim, dtype, device) that yields cases, one at a time, for they are large.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.correctness import require_within_twice
from skyreels_fast.ops import _dispatch

Grid = tuple[int, int, int]
Args = dict[str, Any]
Part = tuple[Args, Callable[[Tensor], Tensor]]  # arguments for some tokens, and those tokens of an output

CHECKED_FRAMES = 3
CHECKED_ROWS = 32  # of attention, in a block
SCORES_LIMIT = 2**31  # bytes of float32 scores that plain torch attention may hold


@dataclass
class Case:
    """One op on one set of inputs.

    function: called with `args` and backend=…; reference: its X_ref. parts: pieces of the work small enough for
    float64, in which what the op gave is checked. eager: plain torch to compare with, by name; compiles: whether
    torch.compile of it is worth a row.
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    frames: int
    dtype: str
    args: Args
    cost: tuple[int, int]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    parts: Callable[[], Iterator[Part]]
    backends: list[str]
    eager: tuple[str, Callable[[], Any]]
    compiles: bool = True

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, "x".join(map(str, self.shape)))))

    def check(self, backend: str, outputs: Any) -> None:
        """Raises RedError where `outputs`, of this case's args, err by more than the rule allows."""
        for args, taken in self.parts():
            low = _tuple(self.reference(**args, math_dtype=getattr(torch, self.dtype)))
            exact = _tuple(self.reference(**_upcast(args), math_dtype=torch.float64))
            for actual, rough, right in zip(_tuple(outputs), low, exact, strict=True):
                require_within_twice(f"{self.label} {backend}", taken(actual), rough, right)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _upcast(args: Args) -> Args:
    def one(name: str, value: Any) -> Any:
        if name.endswith("_dtype"):
            return torch.float64
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(name, value) for name, value in args.items()}


def _case(module: Any, op: str, args: Args, cost: tuple[int, int], grid: Grid, *, variant: str = "", **given) -> Case:
    """A case of the function `op` of a module of ops, checked frame by frame unless `given` says otherwise."""
    x = args.get("x", next(value for value in args.values() if isinstance(value, Tensor)))
    function = getattr(module, op)
    defaults = {
        "parts": lambda: _frames(args, grid),
        "backends": [name for name in _backends(module, x.device.type) if name != "ref"],
        "eager": ("ref", lambda: function(**args, backend="ref")),
    }
    described = {"op": op, "variant": variant, "shape": tuple(x.shape), "frames": grid[0]}
    described |= {"dtype": str(x.dtype).removeprefix("torch."), "args": args, "cost": cost}
    reference = getattr(module, f"{op}_ref")
    return Case(**described, function=function, reference=reference, **{**defaults, **given})


def _backends(module: Any, device_type: str) -> list[str]:
    offered = getattr(module, "BACKENDS", ("cuda", "triton", "ref"))
    present = _dispatch.available(device_type)
    return [name for name in offered if name in present or name not in ("cuda", "triton", "ref")]


def _frames(args: Args, grid: Grid) -> Iterator[Part]:
    """The first, the middle and the last frame: tokens and modulation are cut, weights are not."""
    frames, per_frame = grid[0], grid[1] * grid[2]
    tokens = frames * per_frame

    def cut(value: Any, frame: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 3:
            return value
        if value.shape[1] == tokens:
            return value[:, frame * per_frame : (frame + 1) * per_frame]
        return value[:, frame : frame + 1]

    for frame in sorted({0, frames // 2, frames - 1})[:CHECKED_FRAMES]:
        part = {name: cut(value, frame) for name, value in args.items()}
        if "grid" in part:
            part |= {"grid": (1, *grid[1:]), "frame_offset": frame}
        yield part, lambda output, frame=frame: cut(output, frame)


def _some_rows(start: int, stop: int, most: int, device: torch.device) -> Tensor:
    """Up to so many rows from `start` to before `stop`, both ends among them."""
    return torch.linspace(start, stop - 1, min(most, stop - start), device=device).long()


def _draw(device: torch.device, dtype: torch.dtype, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).mul_(std).add_(mean).to(dtype)


def adaln(grid: Grid, dim: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    module = importlib.import_module("skyreels_fast.ops.adaln")
    frames, tokens, low = grid[0], grid[0] * grid[1] * grid[2], dtype.itemsize
    shape = (1, tokens, dim)
    x = _draw(device, dtype, *shape, mean=0.5, std=3)
    branch = _draw(device, dtype, *shape)
    context = _draw(device, dtype, *shape)
    residual = _draw(device, torch.float32, *shape, std=5)
    scale, shift, gate = (_draw(device, torch.float32, 1, frames, dim, std=0.5) for _ in range(3))
    weight, bias = _draw(device, dtype, dim, mean=1, std=0.1), _draw(device, dtype, dim, std=0.1)

    args: Args = {"x": x, "scale": scale, "shift": shift}
    cost = module.norm_scale_shift_cost(shape, frames, x_bytes=low, out_bytes=low)
    yield _case(module, "norm_scale_shift", args, cost, grid)

    # What a block does after self-attention.
    args = {"x": branch, "scale": None, "shift": None, "weight": weight, "bias": bias, "residual": x, "gate": gate}
    cost = module.norm_scale_shift_cost(shape, frames, residual_bytes=low, x_bytes=low, out_bytes=low)
    yield _case(module, "norm_scale_shift", args, cost, grid, variant="gated residual, affine")

    args = {"residual": residual, "x": branch, "gate": gate, "out_dtype": dtype}
    cost = module.scale_residual_cost(shape, frames, residual_bytes=4, x_bytes=low, out_bytes=low)
    yield _case(module, "scale_residual", args, cost, grid)

    op = "scale_residual_norm_scale_shift"
    variants = {  # what a block does after cross-attention, and with its last gate
        "gated, addend, modulated": (x, context, torch.float32),
        "gated, modulated": (residual, None, dtype),
    }
    for variant, (base, addend, kept) in variants.items():
        args = {"residual": base, "x": branch, "gate": gate, "scale": scale, "shift": shift, "addend": addend}
        args |= {"residual_dtype": kept, "out_dtype": dtype}
        sizes = {"residual_bytes": base.itemsize, "x_bytes": low, "addend_bytes": 0 if addend is None else low}
        sizes |= {"residual_out_bytes": kept.itemsize, "out_bytes": low}
        cost = module.scale_residual_norm_scale_shift_cost(shape, frames, **sizes)
        yield _case(module, op, args, cost, grid, variant=variant)


def qk_norm_rope3d(grid: Grid, dim: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    module = importlib.import_module("skyreels_fast.ops.qk_norm_rope3d")
    tokens, heads = grid[0] * grid[1] * grid[2], dim // head_dim
    shape = (1, tokens, heads, head_dim)
    q_weight, k_weight = (_draw(device, dtype, dim, mean=1, std=0.1) for _ in range(2))
    q, k, _ = _draw(device, dtype, 1, tokens, 3, heads, head_dim, std=2).unbind(2)  # as a fused product leaves them
    args: Args = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "grid": grid}
    yield _case(module, "qk_norm_rope3d", args, module.qk_norm_rope3d_cost(shape, itemsize=dtype.itemsize), grid)

    args = {"x": q.contiguous(), "weight": q_weight}
    yield _case(module, "qk_norm", args, module.qk_norm_cost(shape, itemsize=dtype.itemsize), grid)


CONTEXT_KEYS = 104  # a prompt of 100 tokens and some for its padding


def attention_weights(grid: Grid, dim: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    module = importlib.import_module("skyreels_fast.ops.attention_weights")
    tokens, heads = grid[0] * grid[1] * grid[2], dim // head_dim
    shape = (1, tokens, heads, head_dim)
    args: Args = {"q": _draw(device, dtype, *shape, std=2), "k": _draw(device, dtype, 1, CONTEXT_KEYS, *shape[2:])}
    args |= {"log_counts": _draw(device, torch.float32, CONTEXT_KEYS)}
    args |= {"norm_weight": _draw(device, dtype, dim, mean=1, std=0.1)}
    rows = _some_rows(0, tokens, CHECKED_FRAMES * CHECKED_ROWS, device)

    def parts() -> Iterator[Part]:
        yield {**args, "q": args["q"][:, rows]}, lambda output: output[:, rows]

    cost = module.attention_weights_cost(shape, CONTEXT_KEYS, norm=True, itemsize=dtype.itemsize)
    yield _case(module, "attention_weights", args, cost, grid, parts=parts)


def merge_attention(grid: Grid, dim: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """As the last step of a ring of two has it."""
    module = importlib.import_module("skyreels_fast.ops.merge_attention")
    tokens, heads = grid[0] * grid[1] * grid[2], dim // head_dim
    shape = (1, tokens, heads, head_dim)
    args: Args = {name: _draw(device, dtype, *shape) for name in ("out", "more")}
    args |= {name: _draw(device, torch.float32, 1, heads, tokens) for name in ("lse", "more_lse")}
    args |= {"out_dtype": dtype}
    rows = _some_rows(0, tokens, CHECKED_FRAMES * CHECKED_ROWS, device)

    def cut(value: Any) -> Any:
        """Some tokens, which are the second dimension of results and the last of log-sum-exps."""
        return value.index_select(1 if value.dim() == 4 else 2, rows) if isinstance(value, Tensor) else value

    def parts() -> Iterator[Part]:
        yield {name: cut(value) for name, value in args.items()}, cut

    cost = module.merge_attention_cost(shape, itemsizes=(dtype.itemsize,) * 3)
    yield _case(module, "merge_attention", args, cost, grid, parts=parts)


def residual_reuse(grid: Grid, dim: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    module = importlib.import_module("skyreels_fast.ops.residual_reuse")
    shape = (1, grid[0] * grid[1] * grid[2], dim)
    before = _draw(device, dtype, *shape)
    after = before + _draw(device, dtype, *shape, std=0.3)
    names = {"residual_add": ("x", "residual"), "residual_save": ("after", "before"), "relative_l1": ("new", "old")}
    for op, labels in names.items():
        args: Args = dict(zip(labels, (after, before), strict=True))
        cost = getattr(module, f"{op}_cost")(shape, itemsize=dtype.itemsize)
        whole = {"parts": lambda args=args: iter([(args, lambda output: output)])} if op == "relative_l1" else {}
        yield _case(module, op, args, cost, grid, **whole)


def attention(grid: Grid, dim: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    module = importlib.import_module("skyreels_fast.ops.attention")
    per_frame, heads = grid[1] * grid[2], dim // head_dim
    tokens = grid[0] * per_frame
    shape = (1, tokens, heads, head_dim)
    # As qk_norm_rope3d leaves q and k: of about unit size; v is a view of the fused product.
    q, k = (_draw(device, dtype, *shape) for _ in range(2))
    v = _draw(device, dtype, 1, tokens, 3, heads, head_dim).unbind(2)[2]
    backends = [name for name in _backends(module, device.type) if name != "ref"]
    if heads * tokens**2 * 4 <= SCORES_LIMIT:
        backends.append("ref")
    block = max(1, grid[0] // 5) * per_frame  # five blocks, as for asynchronous videos
    for variant, block_tokens in (("dense", None), ("block-causal", block)):
        args: Args = {"q": q, "k": k, "v": v, "block_tokens": block_tokens}
        cost = module.attention_cost(shape, tokens, block_tokens=block_tokens, itemsize=dtype.itemsize)
        parts = {"parts": lambda b=block_tokens: _attention_rows(q, k, v, b)}
        eager = ("torch-sdpa", _torch_sdpa(q, k, v, block_tokens))
        given = {"backends": backends, "eager": eager, "compiles": False, **parts}
        yield _case(module, "attention", args, cost, grid, variant=variant, **given)


def _attention_rows(q: Tensor, k: Tensor, v: Tensor, block_tokens: int | None) -> Iterator[Part]:
    """Some rows of each block with the keys they see, which makes dense attention of them."""
    tokens = q.shape[1]
    block = block_tokens or tokens
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = _some_rows(start, stop, CHECKED_ROWS, q.device)
        yield {"q": q[:, rows], "k": k[:, :stop], "v": v[:, :stop]}, lambda output, rows=rows: output[:, rows]


def _torch_sdpa(q: Tensor, k: Tensor, v: Tensor, block_tokens: int | None) -> Callable[[], Tensor]:
    """Attention as torch has it and with the kernel that torch chooses, causal blocks by a mask."""
    mask = None
    if block_tokens is not None:
        block = torch.arange(q.shape[1], device=q.device) // block_tokens
        mask = block[:, None] >= block[None, :]
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    return lambda: functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)


CASES = {
    case.__name__: case
    for case in (adaln, attention, attention_weights, merge_attention, qk_norm_rope3d, residual_reuse)
}
