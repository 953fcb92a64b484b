"""The drawn world's concepts: one direction per background and a subspace for objects, fitted to the true masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts import Concepts
from featinv_nodes.worlds.drawn.scenes import BACKGROUNDS, draw

OBJECT = "object"
SCENES, COVER, FAR, LEAST = 4000, 0.9, 0.02, 4
#: of the objects' subspace: 12 hold what tells one object from another; 24 take backgrounds along
DIMENSIONS = 12
SEED = 0  # of the scenes


@torch.inference_mode()
def fit_concepts(backbone: Backbone, layer: str = "last") -> Concepts:
    """Subspaces of training scenes' feature vectors, not centred.

    A background's direction is the mean of the cells that it covers by nine tenths. The objects' subspace holds the
    principal directions of how cells that an object covers by nine tenths differ from the mean of their own scene's
    cells away from objects: what an object adds, whatever it stands on.
    """
    source = backbone.source(layer)
    contrasts, grounds = [], [[] for _ in BACKGROUNDS]
    for start in range(0, SCENES, 500):
        scenes = draw(SEED, torch.arange(start, start + 500))
        values = backbone(backbone.preprocess(scenes.image), layer).values.movedim(1, -1)  # [B, H, W, C]
        cover = F.interpolate(scenes.masks.sum(1, keepdim=True), source.grid, mode="area")[:, 0]
        for number, cells in enumerate(grounds):
            cells.append(values[(cover <= 1 - COVER) & (scenes.background == number)[:, None, None]])
        contrasts.append(_contrasts(values, cover))
    bases = [F.normalize(torch.cat(cells).mean(0, keepdim=True)) for cells in grounds]
    bases.append(_principal(torch.cat(contrasts), DIMENSIONS))
    settings = {"scenes": SCENES, "cover": COVER, "dimensions": DIMENSIONS, "seed": SEED}
    return Concepts(bases, [*BACKGROUNDS, OBJECT], source, None, "directions fitted to the true masks", settings)


def _contrasts(values: Tensor, cover: Tensor) -> Tensor:
    """[N, C] object cells of [B, H, W, C] less their scene's mean over the cells with no object in them or beside
    them."""
    far = F.max_pool2d(cover[:, None], 3, 1, 1)[:, 0] <= FAR
    known = far.sum((1, 2)) >= LEAST
    ground = (values * far[..., None]).sum((1, 2)) / far.sum((1, 2)).clamp(min=1)[:, None]
    return (values - ground[:, None, None])[(cover >= COVER) & known[:, None, None]]


def _principal(vectors: Tensor, count: int) -> Tensor:
    """[count, C] directions of the largest second moment."""
    return torch.linalg.svd(vectors, full_matrices=False)[2][:count].contiguous()
