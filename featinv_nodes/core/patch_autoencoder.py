"""A small autoencoder for embedded worlds: principal components of patches, refined by two small residual networks.

A plain module, so that the trainer and the host share it. Images are [B, 3, p h, p w] in -1..1, latents [B, C, h, w],
p being the side of a patch and C the number of components.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .files import read_weights


def zero(layer: nn.Module) -> nn.Module:
    """The layer, with all its parameters zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starting at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        zero(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class PatchAutoencoder(nn.Module):
    """encode: linear projection of each p x p patch plus a convolutional correction; decode: its inverse, alike."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, patch: int = 8, latents: int = 24, refined: bool = True) -> None:
        """patch: its side p in pixels, a multiple of 4. latents: channels C. refined: whether encode has its
        correction."""
        super().__init__()
        self.patch, self.latents, self.refined = patch, latents, refined
        self.register_buffer("mean", torch.zeros(latents, 1, 1))
        self.register_buffer("deviation", torch.ones(latents, 1, 1))
        self.project = nn.Conv2d(3 * patch**2, latents, 1)
        self.expand = nn.Conv2d(latents, 3 * patch**2, 1)
        fold = patch // 4
        self.encoder = (
            None
            if not refined
            else nn.Sequential(
                nn.PixelUnshuffle(4),
                nn.Conv2d(48, 64, 3, padding=1),
                Residual(64),
                nn.PixelUnshuffle(fold),
                nn.Conv2d(64 * fold**2, 128, 1),
                Residual(128),
                Residual(128),
                Residual(128),
                zero(nn.Conv2d(128, latents, 1)),
            )
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latents, 128, 3, padding=1),
            *(Residual(128) for _ in range(4)),
            nn.Conv2d(128, 256, 1),
            nn.PixelShuffle(2),
            *(Residual(64) for _ in range(3)),
            nn.Conv2d(64, 128, 1),
            nn.PixelShuffle(2),
            *(Residual(32) for _ in range(2)),
            zero(nn.Conv2d(32, 3 * fold**2, 3, padding=1)),
            nn.PixelShuffle(fold),
        )

    @classmethod
    def load(cls, folder: Path) -> PatchAutoencoder:
        """Reads a diffusers folder (config.json, diffusion_pytorch_model.safetensors), in float32, for evaluation."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vae = cls(**{name: config[name] for name in ("patch", "latents", "refined") if name in config})
        vae.load_state_dict(read_weights(folder / "diffusion_pytorch_model.safetensors"))
        return vae.eval().requires_grad_(False)

    @property
    def config(self) -> dict:
        """What config.json holds."""
        return {
            "_class_name": type(self).__name__,
            "patch": self.patch,
            "latents": self.latents,
            "refined": self.refined,
        }

    def encode(self, x: Tensor) -> Tensor:
        """Pictures -> latents of zero mean and unit variance over the training pictures."""
        z = self.project(F.pixel_unshuffle(x, self.patch))
        z = z if self.encoder is None else z + self.encoder(x)
        return (z - self.mean) / self.deviation

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pictures, not clamped."""
        z = z * self.deviation + self.mean
        return F.pixel_shuffle(self.expand(z), self.patch) + self.decoder(z)

    @torch.no_grad()
    def start_from_patches(self, x: Tensor) -> None:
        """Sets the two linear maps to the principal components of the patches of x [B, 3, h, w] and their inverse."""
        patches = rearrange(x, "b c (h p) (w q) -> (c p q) (b h w)", p=self.patch, q=self.patch)
        mean = patches.mean(1, keepdim=True)
        basis, scale, _ = torch.linalg.svd((patches - mean) @ (patches - mean).T / patches.shape[1])
        basis, scale = basis[:, : self.latents], scale[: self.latents].sum().div(self.latents).sqrt()
        to_latents, from_latents = (basis.T / scale)[:, :, None, None], (basis * scale)[:, :, None, None]
        self.project.load_state_dict({"weight": to_latents, "bias": (-basis.T @ mean / scale)[:, 0]})
        self.expand.load_state_dict({"weight": from_latents, "bias": mean[:, 0]})
