"""FeatInv-Viz: which pixels change when a concept is turned down (paper Sec. 4.3, Algorithm 1), and whether the concept
changed as much as requested."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .concepts import Concepts
from .errors import FeatInvError
from .feature_map import FeatureMap, concatenate
from .waiting import Check, unchecked

THRESHOLD, FACTOR, SEEDS = 0.33, 0.25, 5
ROUNDS = 5  # of the closed loop, at most
#: a slope passes if this share of the asked change arrives: 0.15 to 0.40 where 0.25 is asked
LEAST, MOST = 0.80, 1.134


@dataclass(frozen=True)
class PairedMaps(FeatureMap):
    """Feature maps in the order of Edit.paired. Whatever is made of them is a FeatureMap in no such order.

    seeds: how often each map stands in a row.
    """

    seeds: int = 1


@dataclass(frozen=True)
class Edit:
    """A feature map and what it becomes when concepts are scaled.

    original: B maps. changed: for each group in turn the B maps in which that group's concepts, and no others, are
    scaled: by the factor, or after a closed loop by the commanded one. concepts: the decomposition that the names in
    groups belong to. keep_length: see edit.
    """

    original: FeatureMap
    changed: FeatureMap
    concepts: Concepts
    groups: tuple[tuple[str, ...], ...]
    factor: float
    keep_length: bool = False

    def titles(self) -> list[str]:
        """One per group: its concepts' names."""
        return [" + ".join(group) for group in self.groups]

    def paired(self, seeds: int) -> PairedMaps:
        """The maps of Algorithm 1 as one batch [(1 + groups) * seeds]: the original once per seed, then each change.

        Row i of every part belongs to seed i. Raises FeatInvError unless the edit is of a single map.
        """
        self._require_single()
        maps = concatenate([self.original, self.changed]).repeat(seeds)
        return PairedMaps(maps.values, maps.source, seeds=seeds)

    def unpaired(self, pictures: Tensor) -> Tensor:
        """Pictures [(1 + groups) * seeds, 3, H, W], drawn from `paired` -> [1 + groups, seeds, 3, H, W]. Raises
        FeatInvError for another number of pictures, and as `paired` does."""
        self._require_single()
        parts = 1 + len(self.groups)
        if not len(pictures) or len(pictures) % parts:
            raise FeatInvError(
                f"{len(pictures)} images for the original and {parts - 1} changed maps; expected a multiple of"
                f" {parts}, the same seeds for each"
            )
        return pictures.unflatten(0, (parts, -1))

    def require_pairs(self, maps: FeatureMap, pictures: int) -> None:
        """Raises FeatInvError unless `maps` are those of `paired`, and there is a picture of each."""
        maps.source.require(self.original.source, "the feature maps", "the edited one")
        own = self.paired(maps.seeds) if isinstance(maps, PairedMaps) else None
        if own is None or own.values.shape != maps.values.shape or not own.values.equal(maps.values.to(own.values)):
            raise FeatInvError(
                "the feature maps are not those that Paired Latents makes of this edit; connect its features output"
            )
        if pictures != len(maps):
            raise FeatInvError(
                f"{pictures} images of Paired Latents' {len(maps)} maps; expected one of each, in their order."
                " Connect all images that the sampler made from Paired Latents' features and latent"
            )

    def _require_single(self) -> None:
        if len(self.original) != 1:
            raise FeatInvError(
                f"FeatInv-Viz shows one image at a time; this edit is of {len(self.original)} feature maps, give one"
            )


def edit(
    features: FeatureMap,
    concepts: Concepts,
    groups: Sequence[Sequence[str | int]],
    factor: float = FACTOR,
    keep_length: bool = False,
) -> Edit:
    """phi' = sum of the other parts + factor * phi_c for the concepts c of each group (Algorithm 1, first line).

    factor: 0.25 in the paper; above 1 amplifies. keep_length: above 1, vectors that grow are scaled back to the length
    they had, since longer ones than the inversion model was trained on lead it astray (Appendix D); the concept then
    grows by less than the factor, at the others' cost. Raises FeatInvError for a concept that there is not, an empty
    group, a factor that is not finite, or maps of another source.
    """
    if not math.isfinite(factor):
        raise FeatInvError(f"factor {factor}: expected a finite number, such as {FACTOR}")
    if not groups or not all(groups):
        raise FeatInvError(f"no concept named; give numbers or names out of {', '.join(concepts.names[:24])}")
    named = tuple(tuple(dict.fromkeys(concepts.names[concepts.index(name)] for name in group)) for group in groups)
    changed = [concepts.scale(features, dict.fromkeys(group, factor)) for group in named]
    if keep_length and factor > 1:
        length = features.values.norm(dim=1, keepdim=True)
        changed = [
            m.with_values(m.values * (length / m.values.norm(dim=1, keepdim=True).clamp(min=1e-8)).clamp(max=1))
            for m in changed
        ]
    return Edit(features, concatenate(changed), concepts, named, factor, keep_length)


def parse_groups(text: str) -> list[list[str]]:
    """ "sky, bird; branch" -> [["sky", "bird"], ["branch"]]: commas join concepts, semicolons part the variants."""
    groups = ([name.strip() for name in group.split(",") if name.strip()] for group in text.split(";"))
    return [group for group in groups if group]


def difference(original: Tensor, changed: Tensor) -> Tensor:
    """[H, W] median over the seeds of the Euclidean distance over RGB at each pixel.

    original, changed: [n, 3, H, W], row i of both drawn with the same seed, from the feature map and from the one
    with the concept attenuated. Raises FeatInvError for batches of different shapes.
    """
    _require_pairs(original, changed)
    return (original - changed).norm(dim=1).quantile(0.5, dim=0)


def signed_difference(original: Tensor, changed: Tensor) -> Tensor:
    """[H, W] in -1..1: median over the seeds of how much brighter each pixel becomes (mean over RGB). Shapes as in
    `difference`."""
    _require_pairs(original, changed)
    return (changed - original).mean(1).quantile(0.5, dim=0)


def _require_pairs(original: Tensor, changed: Tensor) -> None:
    if original.shape != changed.shape:
        raise FeatInvError(
            f"{tuple(original.shape)} original and {tuple(changed.shape)} attenuated reconstructions; "
            "sample both with the same seed, size and number of images"
        )


def null_difference(original: Tensor) -> Tensor | None:
    """[H, W] what `difference` would be if nothing were edited and the seeds alone differed: reconstructions [n, 3, H,
    W] of the unedited map against one another, each seed with the next. None for a single one."""
    return difference(original, original.roll(1, 0)) if len(original) > 1 else None


def normalised(distance: Tensor) -> Tensor:
    """A difference map [H, W] scaled to 0..1 by its extremes; zeros where nothing changes."""
    low, high = distance.amin(), distance.amax()
    return (distance - low) / (high - low).clamp(min=1e-8)


def affected(distance: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """[H, W] 1.0 where the normalised difference reaches the threshold (Fig. 6: below 0.33 counts as unaffected)."""
    return (normalised(distance) >= threshold).float()


@dataclass(frozen=True)
class Slope:
    """How much of the edited concepts the backbone finds again in the reconstructions.

    asked: the factor. own: slope of the re-read part on the original one, through the origin, over locations, seeds and
    channels. others: the same for all other concepts together, 1 if they are unchanged (1 where there are none).
    untouched: `own` in the reconstructions of the unedited map, 1 for a faithful inversion model. null: mean of the
    difference map over that of the null map, None for a single seed.
    """

    asked: float
    own: float
    others: float
    untouched: float
    null: float | None

    @property
    def passed(self) -> bool:
        return passes(self.asked, self.own)

    @property
    def verdict(self) -> str:
        """Whether the slope is as requested, and if not, why."""
        little = arrived(self.asked, self.own) < LEAST
        return "as requested" if self.passed else f"NOT as requested: too {'little' if little else 'much'} changed"

    def describe(self) -> str:
        """One line for captions and messages."""
        null = "" if self.null is None else f"; {self.null:.1f} times the difference between seeds"
        return (
            f"slope {self.own:.2f} for factor {self.asked:g} ({self.verdict}), other concepts {self.others:.2f}{null}"
        )


def measure_slope(
    change: Edit,
    group: int,
    pictures: tuple[Tensor, Tensor],
    reread: tuple[FeatureMap, FeatureMap],
    check: Check = unchecked,
) -> Slope:
    """What a group's edit came to. pictures: the reconstructions [n, 3, H, W] of the original and of the changed map;
    reread: their feature maps, read again by the backbone. check: called for each concept."""
    concepts, phi = change.concepts, change.original.to(reread[1].values.device)
    own = [concepts.index(name) for name in change.groups[group]]
    others = [i for i in range(len(concepts)) if i not in own]
    null = null_difference(pictures[0])
    return Slope(
        change.factor,
        own=slope(concepts, own, phi, reread[1], check),
        others=slope(concepts, others, phi, reread[1], check) if others else 1.0,
        untouched=slope(concepts, own, phi, reread[0], check),
        null=None if null is None else float(difference(*pictures).mean() / null.mean().clamp(min=1e-8)),
    )


def measure_slopes(change: Edit, pictures: Tensor, reread: FeatureMap, check: Check = unchecked) -> list[Slope]:
    """What each group's edit came to. pictures: as in Edit.unpaired; reread: their feature maps, read again by the
    backbone. check: as in measure_slope.

    Raises FeatInvError if these are of another source than the edited map, or as Edit.unpaired does.
    """
    reread.source.require(change.original.source, "what the backbone reads in the images", "the edited feature map")
    first, *others = change.unpaired(pictures)
    again, *changed = [reread.select(slice(i, i + len(first))) for i in range(0, len(reread), len(first))]
    return [
        measure_slope(change, group, (first, other), (again, changed[group]), check)
        for group, other in enumerate(others)
    ]


def arrived(asked: float, own: float) -> float:
    """Share of the requested change that arrived: (1 - own) / (1 - asked); 1 if no change was requested."""
    return (1 - own) / (1 - asked) if asked != 1 else 1.0


def passes(asked: float, own: float) -> bool:
    """Whether enough of the requested change arrived, and not too much."""
    return LEAST <= arrived(asked, own) <= MOST


def slope(
    concepts: Concepts,
    numbers: Sequence[int],
    original: FeatureMap,
    again: FeatureMap,
    check: Check = unchecked,
) -> float:
    """<phi_c, phi'_c> / <phi_c, phi_c> summed over the concepts c, locations and channels, and the n maps of `again`
    against the one of `original`; 0 for concepts that the original does not have. check: called for each concept."""
    along = length = 0.0
    for number, (part, reread) in enumerate(zip(concepts.each_part(original), concepts.each_part(again))):
        check()
        if number in numbers:
            along += float((part * reread).sum())
            length += float(part.square().sum()) * len(again)
    return along / length if length > 0 else 0.0


def closed_loop(slope_at: Callable[[float], float], asked: float, rounds: int = ROUNDS) -> tuple[float, float]:
    """(factor to command, slope it gives): the factor whose re-read slope passes or, if none does, comes nearest to
    the requested one.

    Attenuated maps are seldom maps that a picture has; the inversion model draws the nearest picture, in which the
    concept is often whole. slope_at draws with a commanded factor and measures; it is called `rounds` times at most,
    bisecting from the asked factor towards twice the asked change, or towards 1 where too much changed, and ends early
    on a slope that passes.
    """
    best = asked, slope_at(asked)
    little, much = (asked, 2 * asked - 1) if arrived(asked, best[1]) < 1 else (1.0, asked)
    for _ in range(rounds - 1):
        if passes(asked, best[1]):
            break
        factor = (little + much) / 2
        result = slope_at(factor)
        little, much = (factor, much) if arrived(asked, result) < 1 else (little, factor)
        if passes(asked, result) or abs(result - asked) < abs(best[1] - asked):
            best = factor, result
    return best


@dataclass(frozen=True)
class VizSettings:
    """What to do to each group of concepts.

    factor: multiplies their part. seeds, seed: reconstructions of each map, and the seed of their noise. keep_length:
    see edit. rounds: how many factors to try at most until the slope is the requested factor, each at the cost of a
    drawing (closed_loop); 1 tries only the requested one.
    """

    factor: float = FACTOR
    seeds: int = SEEDS
    seed: int = 0
    keep_length: bool = False
    rounds: int = 1


@dataclass(frozen=True)
class Visualization:
    """FeatInv-Viz of one group of concepts. change: the edit, of this group alone. original, changed: reconstructions
    [n, 3, h, w]. distance: the difference map [h, w] (Algorithm 1). slope: what came of it. commanded: the factor used.
    rounds: with how many factors it was drawn to find that one.
    """

    change: Edit
    original: Tensor
    changed: Tensor
    distance: Tensor
    slope: Slope
    commanded: float
    rounds: int = 1

    def describe(self) -> str:
        """One line: the requested factor, the applied factor and the measured slope."""
        rounds = f"{self.rounds} round{'s' * (self.rounds != 1)}"
        return (
            f"{self.change.titles()[0]}: requested {self.slope.asked:g}, applied {self.commanded:.2f},"
            f" measured {self.slope.own:.2f} ({self.slope.verdict}) in {rounds}; other concepts {self.slope.others:.2f}"
        )


def visualize(
    draw: Callable[[FeatureMap], tuple[Tensor, FeatureMap]],
    features: FeatureMap,
    concepts: Concepts,
    groups: Sequence[Sequence[str]],
    settings: VizSettings,
    check: Check = unchecked,
) -> list[Visualization]:
    """Algorithm 1 for each group of concepts in one feature map [1, C, H, W]; the original is drawn once.

    draw: maps [k * seeds, C, H, W], one after the other for each seed as Edit.paired orders them -> (their
    reconstructions [k * seeds, 3, h, w], the feature maps of these). Row i and row i + seeds must begin with the same
    noise. check: called for each concept while slopes are measured. Raises FeatInvError as `edit` does.
    """
    asked = edit(features, concepts, groups, settings.factor, settings.keep_length)
    pictures, reread = draw(asked.paired(settings.seeds))
    first, *others = pictures.split(settings.seeds)
    again, *changed_again = [
        reread.select(slice(i, i + settings.seeds)) for i in range(0, len(pictures), settings.seeds)
    ]

    def result(
        group: Sequence[str], commanded: float, changed: Tensor, features_of_changed: FeatureMap
    ) -> Visualization:
        change = edit(features, concepts, [group], commanded, settings.keep_length)
        slope = measure_slope(
            replace(change, factor=settings.factor), 0, (first, changed), (again, features_of_changed), check
        )
        return Visualization(change, first, changed, difference(first, changed), slope, commanded)

    def draw_at(group: Sequence[str], factor: float) -> Visualization:
        return result(
            group,
            factor,
            *draw(edit(features, concepts, [group], factor, settings.keep_length).changed.repeat(settings.seeds)),
        )

    results = [result(group, settings.factor, *pair) for group, *pair in zip(groups, others, changed_again)]
    loop = partial(_closed, asked=settings.factor, rounds=settings.rounds)
    return [loop(one, partial(draw_at, group)) for one, group in zip(results, groups)]


def _closed(one: Visualization, draw_at: Callable[[float], Visualization], asked: float, rounds: int) -> Visualization:
    """The same group with the factor that closed_loop commands."""
    tried = {asked: one}

    def slope_at(factor: float) -> float:
        if factor not in tried:
            tried[factor] = draw_at(factor)
        return tried[factor].slope.own

    return replace(tried[closed_loop(slope_at, asked, rounds)[0]], rounds=len(tried))


def as_commanded(found: Sequence[Visualization]) -> tuple[Edit, Tensor]:
    """The result of one `visualize` as one edit, with the commanded maps and the requested factor, and all
    pictures [(1 + groups) * seeds, 3, h, w] in the order of Edit.paired."""
    changes = [one.change for one in found]
    change = replace(
        changes[0],
        changed=concatenate([one.changed for one in changes]),
        groups=tuple(group for one in changes for group in one.groups),
        factor=found[0].slope.asked,
    )
    return change, torch.cat([found[0].original, *(one.changed for one in found)])
