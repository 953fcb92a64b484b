"""Concept discovery with the host's progress bar and its memory management."""

from __future__ import annotations

import comfy.model_management as management
import comfy.utils
from torch import Tensor

from ..core.concepts import Concepts, discover
from ..core.concepts.collect import Collected, Folder, Pictures, collect
from ..core.concepts.statistics import Statistics, concept_statistics, top_weights
from ..core.feature_map import FeatureMap
from .models import ManagedBackbone, shown, stop_if_cancelled

STEPS = 1000  # of the bar: half for the features, half for the method


def find(
    backbone: ManagedBackbone,
    pictures: Pictures | Folder,
    layer: str,
    method: str,
    concepts: int,
    vectors: int,
    seed: int,
) -> tuple[Concepts, Statistics, Collected]:
    """Concepts of a managed backbone's features, their statistics, and the vectors that were read. concepts: 0
    for as many as completeness needs."""
    bar = comfy.utils.ProgressBar(STEPS)

    def extract(pixel_values: Tensor) -> FeatureMap:
        management.load_models_gpu(
            [backbone.patcher], memory_required=pixel_values.numel() * 4 * 64
        )  # as ManagedBackbone does
        return backbone.backbone.extract(pixel_values.to(backbone.patcher.load_device), layer)

    collected = collect(pictures, extract, vectors, seed, shown(bar, 0, STEPS // 2))
    weights = None if concepts else top_weights(backbone.backbone, collected.maps, stop_if_cancelled)
    result = discover(
        collected.vectors,
        collected.maps.source,
        method,
        concepts,
        seed,
        progress=shown(bar, STEPS // 2, STEPS),
        weights=weights,
    )
    worth = concept_statistics(backbone.backbone, result, collected.maps, stop_if_cancelled)
    return result, worth, collected
