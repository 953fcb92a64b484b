"""Statistics of concepts on a few feature maps: share of the norm, relevance, and the classes they support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..backbones import Backbone
from ..errors import FeatInvError
from ..feature_map import FeatureMap
from ..waiting import Check, attended, unchecked
from .decomposition import Concepts, completeness
from .relevance import class_weights, relevance


@dataclass(frozen=True)
class Statistics:
    """Per concept and, last, the rest. share: of the feature norm; shares of oblique parts sum to more than one.
    relevance: the share of the top classes' logits, less the head's bias, that it contributes. classes: for each class
    that pictures are taken for, by name, what it adds to that logit, the mean over these pictures. completeness: eta,
    the mean over the top classes. Empty, with a remark, where the head does not read this layer or is not affine."""

    share: list[float]
    relevance: list[float] = field(default_factory=list)
    completeness: float | None = None
    classes: dict[str, list[float]] = field(default_factory=dict)
    remark: str = ""

    def speaks_for(self, number: int, most: int = 3) -> list[tuple[str, float]]:
        """The classes to whose logit a concept adds most, above 0.05: (name, how much)."""
        ranked = sorted(((name, added[number]) for name, added in self.classes.items()), key=lambda pair: -pair[1])
        return [(name, added) for name, added in ranked[:most] if added > 0.05]

    def classes_of(self, number: int) -> str:
        """The same as a text."""
        return ", ".join(f"{name} +{added:.1f}" for name, added in self.speaks_for(number))


def top_classes(backbone: Backbone, maps: FeatureMap) -> Tensor:
    """[B, groups] the most probable class of every label group, by number. Raises as Backbone.logits does, and
    FeatInvError for a backbone without classes."""
    backbone.require_classes()
    with torch.inference_mode():
        logits = backbone.logits(maps)
    return torch.stack([logits[:, part].argmax(1) + (part.start or 0) for part in backbone.groups.values()], 1).cpu()


def top_weights(backbone: Backbone, maps: FeatureMap, check: Check = unchecked) -> Tensor:
    """[C, B groups] the weights of every picture's top classes, for `discover` to be complete for. check: as in
    class_weights.

    Raises FeatInvError where the head does not read this layer or is not affine.
    """
    try:
        return class_weights(backbone, maps, check=check)[:, top_classes(backbone, maps).flatten()].cpu()
    except FeatInvError as error:
        raise FeatInvError(f"how complete concepts are is not known here, so give a number of them: {error}") from error


def concept_statistics(
    backbone: Backbone, concepts: Concepts, maps: FeatureMap, check: Check = unchecked
) -> Statistics:
    """Statistics of concepts on feature maps of their source. check: called ten times a second and oftener."""
    lengths = attended(lambda: concepts.lengths(maps), check)
    share = (lengths.sum((1, 2, 3)) / maps.values.norm(dim=1).sum()).tolist()
    try:
        tops = top_classes(backbone, maps)
        contributions = relevance(backbone, concepts, maps, tops, check)[0].cpu()  # [n + 1, B, groups]
        weights = class_weights(backbone, maps, check=check)
        eta = attended(lambda: completeness(concepts.bases, weights), check).cpu()[tops].mean().item()
    except FeatInvError as error:
        return Statistics(share, remark=f"no relevance: {error}")
    relevant = contributions.sum((1, 2)) / contributions.sum()
    return Statistics(share, relevant.tolist(), eta, _by_class(backbone, maps, tops, contributions))


def _by_class(backbone: Backbone, maps: FeatureMap, tops: Tensor, contributions: Tensor) -> dict[str, list[float]]:
    with torch.inference_mode():
        named = backbone.top_classes(backbone.logits(maps), 1)  # for each picture (name, probability) of every group
    names = {number: name for row, numbers in zip(named, tops.tolist()) for (name, _), number in zip(row, numbers)}
    return {names[number]: contributions[:, tops == number].mean(1).tolist() for number in sorted(names)}


def with_statistics(concepts: Concepts, stats: Statistics, **about: object) -> Concepts:
    """The concepts with these numbers, and what else there is to say about their making, in the settings."""
    numbers = {
        "share": stats.share,
        "relevance": stats.relevance,
        "completeness": stats.completeness,
        "added_to_logits": stats.classes,
    }
    return replace(concepts, settings={**concepts.settings, **about, **numbers})


def table(concepts: Concepts, stats: Statistics) -> str:
    """Lines of: number, label, dimension, share of the norm, relevance, and the classes it adds most to."""
    lines = [f"{'':4} {'concept':20} {'dimension':>9} {'norm':>7} {'relevance':>9}  adds most to the logits of"]
    for i, name, d, share, relevant, classes in _rows(concepts, stats):
        lines.append(f"{i:4} {name[:20]:20} {d:9} {share:>7} {relevant or '-':>9}  {classes}".rstrip())
    return "\n".join(lines)


def listing(concepts: Concepts, stats: Statistics) -> str:
    """What table says, a phrase per concept, for where lines are short."""
    lines = []
    for i, name, d, share, relevant, classes in _rows(concepts, stats):
        further = (f", relevance {relevant}" if relevant else "") + (f", adds most to {classes}" if classes else "")
        lines.append(f"{i} {name}: dimension {d}, {share} of the norm{further}")
    return "\n".join(lines)


def _rows(concepts: Concepts, stats: Statistics) -> Iterator[tuple[int, str, int, str, str, str]]:
    """What table says of each concept and the rest; relevance and classes are "" where they are not known."""
    for i, (name, d, share) in enumerate(zip(concepts.names, dimensions(concepts), stats.share)):
        relevant = f"{stats.relevance[i]:.1%}" if stats.relevance else ""
        yield i, name, d, f"{share:.1%}", relevant, stats.classes_of(i)


def dimensions(concepts: Concepts) -> list[int]:
    """Dimensions of each concept and, last, of the rest: of a linear decomposition the missing ones, of a sparse
    code all channels."""
    sizes = [len(b) for b in concepts.bases]
    channels = concepts.source.channels
    return [*sizes, channels if concepts.encoder is not None else channels - sum(sizes)]


def remarks(concepts: Concepts, stats: Statistics) -> list[str]:
    """What else there is to say: clusters that gave none, how the number grew, completeness or why it is not known."""
    grown = _listed(concepts, "grown")
    lines = [str(line) for line in _listed(concepts, "rejected")]
    if grown:
        lines.append(
            "completeness by number of clusters: " + ", ".join(f"{clusters}: {eta:.2f}" for clusters, eta in grown)
        )
    return [*lines, stats.remark or f"completeness for the top classes: {stats.completeness:.2f}"]


def _listed(concepts: Concepts, name: str) -> list:
    """A list among the settings, which come from a file too; empty where there is none."""
    found = concepts.settings.get(name)
    return found if isinstance(found, list) else []
