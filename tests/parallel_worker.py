"""One of the processes of test_parallel_gpu.py: torchrun … parallel_worker.py DEVICE ULYSSES RING CFG OUT."""

from __future__ import annotations

import os
import sys

import torch

import skyreels_fast as sf
from skyreels_fast.parallel import Degrees

SMALL = {"height": 48, "width": 80, "inference_steps": 3, "seed": 5}
REQUESTS = {
    "dense": SMALL | {"num_frames": 17},
    "causal": SMALL | {"num_frames": 21, "causal_attention": True, "causal_block_size": 2, "ar_step": 1},
    "long": SMALL | {"num_frames": 25, "base_num_frames": 17, "overlap_history": 9, "addnoise_condition": 20},
}


def render(device: str, dtype: torch.dtype, degrees: Degrees | None) -> dict[str, sf.Result]:
    pipe = sf.Pipeline.from_pretrained("tiny", device, dtype, mode="df", vae_dtype=torch.float32, degrees=degrees)
    results = {name: pipe(sf.Request(**request)) for name, request in REQUESTS.items()}
    if pipe.machine.world is not None:
        pipe.machine.world.close()
    return results


if __name__ == "__main__":
    device, ulysses, ring, cfg_parallel, out = sys.argv[1:]
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    results = render(device, torch.float32, Degrees(int(ulysses), int(ring), cfg_parallel == "1"))
    if os.environ["RANK"] == "0":
        torch.save({name: ([x.cpu() for x in one.latents], one.frames) for name, one in results.items()}, out)
