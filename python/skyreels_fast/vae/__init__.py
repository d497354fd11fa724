"""The causal 3D VAE of Wan 2.1: pixels [B, 3, T, H, W] ↔ latents [B, 16, F, H/8, W/8], T = 4(F−1)+1.

model.py holds the VAE, layers.py what it is made of, tiles.py the decoding by pieces where memory is short.
"""

from __future__ import annotations

from .model import VAE, SharedRows

__all__ = ["VAE", "SharedRows"]
