"""The embedded world's concepts: one subspace per background and one for objects, fitted to the true masks."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts import Concepts
from featinv_nodes.tiny_world.scenes import BACKGROUNDS, draw

SCENES, COVER, DIMENSIONS = 4000, 0.9, 6


@torch.inference_mode()
def fit_concepts(backbone: Backbone, seed: int = 0) -> Concepts:
    """Principal directions, uncentred, of the feature vectors of training scenes in cells that one background, or an
    object, covers by nine tenths."""
    source = backbone.source()
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in (*BACKGROUNDS, "object")}
    for start in range(0, SCENES, 500):
        scenes = draw(seed, torch.arange(start, start + 500))
        values = backbone(backbone.frame(scenes.image)).values.movedim(1, -1)  # [B, H, W, C]
        cover = F.interpolate(scenes.masks.sum(1, keepdim=True), source.grid, mode="area")[:, 0]
        vectors["object"].append(values[cover >= COVER])
        for number, name in enumerate(BACKGROUNDS):
            vectors[name].append(values[(cover <= 1 - COVER) & (scenes.background == number)[:, None, None]])
    bases = [torch.linalg.svd(torch.cat(v), full_matrices=False)[2][:DIMENSIONS].contiguous() for v in vectors.values()]
    settings = {"scenes": SCENES, "cover": COVER, "dimensions": DIMENSIONS, "seed": seed}
    return Concepts(bases, list(vectors), source, None, "principal directions in the true masks", settings)
