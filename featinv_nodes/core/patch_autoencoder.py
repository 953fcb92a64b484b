"""The embedded world's autoencoder: principal components of 8 x 8 patches, refined by two small residual networks.

A plain module, so that the trainer and the host share it. Pictures are [B, 3, 8h, 8w] in -1..1, latents [B, 24, h, w].
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, LATENTS = 8, 24


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starting at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchAutoencoder(nn.Module):
    """encode: linear projection of each 8 x 8 patch plus a convolutional correction; decode: its inverse, alike."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(LATENTS, 1, 1))
        self.register_buffer("deviation", torch.ones(LATENTS, 1, 1))
        self.project = nn.Conv2d(3 * PATCH**2, LATENTS, 1)
        self.expand = nn.Conv2d(LATENTS, 3 * PATCH**2, 1)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, 64, 3, padding=1), Residual(64), nn.PixelUnshuffle(2),
            nn.Conv2d(256, 128, 1), Residual(128), Residual(128), Residual(128), _zero(nn.Conv2d(128, LATENTS, 1)),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENTS, 128, 3, padding=1), *(Residual(128) for _ in range(4)), nn.Conv2d(128, 256, 1), nn.PixelShuffle(2),
            *(Residual(64) for _ in range(3)), nn.Conv2d(64, 128, 1), nn.PixelShuffle(2),
            *(Residual(32) for _ in range(2)), _zero(nn.Conv2d(32, 12, 3, padding=1)), nn.PixelShuffle(2),
        )

    @classmethod
    def load(cls, file: Path) -> PatchAutoencoder:
        """Reads a state dict, in float32, for evaluation."""
        vae = cls()
        vae.load_state_dict({k: v.float() for k, v in load_file(file).items()})
        return vae.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures -> latents of zero mean and unit variance over the training scenes."""
        z = self.project(F.pixel_unshuffle(x, PATCH)) + self.encoder(x)
        return (z - self.mean) / self.deviation

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pictures, not clamped."""
        z = z * self.deviation + self.mean
        return F.pixel_shuffle(self.expand(z), PATCH) + self.decoder(z)

    @torch.no_grad()
    def start_from_patches(self, x: Tensor) -> None:
        """Sets the two linear maps to the principal components of the patches of x [B, 3, h, w] and their inverse."""
        patches = F.pixel_unshuffle(x, PATCH).transpose(0, 1).flatten(1)
        mean = patches.mean(1, keepdim=True)
        basis, scale, _ = torch.linalg.svd((patches - mean) @ (patches - mean).T / patches.shape[1])
        basis, scale = basis[:, :LATENTS], scale[:LATENTS].sum().div(LATENTS).sqrt()
        self.project.weight.copy_((basis.T / scale)[:, :, None, None])
        self.project.bias.copy_((-basis.T @ mean / scale)[:, 0])
        self.expand.weight.copy_((basis * scale)[:, :, None, None])
        self.expand.bias.copy_(mean[:, 0])
