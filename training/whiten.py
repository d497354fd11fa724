"""Gives a trained VAE latents that are easy to diffuse: uncorrelated channels of unit variance, by an exact rewrite.

Reconstruction alone leaves the channels nearly parallel: most of their variance is the background's colour, and what
tells shapes apart hides in differences that noise drowns first. A linear map of the latents turns them upright. It goes
into the 1×1×1 convolutions on either side (`conv1`, `conv2`), so the decoded video stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyreels_fast.config import LATENT_CHANNELS
from skyreels_fast.vae import VAE

FIRST_MEAN = slice(0, LATENT_CHANNELS)  # the rows of conv1 that give the posterior's mean


class Moments:
    """Sums over latents: enough for the mean and covariance of posterior samples, channel by channel."""

    def __init__(self, device: torch.device | str) -> None:
        self.count = 0
        self.total = torch.zeros(LATENT_CHANNELS, device=device, dtype=torch.float64)
        self.products = torch.zeros(LATENT_CHANNELS, LATENT_CHANNELS, device=device, dtype=torch.float64)
        self.noise = torch.zeros_like(self.total)

    def add(self, mean: Tensor, log_variance: Tensor) -> None:
        """Take in a batch's posterior [B,16,F,h,w]."""
        rows = mean.double().transpose(0, 1).flatten(1)
        self.count += rows.shape[1]
        self.total += rows.sum(1)
        self.products += rows @ rows.T
        self.noise += log_variance.double().exp().transpose(0, 1).flatten(1).sum(1)

    def whitening(self) -> tuple[Tensor, Tensor]:
        """(matrix [16,16], mean [16]): matrix @ (z - mean) has the identity as its covariance, z a posterior sample.

        The axes are those of the covariance seen in units of the posterior's own noise, so that a direction which
        carries nothing but noise keeps it at scale 1 and is not blown up.
        """
        mean = self.total / self.count
        noise = (self.noise / self.count).sqrt()
        covariance = self.products / self.count - torch.outer(mean, mean)
        values, axes = torch.linalg.eigh(covariance / torch.outer(noise, noise) + torch.eye(len(mean)).to(noise))
        order = values.argsort(descending=True)
        return values[order].rsqrt()[:, None] * axes.T[order] / noise, mean


@torch.no_grad()
def rewrite(vae: VAE, matrix: Tensor, mean: Tensor) -> None:
    """Change `vae` in place so that its latents are matrix @ (z - mean) where they were z; its videos stay the same.

    What was normalised outside is now inside: the latents' statistics become 0 and 1.
    The rows of `conv1` that give the log-variance, which nothing but training reads, are left as they are.
    """
    weight = vae.conv1.weight[FIRST_MEAN].flatten(1).double()
    bias = vae.conv1.bias[FIRST_MEAN].double() - mean
    vae.conv1.weight[FIRST_MEAN] = (matrix @ weight).view_as(vae.conv1.weight[FIRST_MEAN]).to(vae.conv1.weight.dtype)
    vae.conv1.bias[FIRST_MEAN] = (matrix @ bias).to(vae.conv1.bias.dtype)
    weight = vae.conv2.weight.flatten(1).double()
    vae.conv2.bias += (weight @ mean).to(vae.conv2.bias.dtype)
    vae.conv2.weight.copy_((weight @ torch.linalg.inv(matrix)).view_as(vae.conv2.weight))
    vae.latents_mean, vae.latents_std = (0.0,) * LATENT_CHANNELS, (1.0,) * LATENT_CHANNELS
