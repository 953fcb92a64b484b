"""FeatInv-Viz on an inversion model: draws the original and the edited maps with equal seeds and measures what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from featinv_nodes.core.concepts import Concepts
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.steering import FACTOR, SEEDS, Edit, Slope, closed_loop, difference, edit, measure_slope

from ..models.inversion import Opened
from ..models.pipeline import Sampling, noise


@dataclass(frozen=True)
class Request:
    """What to do to each group of concepts. factor: what their part is multiplied by. seeds, seed: reconstructions of
    each map, and the seed of their noise. keep_length: see core.steering.edit. closed: where the asked factor gives another slope,
    command one that gives it, at up to five times the cost."""

    factor: float = FACTOR
    seeds: int = SEEDS
    seed: int = 0
    keep_length: bool = False
    closed: bool = False


@dataclass(frozen=True)
class Shown:
    """FeatInv-Viz of one group of concepts. change: the edit, of this group alone. original, changed: reconstructions
    [n, 3, h, w]. distance: the difference map [h, w] (Algorithm 1). slope: what came of it. commanded: the factor used."""

    change: Edit
    original: Tensor
    changed: Tensor
    distance: Tensor
    slope: Slope
    commanded: float


def visualize(
    opened: Opened, features: FeatureMap, concepts: Concepts, groups: list[list[str]], request: Request, how: Sampling,
    batch: int = 16, report: Callable[[int], object] = lambda n: None,
) -> list[Shown]:  # fmt: skip
    """FeatInv-Viz of each group in one feature map [1, C, H, W], all drawn in one go, the original once. report: called
    with each batch's size. Raises FeatInvError as `edit` does."""
    features = features.to("cpu")
    start = noise(opened.base, request.seed, request.seeds)

    def draw(maps: FeatureMap) -> tuple[Tensor, FeatureMap]:
        pictures = opened.draw(maps, how, start.repeat(len(maps) // request.seeds, 1, 1, 1), batch, report)
        return pictures, opened.see(pictures).to("cpu")

    asked = edit(features, concepts, groups, request.factor, request.keep_length)
    pictures, seen = draw(asked.paired(request.seeds))
    first, *others = pictures.split(request.seeds)
    seen = [seen.select(slice(i, i + request.seeds)) for i in range(0, len(pictures), request.seeds)]

    def shown(group: list[str], commanded: float, changed: Tensor, again: FeatureMap) -> Shown:
        change = edit(features, concepts, [group], commanded, request.keep_length)
        slope = measure_slope(replace(change, factor=request.factor), 0, (first, changed), (seen[0], again))
        return Shown(change, first, changed, difference(first, changed), slope, commanded)

    def draw_at(group: list[str], factor: float) -> Shown:
        return shown(group, factor, *draw(edit(features, concepts, [group], factor, request.keep_length).changed.repeat(request.seeds)))

    found = [shown(group, request.factor, changed, again) for group, changed, again in zip(groups, others, seen[1:])]
    if request.closed:
        return [_closed(one, partial(draw_at, group), request.factor) for one, group in zip(found, groups)]
    return found


def _closed(one: Shown, draw_at: Callable[[float], Shown], asked: float) -> Shown:
    """The same group with the factor that core.steering.closed_loop commands."""
    tried = {asked: one}

    def slope_at(factor: float) -> float:
        if factor not in tried:
            tried[factor] = draw_at(factor)
        return tried[factor].slope.own

    return tried[closed_loop(slope_at, asked)[0]]
