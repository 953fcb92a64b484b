"""Combinations of feature maps: convex (paper Sec. 4.4, Fig. 7) and spatial (Fig. 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import FeatInvError
from .feature_map import FeatureMap


def interpolate(maps: Sequence[FeatureMap], weights: Sequence[float]) -> FeatureMap:
    """The convex combination sum_i w_i phi_i / sum_i w_i of maps of one source and batch size.

    weights: non-negative, one per map, not all zero. Prefix tokens are combined alike.
    """
    if len(maps) != len(weights):
        raise FeatInvError(f"{len(maps)} feature maps but {len(weights)} weights; give one weight per map")
    if not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        raise FeatInvError(f"weights {list(weights)}: expected non-negative numbers, not all zero")
    for other in maps[1:]:
        maps[0].source.require(other.source, "the first feature map", "another one")
    share = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    values = sum(w * m.values for w, m in zip(share, maps))
    prefix = None
    if all(m.prefix is not None for m in maps):
        prefix = sum(w * m.prefix for w, m in zip(share, maps))
    return FeatureMap(values, maps[0].source, prefix)


def at_grid(mask: Tensor, grid: tuple[int, int], soft: bool = False) -> Tensor:
    """A mask [B or 1, h, w] in 0..1 at feature resolution, [B or 1, 1, *grid]: the share of each cell that it
    covers, rounded to 0 or 1 unless `soft`."""
    cover = F.interpolate(mask[:, None].float(), grid, mode="area")
    return cover if soft else (cover >= 0.5).float()


def require_mask(mask: Tensor) -> None:
    """Raises FeatInvError unless it is a mask [B, h, w] of finite numbers."""
    if mask.ndim != 3 or not mask.isfinite().all():
        wrong = "has NaN or infinite values" if mask.ndim == 3 else f"has the shape {tuple(mask.shape)}"
        raise FeatInvError(f"the mask {wrong}; expected numbers in 0..1 of the shape [masks, height, width]")


def compose(inside: FeatureMap, outside: FeatureMap, mask: Tensor, soft: bool = False) -> FeatureMap:
    """`inside` where the mask [B or 1, h, w] is set, `outside` elsewhere.

    The prefix tokens belong to neither picture any more and are dropped. Raises FeatInvError for pooled maps, for
    another number of masks, and for a mask that selects nothing or holds NaN.
    """
    inside.source.require(outside.source, "the inner feature map", "the outer one")
    if inside.source.pooled:
        raise FeatInvError("pooled feature maps have no locations to compose; extract them with pooling off")
    require_mask(mask)
    if len(mask) not in (1, len(inside)):
        raise FeatInvError(f"{len(mask)} masks and {len(inside)} feature maps; give one mask, or one for each map")
    m = at_grid(mask, inside.source.grid, soft).to(inside.values)
    if not m.any():
        grid = " x ".join(map(str, inside.source.grid))
        raise FeatInvError(
            f"the mask covers no cell of the {grid} feature map by half; make it larger, or blend the cells on its edge"
            " (soft)"
        )
    return inside.with_values(m * inside.values + (1 - m) * outside.values)


def compose_regions(
    outside: FeatureMap, regions: Sequence[tuple[FeatureMap, Tensor]], soft: bool = False
) -> FeatureMap:
    """`outside` with each region's map inside its mask, as in compose, one after the other: where masks overlap, the
    later one lies on top. Raises FeatInvError as compose does, and without regions."""
    if not regions:
        raise FeatInvError("no region to compose; give at least one feature map with its mask")
    composed = outside
    for inside, mask in regions:
        composed = compose(inside, composed, mask, soft)
    return composed
