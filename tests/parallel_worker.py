"""One of the processes of test_parallel_gpu.py: torchrun … parallel_worker.py DEVICE ULYSSES RING CFG OUT."""

from __future__ import annotations

import copy
import os
import sys

import torch

import skyreels_fast as sf
from skyreels_fast.parallel import Degrees
from skyreels_fast.parallel.chain import Chain

SMALL = {"height": 48, "width": 80, "inference_steps": 3, "seed": 5}
REQUESTS = {
    "dense": SMALL | {"num_frames": 17},
    "causal": SMALL | {"num_frames": 21, "causal_attention": True, "causal_block_size": 2, "ar_step": 1},
    "long": SMALL | {"num_frames": 25, "base_num_frames": 17, "overlap_history": 9, "addnoise_condition": 20},
}


def render(device: str, dtype: torch.dtype, degrees: Degrees | None) -> tuple[dict[str, sf.Result], list[torch.Tensor]]:
    """The requests' results, and what `coded` gives."""
    # A window begins with what the VAE makes of the frames before: TF32 would make more of last digits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pipe = sf.Pipeline.from_pretrained("tiny", device, dtype, mode="df", vae_dtype=torch.float32, degrees=degrees)
        results = {name: pipe(sf.Request(**request)) for name, request in REQUESTS.items()}
        through_vae = coded(pipe)
    if pipe.machine.world is not None:
        pipe.machine.world.close()
    return results, through_vae


@torch.no_grad()
def coded(pipe: sf.Pipeline) -> list[torch.Tensor]:
    """Latents of noise, and frames of others, by the VAE in bfloat16; no frames in processes that do not lead."""
    vae = copy.deepcopy(pipe._load()[1]).bfloat16().lay_out()
    chain = Chain(pipe.machine.world) if pipe.machine.world else None
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 21, 272, 480, generator=generator) * 2 - 1
    latents = torch.randn(1, 16, 6, 34, 60, generator=generator)
    return [chunk.cpu() for chunk in (vae.encode_stream([video], chain), *vae.decode_stream(latents, shared=chain))]


if __name__ == "__main__":
    device, ulysses, ring, cfg_parallel, out = sys.argv[1:]
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    results, through_vae = render(device, torch.float32, Degrees(int(ulysses), int(ring), cfg_parallel == "1"))
    if os.environ["RANK"] == "0":
        rendered = {name: ([x.cpu() for x in one.latents], one.frames) for name, one in results.items()}
        torch.save((rendered, through_vae), out)
