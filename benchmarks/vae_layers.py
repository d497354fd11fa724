"""What the VAE's convolutions and norms cost: `python -m benchmarks.vae_layers [--size 68x120]`, a line a formulation.

For the layers that take most of the time, one frame of 544×960 and below: the op's backends, and the ways to write the
same convolution in torch, timed alone on inputs that already lie as they need them. Each is held against float32 before
it is timed. Times are of one output frame; the share is of the GPU's rate at matrix products, measured in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.correctness import RedError
from benchmarks.options import Parser
from skyreels_fast.ops.causal_conv3d import BACKENDS, causal_conv3d, causal_conv3d_cost, causal_conv3d_ref
from skyreels_fast.ops.norm_silu import norm_silu, norm_silu_cost

# Of the latent's height and width, and channels: the decoder's four levels.
LEVELS = ((8, 96), (4, 192), (2, 384), (1, 384))
LARGEST_ERROR = 1e-2  # relative, of bfloat16
Form = tuple[str, Callable[[], Tensor], int]  # name, work, output frames


def _inputs(height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """(three frames [1, H, W, C], weight, bias, residual), drawn at random."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    frames = [draw(1, height, width, channels) for _ in range(3)]
    weight = draw(channels, channels, 3, 3, 3) * (27 * channels) ** -0.5
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return frames, weight, draw(channels), draw(1, height, width, channels)


def _in_torch(frames: list[Tensor], weight: Tensor) -> Iterator[Form]:
    """The convolution alone, as torch may be asked for it; each gives [1, C, H, W] of the last frame."""
    planes = [frame.permute(0, 3, 1, 2) for frame in frames]
    spatial = [weight[:, :, t].contiguous(memory_format=torch.channels_last) for t in range(3)]
    joined = torch.cat(frames, dim=-1).permute(0, 3, 1, 2)
    joined_weight = torch.cat(spatial, dim=1).contiguous(memory_format=torch.channels_last)
    stacked, six = (torch.stack(part, dim=1).permute(0, 4, 1, 2, 3) for part in (frames, [*frames, *frames]))
    plain, plain_weight = stacked.contiguous(), weight.contiguous()
    padding = (0, 1, 1)

    def thrice() -> Tensor:
        out = functional.conv2d(planes[0], spatial[0], padding=1)
        out += functional.conv2d(planes[1], spatial[1], padding=1)
        return out.add_(functional.conv2d(planes[2], spatial[2], padding=1))

    yield "conv2d of 3C channels, alone", lambda: functional.conv2d(joined, joined_weight, padding=1), 1
    yield "3 conv2d, added up", thrice, 1
    yield "conv3d, 3 frames, alone", lambda: functional.conv3d(stacked, weight, padding=padding)[:, :, 0], 1
    yield "conv3d, 6 frames, alone", lambda: functional.conv3d(six, weight, padding=padding)[:, :, -1], 4
    yield "conv3d, channels first", lambda: functional.conv3d(plain, plain_weight, padding=padding)[:, :, 0], 1


def _check(name: str, actual: Tensor, expected: Tensor) -> None:
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    if not error < LARGEST_ERROR:
        raise RedError(f"{name}: relative error {error:.1e}, allowed {LARGEST_ERROR:.0e}")


def forms_of(frames: list[Tensor], weight: Tensor, bias: Tensor, residual: Tensor) -> Iterator[tuple[Form, Tensor]]:
    """Every formulation, with what it should give in float32."""
    added = causal_conv3d_ref([frame.float() for frame in frames], weight.float(), bias.float(), residual.float())
    alone = (added - bias.float() - residual.float()).permute(0, 3, 1, 2)
    for backend in BACKENDS:
        if backend != "ref":
            run = lambda backend=backend: causal_conv3d(frames, weight, bias, residual, backend=backend)  # noqa: E731
            yield (f"op, {backend}", run, 1), added
    for form in _in_torch(frames, weight):
        yield form, alone


def rows_of(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[dict]:
    """A row for each layer and formulation; one that fails or errs gives a row with its "refused"."""
    rate = _product_rate(device, dtype)
    for scale, channels in LEVELS:
        height, width = size[0] * scale, size[1] * scale
        inputs = _inputs(height, width, channels, dtype, device)
        shape = (1, height, width, channels)
        base = {"bench": "vae_layers", "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        base |= {"product_tflops": rate / 1e12, **harness.common(device)}
        for (name, run, count), expected in forms_of(*inputs):
            moved, flops = causal_conv3d_cost(shape, tuple(inputs[1].shape), residual=True, itemsize=dtype.itemsize)
            row = base | {"op": "causal_conv3d", "impl": name, "bytes": moved, "flops": flops}
            try:
                _check(name, run(), expected)
                seconds = harness.measure(run, device, budget_s=0.2).median / count
                row |= {"us_median": seconds * 1e6, "tflops": flops / seconds / 1e12, "share": flops / seconds / rate}
            except (RuntimeError, ValueError) as error:
                row |= {"refused": (str(error).splitlines() or [""])[0][:200]}
            yield row
        moved, flops = norm_silu_cost(shape, itemsize=dtype.itemsize)
        seconds = harness.measure(lambda: norm_silu(inputs[0][0], inputs[2]), device, budget_s=0.2).median  # noqa: B023
        row = base | {"op": "norm_silu", "impl": "op", "bytes": moved, "flops": flops}
        yield row | {"us_median": seconds * 1e6, "gbps": moved / seconds / 1e9}


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the ceiling."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / harness.measure(lambda: a @ b, device, budget_s=0.3).median


def line(row: dict) -> str:
    """A row as the terminal shows it."""
    what = f"{row['op']:14} {'x'.join(map(str, row['shape'])):16} {row['impl']:30}"
    if "refused" in row:
        return f"{what} REFUSED  {row['refused']}"
    rate = f"{row['gbps']:7.0f} GB/s" if "gbps" in row else f"{row['tflops']:7.1f} TFLOP/s {row['share']:6.1%}"
    return f"{what} {row['us_median']:10.1f} us {rate}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "vae_layers")
    parser.add_argument("--size", default="68x120", help="of the latents, as HxW (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    height, _, width = args.size.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        parser.error(f"--size {args.size}: give two numbers of at least 1 as HxW")
    device, out = args.device, args.out
    print(f"{harness.provenance(device)}; rows go to {out or 'the terminal alone: give --out FILE to keep them'}")
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        harness.keep(rows_of((int(height), int(width)), getattr(torch, args.dtype), device), line, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
