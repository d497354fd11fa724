"""The causal 3D VAE of Wan 2.1: pixels [B, 3, T, H, W] ↔ latents [B, 16, F, H/8, W/8], T = 4(F−1)+1.

model.py holds the VAE, layers.py and resampling.py what it is made of, chain.py what several processes that share its
layers are asked for, tiles.py the decoding by pieces where memory is short.
"""

from __future__ import annotations

from .chain import Chain
from .model import VAE

__all__ = ["VAE", "Chain"]
