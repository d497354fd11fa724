"""What bfloat16 costs the VAE: `python -m benchmarks.fidelity`.

Videos go through the bundled model's VAE in float32 and in bfloat16: drawn ones, as it was trained on, and a camera
that moves over photographs (skimage.data). PSNR in dB against float32, of decoding the same latents and of the whole
way, encoding and decoding; and beside it what the VAE itself loses, of float32 against the video.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import skyreels_fast as sf
from benchmarks import harness
from benchmarks.options import Parser
from training.data import draw_scenes, render, trajectory

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIZE, FRAMES = (256, 384), 17
_DRAWN = 2
_ZOOM, _PAN = 1.15, 0.06


def photographs() -> Iterator[tuple[str, Tensor]]:
    """(name, video [1, 3, FRAMES, *SIZE] in [-1, 1]) of each photograph. Raises ImportError without scikit-image."""
    from skimage import data

    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(np.ascontiguousarray(getattr(data, name)()[..., :3])).permute(2, 0, 1)
        yield name, pan(pixels[None] / 127.5 - 1, FRAMES, SIZE)


def pan(picture: Tensor, frames: int, size: tuple[int, int]) -> Tensor:
    """A camera moves over a picture [1, 3, h, w] from left to right and comes nearer: [1, 3, frames, *size]."""
    scale = max(size[0] / picture.shape[2], size[1] / picture.shape[3])
    views = []
    for t in torch.linspace(0, 1, frames).tolist():
        zoom = 1 / _ZOOM ** (1 + t)
        shares = [scale**-1 * side / full * zoom for side, full in zip(size, picture.shape[2:], strict=True)]
        turn = torch.tensor([[[shares[1], 0, _PAN * (2 * t - 1)], [0, shares[0], 0]]])
        grid = functional.affine_grid(turn, [1, 3, *size], align_corners=False)
        views.append(functional.grid_sample(picture, grid, mode="bicubic", align_corners=False).clamp(-1, 1))
    return torch.stack(views, dim=2)


def drawn() -> Iterator[tuple[str, Tensor]]:
    scenes = draw_scenes(_DRAWN, torch.Generator().manual_seed(0))
    for number, video in enumerate(render(scenes, trajectory(scenes, FRAMES))[0]):
        yield f"drawn {number + 1}", video[None]


def psnr_db(actual: Tensor, expected: Tensor) -> float:
    """Of videos in [-1, 1]."""
    return 10 * math.log10(4 / max((actual - expected).square().mean().item(), 1e-12))


@torch.inference_mode()
def rows_of(device: torch.device) -> Iterator[dict[str, Any]]:
    exact = sf.Pipeline.from_pretrained("tiny", device=device, dtype=torch.float32, vae_dtype=torch.float32)._load()[1]
    low = copy.deepcopy(exact).bfloat16().lay_out()
    for name, video in (*drawn(), *photographs()):
        latents = exact.encode(video)
        expected = exact.decode(latents).cpu()
        row: dict[str, Any] = {"bench": "fidelity", "impl": "skyreels_fast", "video": name, "model": "bundled"}
        row |= {"height": video.shape[3], "width": video.shape[4], "frames": video.shape[2]}
        row["decoded_db"] = psnr_db(low.decode(latents).cpu(), expected)
        row["both_db"] = psnr_db(low.decode(low.encode(video)).cpu(), expected)
        yield row | {"vae_db": psnr_db(expected, video)}


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['video']:12} decoded {row['decoded_db']:5.1f} dB  encoded and decoded {row['both_db']:5.1f} dB  "
        f"(the VAE itself {row['vae_db']:5.1f} dB)"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, "fidelity")
    args = parser.parse_args(argv)
    device, out = args.device, args.out
    print(harness.provenance(device))
    try:
        harness.keep((row | harness.common(device) for row in rows_of(device)), line, out)
    except ImportError as error:
        parser.error(f"photographs need scikit-image ({error}): pip install '.[bench]'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
