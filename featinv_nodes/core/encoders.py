"""Conditional encoders: from a feature map to the diffusion model's first internal representation (paper Sec. 2, App.
A.1)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .resize import resize_bilinear


class Encoder(nn.Module):
    """The base of every encoder: `mean` and `deviation` [C] standardise each channel first; 0 and 1 (the paper)
    change nothing."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def standardise(self, values: Tensor) -> None:
        """Sets mean and deviation per channel from feature maps [B, C, H, W] of the training set."""
        flat = rearrange(values.float(), "b c h w -> c (b h w)")
        self.mean.copy_(flat.mean(1))
        self.deviation.copy_(flat.std(1).clamp(min=1e-4))

    def standardised(self, values: Tensor) -> Tensor:
        """Feature values [B, C, H, W] with the training set's mean and deviation taken out."""
        return (values - self.mean[:, None, None]) / self.deviation[:, None, None]


class ConvEncoder(Encoder):
    """The paper's conditional input encoder: bilinear upsampling to the latent grid, then a shallow CNN.

    Three 3x3 convolutions (C_f -> width -> width -> C_d) with SiLU between them; the last starts at zero, so that an
    untrained model leaves the base model's output unchanged. A pooled map [B, C, 1, 1] is thereby copied to every
    location.
    """

    kind = "conv"

    def __init__(self, channels: int, out_channels: int, width: int = 512, kernel: int = 3) -> None:
        """channels: C_f of the feature map. out_channels: C_d, the base model's first width. width: hidden channels.
        kernel: side of the convolutions; 1 is enough for a pooled map that is not upsampled first."""
        super().__init__(channels)
        self.settings = {
            "kind": self.kind,
            "channels": channels,
            "out_channels": out_channels,
            "width": width,
            "kernel": kernel,
        }
        self.block = nn.Sequential(
            nn.Conv2d(channels, width, kernel, padding=kernel // 2),
            nn.SiLU(),
            nn.Conv2d(width, width, kernel, padding=kernel // 2),
            nn.SiLU(),
            nn.Conv2d(width, out_channels, kernel, padding=kernel // 2),
        )
        for parameter in self.block[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Feature values [B, C, h, w] -> hint [B, C_d, *size], size being the latent grid (H, W)."""
        return self.block(resize_bilinear(self.standardised(values), size))


class MapConvEncoder(ConvEncoder):
    """ConvEncoder's convolutions on the map's own grid, and its result upsampled: for ConvNeXt's 9 x 9 map and 32 x 32
    latents a thirteenth of the operations.

    All three convolutions come before the upsampling. The last, with nothing after it that is not linear, could only
    smooth what is upsampled, over three of the 3.6 latent cells that a map cell covers there, and would alone cost
    twice what the three do on the map. The paper's encoder sees neighbouring latent cells, this one neighbouring cells
    of the map.
    """

    kind = "conv_at_map"

    def forward(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Feature values [B, C, h, w] -> hint [B, C_d, *size], size being the latent grid (H, W)."""
        return resize_bilinear(self.block(self.standardised(values)), size)


class PerceiverEncoder(Encoder):
    """The paper's alternative (App. A.1): a learned grid of queries reads the feature map by cross-attention, as in
    Perceiver (Jaegle et al. 2021), so that no location of the hint is bound to a location of the map.

    One query per cell of the latent grid, bilinearly scaled to other latents; a learned position is added to each
    token of the map. Width, heads and the layer after the attention are not in the paper; the projection to C_d starts
    at zero, as in ConvEncoder.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        width: int = 512,
        tokens: tuple[int, int] = (1, 1),
        queries: tuple[int, int] = (32, 32),
        heads: int = 8,
    ) -> None:
        """channels: C_f. out_channels: C_d. width: of queries and tokens. tokens: (h, w) of the map. queries: latent
        grid (H, W) of training. heads: of the attention, dividing width."""
        super().__init__(channels)
        self.settings = {
            "kind": "perceiver",
            "channels": channels,
            "out_channels": out_channels,
            "width": width,
            "tokens": list(tokens),
            "queries": list(queries),
            "heads": heads,
        }
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(1, width, *queries) * 0.02)
        self.position = nn.Parameter(torch.randn(1, width, *tokens) * 0.02)
        self.in_proj = nn.Conv2d(channels, width, 1)
        self.query_norm, self.token_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query, self.to_key_value, self.out_proj = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Linear(width, out_channels)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Feature values [B, C, h, w] -> hint [B, C_d, *size], size being the latent grid (H, W)."""
        tokens = self.in_proj(self.standardised(values)) + self.position
        tokens = self.token_norm(rearrange(tokens, "b c h w -> b (h w) c"))
        grid = repeat(resize_bilinear(self.queries, size), "1 c h w -> b (h w) c", b=len(values))
        q, k, v = (
            rearrange(x, "b n (heads c) -> b heads n c", heads=self.heads)
            for x in (self.to_query(self.query_norm(grid)), *self.to_key_value(tokens).chunk(2, 2))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        x = grid + self.out_proj(rearrange(attended, "b heads n c -> b n (heads c)"))
        x = x + self.mlp(self.norm(x))
        return rearrange(self.out(x), "b (h w) c -> b c h w", h=size[0])


KINDS = {"conv": ConvEncoder, "conv_at_map": MapConvEncoder, "perceiver": PerceiverEncoder}


def build_encoder(settings: dict) -> nn.Module:
    """An encoder from its `settings`, as stored in the weights file. Raises KeyError for an unknown kind."""
    settings = dict(settings)
    return KINDS[settings.pop("kind")](**settings)
