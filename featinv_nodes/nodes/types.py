"""What flows along the pack's own wires.

FEATINV_BACKBONE: host.models.ManagedBackbone, a timm model that the host loads and unloads.
FEATINV_FEATURES: core.feature_map.FeatureMap, values float32 [B, C, H, W] (H = W = 1 if pooled) and their source.
FEATINV_CONTROL_NET: host.controlnet.FeatureControl, an inversion model.
FEATINV_CONCEPTS: core.concepts.Concepts, subspaces of one backbone and layer.
FEATINV_EDIT: core.viz.Edit, a feature map, what it becomes when concepts are scaled, and which.

The host's own IMAGE is [B, H, W, 3] in 0..1 and its MASK [B, H, W]; core wants channels first.
"""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..core.images import as_rgb

Backbone = io.Custom("FEATINV_BACKBONE")
Features = io.Custom("FEATINV_FEATURES")
Control = io.Custom("FEATINV_CONTROL_NET")
ConceptSet = io.Custom("FEATINV_CONCEPTS")
Change = io.Custom("FEATINV_EDIT")

EMBEDDED = " (embedded)"
CATEGORY = "FeatInv"


def channels_first(image: Tensor) -> Tensor:
    """IMAGE [B, H, W, 1 to 4] -> [B, 3, H, W], transparency on white. Raises FeatInvError for other shapes."""
    return as_rgb(image.movedim(-1, 1))


def channels_last(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> IMAGE [B, H, W, 3]."""
    return pictures.movedim(1, -1).float().cpu()
