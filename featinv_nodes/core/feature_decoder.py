"""A decoder of feature maps to images, as representation autoencoders have one (Zheng et al. 2025, arXiv 2510.11690):
one pass of a vision transformer, the same image each time."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .errors import FeatInvError
from .feature_map import FeatureMap, FeatureSource
from .waiting import Progress, unchecked

SMALLEST = 1e-6  # weight of the norm that can be divided by


class Patches(Protocol):
    """What the decoder gives of tokens."""

    logits: Tensor  # [B, N, patch pixels]


class TokenDecoder(Protocol):
    """diffusers' RAEDecoder, which core does not import."""

    image_size: int

    def __call__(self, hidden_states: Tensor) -> Patches:
        """Tokens [B, N, C] to patches."""

    def unpatchify(self, patchified_pixel_values: Tensor) -> Tensor:
        """Patches to pictures [B, 3, h, w]."""


class FeatureDecoder(nn.Module):
    """Feature maps of one source to pictures.

    decoder: a TokenDecoder. source: of the maps. mean, std: of the colour channels, which the decoder's pictures are
    normalised by. norm: (weight, bias) [C] of the backbone's last normalisation, which the decoder never saw and which
    is therefore taken back; None where the decoder reads the map's own values. Raises FeatInvError for a norm that
    cannot be taken back.
    """

    _mean: Tensor
    _std: Tensor
    _weight: Tensor
    _bias: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        source: FeatureSource,
        mean: Tensor,
        std: Tensor,
        norm: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.source = decoder.eval().requires_grad_(False), source
        weight, bias = norm or (torch.ones(source.channels), torch.zeros(source.channels))
        if (lowest := weight.abs().min().item()) < SMALLEST:
            raise FeatInvError(
                f"the last normalisation of {source.backbone} has a weight of {lowest:.1e}; this decoder"
                f" needs at least {SMALLEST:g}, to undo it. Use another backbone and its decoder"
            )
        for name, value in {"_weight": weight, "_bias": bias, "_mean": mean.view(3), "_std": std.view(3)}.items():
            self.register_buffer(name, value.detach().float().cpu().clone()[:, None, None], persistent=False)

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        side = cast(TokenDecoder, self.decoder).image_size
        return side, side

    def forward(self, values: Tensor) -> Tensor:
        """Pictures [B, 3, *picture_size], not cut to 0..1, of maps [B, C, H, W]. Gradients reach maps that
        require them."""
        tokens = ((values - self._bias) / self._weight).flatten(2).transpose(1, 2)  # [B, N, C], row by row
        decoder = cast(TokenDecoder, self.decoder)
        return decoder.unpatchify(decoder(tokens).logits) * self._std + self._mean

    @torch.inference_mode()
    def decode(self, features: FeatureMap, batch: int = 16, progress: Progress = unchecked) -> Tensor:
        """Pictures [B, 3, *picture_size] in 0..1 of a map each, `batch` at a time, on the maps' own device. progress:
        called with pictures done, of how many. Raises FeatInvError for maps of another source than the decoder's."""
        features.source.require(self.source, "the feature map", "the decoder")
        pictures: list[Tensor] = []
        for values in features.values.split(batch):
            pictures.append(self(values.to(self._mean)).clamp(0, 1).to(values.device))
            progress(sum(map(len, pictures)), len(features))
        return torch.cat(pictures)
