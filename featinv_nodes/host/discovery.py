"""Concept discovery with the host's progress bar and its memory management."""

from __future__ import annotations

from functools import partial

import comfy.utils

from ..core.concepts import Concepts, discover
from ..core.concepts.collect import Collected, Folder, Pictures, collect
from ..core.concepts.statistics import Statistics, concept_statistics, top_weights
from .models import ManagedBackbone, shown, stop_if_cancelled

STEPS = 1000  # of the bar: half for the features, half for the method


def discover_concepts(
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
    extract = partial(backbone.extract, layer=layer, progress=stop_if_cancelled)  # the bar is the collecting's
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
