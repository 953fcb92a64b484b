"""Feature spaces in which sets of images are compared."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import LAST, Backbone

from .evaluator import deepest

#: how sets of pictures are brought to one size before they are compared
RESIZE = "bicubic"


class Space(Protocol):
    """name: as figures are named after it. side: that it scales pictures to itself, None where it takes them at the
    size that all sets have. Called with pictures [B, 3, h, w] in 0..1, it gives vectors [B, D], float32, on the CPU."""

    name: str
    side: int | None

    def __call__(self, pictures: Tensor) -> Tensor: ...


class TimmSpace:
    """The averaged last map of a timm model, of pictures scaled whole to its input; of models with several last maps
    that of the last layer that timm names."""

    side = None

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._layer = backbone, deepest(backbone)
        self.name = f"{backbone.name}{'' if self._layer == LAST else f' {self._layer}'}, pooled"

    def __call__(self, pictures: Tensor) -> Tensor:
        pixel_values = self._backbone.preprocess(pictures, "stretch")
        return self._backbone.extract(pixel_values, self._layer, pooled=True).values.flatten(1).cpu()


class Scaled:
    """Another space, of pictures scaled to `side` pixels first, whatever size the sets have elsewhere."""

    def __init__(self, space: Space, side: int) -> None:
        self.name, self.side, self._space = f"{space.name}, at {side} pixels", side, space

    def __call__(self, pictures: Tensor) -> Tensor:
        return self._space(scaled(pictures, self.side, "bilinear"))


def scaled(pictures: Tensor, side: int, resize: str = RESIZE) -> Tensor:
    """Pictures [B, 3, h, w] in 0..1 at [B, 3, side, side], antialiased. Sets of different sizes would differ by their
    sharpness alone (Parmar et al. 2022, whose bicubic this is)."""
    if tuple(pictures.shape[2:]) == (side, side):
        return pictures
    return F.interpolate(pictures.float(), (side, side), mode=resize, antialias=True).clamp(0, 1)
