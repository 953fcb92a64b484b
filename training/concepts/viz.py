"""FeatInv-Viz on an inversion model: draws the original and the edited maps with equal seeds and measures what came of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from featinv_nodes.core import viz
from featinv_nodes.core.concepts import Concepts
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.viz import Visualization, VizSettings

from ..models.inversion import Opened
from ..models.pipeline import noise


def visualize(
    opened: Opened, features: FeatureMap, concepts: Concepts, groups: list[list[str]], settings: VizSettings, how: Sampling,
    batch: int = 16, report: Callable[[int], object] = lambda n: None,
) -> list[Visualization]:  # fmt: skip
    """core.viz.visualize with an inversion model. batch: pictures drawn at once. report: called with each batch's size.
    Raises FeatInvError as core.viz.edit does."""
    start = noise(opened.base, settings.seed, settings.seeds)

    def draw(maps: FeatureMap) -> tuple[Tensor, FeatureMap]:
        pictures = opened.draw(maps, how, start.repeat(len(maps) // settings.seeds, 1, 1, 1), batch, report)
        return pictures, opened.extract(pictures).to("cpu")

    return viz.visualize(draw, features.to("cpu"), concepts, groups, settings)
