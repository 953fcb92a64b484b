"""Conditional encoders: from a feature map to the diffusion model's first internal representation (paper Sec. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvEncoder(nn.Module):
    """The paper's conditional input encoder: bilinear upsampling to the latent grid, then a shallow CNN.

    Three 3x3 convolutions (C_f -> width -> width -> C_d) with SiLU between them; the last starts at zero, so that an
    untrained model leaves the base model's output unchanged. A pooled map [B, C, 1, 1] is thereby copied to every
    location. `mean` and `deviation` [C] standardise each channel first; 0 and 1 (the paper) leave it as it is.
    """

    def __init__(self, channels: int, out_channels: int, width: int = 512) -> None:
        """channels: C_f of the feature map. out_channels: C_d, the base model's first width. width: hidden channels."""
        super().__init__()
        self.settings = {"kind": "conv", "channels": channels, "out_channels": out_channels, "width": width}
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.block = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.block[-1].weight)
        nn.init.zeros_(self.block[-1].bias)

    def standardise(self, values: Tensor) -> None:
        """Sets mean and deviation per channel from feature maps [B, C, H, W] of the training set."""
        flat = values.float().transpose(0, 1).flatten(1)
        self.mean.copy_(flat.mean(1))
        self.deviation.copy_(flat.std(1).clamp(min=1e-4))

    def forward(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Feature values [B, C, h, w] -> hint [B, C_d, *size], size being the latent grid (H, W)."""
        x = (values - self.mean[:, None, None]) / self.deviation[:, None, None]
        return self.block(F.interpolate(x, size, mode="bilinear", align_corners=False))


KINDS = {"conv": ConvEncoder}


def build_encoder(settings: dict) -> nn.Module:
    """An encoder from its `settings`, as stored in the weights file. Raises KeyError for an unknown kind."""
    settings = dict(settings)
    return KINDS[settings.pop("kind")](**settings)
