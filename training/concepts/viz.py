"""FeatInv-Viz on an inversion model: inverts the original and the edited maps with equal seeds and measures the
effect."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from featinv_nodes.core import viz
from featinv_nodes.core.concepts import Concepts
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.viz import Visualization, VizSettings

from ..models.pipeline import InversionPipeline
from ..models.sampling import noise


def visualize(
    pipeline: InversionPipeline,
    features: FeatureMap,
    concepts: Concepts,
    groups: list[list[str]],
    settings: VizSettings,
    sampling: Sampling,
    batch: int = 16,
    report: Callable[[int], object] = lambda n: None,
) -> list[Visualization]:
    """core.viz.visualize with an inversion model. batch: pictures drawn at once. report: called with each batch's size.
    Raises FeatInvError as core.viz.edit does."""
    start = noise(pipeline.base, settings.seed, settings.seeds)

    def draw(maps: FeatureMap) -> tuple[Tensor, FeatureMap]:
        pictures = pipeline.draw(maps, sampling, start.repeat(len(maps) // settings.seeds, 1, 1, 1), batch, report)
        return pictures, pipeline.extract(pictures).to("cpu")

    return viz.visualize(draw, features.to("cpu"), concepts, groups, settings)
