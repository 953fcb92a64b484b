"""How much concepts matter to the classifier (MCD, Vielhaben et al. 2023), through the backbone's own head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..backbones import Backbone
from ..errors import FeatInvError
from ..feature_map import FeatureMap
from ..waiting import Check, unchecked
from .decomposition import Concepts

TOLERANCE = 1e-3  # of the largest logit: what float32 leaves of an exact sum
ROUNDING = 1e-6  # likewise: of nothing
CHANNELS = 64  # whose maps go through the head together


def relevance(
    backbone: Backbone,
    concepts: Concepts,
    features: FeatureMap,
    classes: Tensor | None = None,
    check: Check = unchecked,
) -> tuple[Tensor, Tensor]:
    """What each concept contributes to each logit: [n + 1, B, classes], and the head's bias [B, classes].

    Contributions and bias sum to the logits. With each picture's LayerNorm scale frozen, pool -> norm -> linear is an
    affine function f of the feature map, and the contribution is f(phi_i) - f(0), w . phi_i in the paper's words.
    classes: numbers [B, m] of each picture's logits to look at, instead of all. check: called for each concept.
    Raises FeatInvError for a head that is not affine even so, and as Backbone.logits does.
    """

    def logits_of(values: Tensor) -> Tensor:
        check()
        logits = backbone.logits(features.with_values(values, keep_prefix=True))
        return logits if classes is None else logits.gather(1, classes.to(logits.device))

    with torch.inference_mode(), frozen_scales(backbone) as freeze:
        logits = logits_of(features.values)
        freeze()
        bias = logits_of(torch.zeros_like(features.values))
        contributions = torch.stack([logits_of(part) - bias for part in concepts.each_part(features)])
    _require_affine(backbone, contributions.sum(0) + bias, logits)
    _require_reading(backbone, contributions, logits)
    return contributions, bias


def class_weights(backbone: Backbone, features: FeatureMap, check: Check = unchecked) -> Tensor:
    """w [C, classes]: each logit's response to each channel, one everywhere on the grid, in the affine head of the
    first map.

    A LayerNorm's scale makes w longer or shorter from picture to picture, but turns it nowhere. check:
    called for every 64 channels. Raises as relevance does.
    """
    first = features.select(0)
    unit = torch.eye(first.values.shape[1], device=first.values.device)[:, :, None, None].expand(
        -1, -1, *first.values.shape[2:]
    )
    with torch.inference_mode(), frozen_scales(backbone) as freeze:
        logits = backbone.logits(first)
        freeze()
        bias = backbone.logits(first.with_values(torch.zeros_like(first.values), keep_prefix=True))
        rows = []
        for part in unit.split(CHANNELS):
            check()
            rows.append(backbone.logits(_like(first, part)) - bias)
        weights = torch.cat(rows)
        pooled = first.values.mean((2, 3)).to(weights)
    _require_affine(backbone, pooled @ weights + bias, logits)
    _require_reading(backbone, weights, logits)
    return weights


@contextmanager
def frozen_scales(backbone: Backbone) -> Iterator[Callable[[], None]]:
    """Inside, LayerNorms remember the scale 1 / sigma of each vector they see; after a call of what this yields, they
    use the remembered scales, which makes them affine."""
    scales: dict[nn.Module, Tensor] = {}
    frozen = False

    def hook(norm: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        x = inputs[0]
        over_channels = isinstance(norm, LayerNorm2d)  # [B, C, H, W]; else the last dimension
        axis = 1 if over_channels else -1
        if not frozen:
            scales[norm] = torch.rsqrt(x.var(axis, unbiased=False, keepdim=True) + norm.eps)
            return None
        shape = (-1, 1, 1) if over_channels else (-1,)
        out = (x - x.mean(axis, keepdim=True)) * scales[norm]
        out = out if norm.weight is None else out * norm.weight.view(shape)
        return out if norm.bias is None else out + norm.bias.view(shape)

    def freeze() -> None:
        nonlocal frozen
        frozen = True

    handles = [m.register_forward_hook(hook) for m in backbone.model.modules() if isinstance(m, nn.LayerNorm)]
    try:
        yield freeze
    finally:
        for handle in handles:
            handle.remove()


def _like(first: FeatureMap, values: Tensor) -> FeatureMap:
    prefix = None if first.prefix is None else first.prefix.expand(len(values), -1, -1)
    return FeatureMap(values, first.source, prefix)


def _require_affine(backbone: Backbone, total: Tensor, logits: Tensor) -> None:
    off = (total - logits).abs().max() / logits.abs().max().clamp(min=1e-6)
    if off > TOLERANCE:
        raise FeatInvError(
            f"the head of {backbone.name} is not pool, norm and a linear layer: contributions differ from the logits by"
            f" {off:.1%}; relevance needs a head without activation or attention"
        )


def _require_reading(backbone: Backbone, contributions: Tensor, logits: Tensor) -> None:
    if contributions.abs().max() <= ROUNDING * logits.abs().max():
        raise FeatInvError(
            f"the head of {backbone.name} reads the class token, not the map: no location of it contributes to any"
            " class"
        )
