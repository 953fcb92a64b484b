"""The types of the pack's own wires, and what all nodes' schemas share.

FEATINV_BACKBONE: host.models.ManagedBackbone, a timm model that the host loads and unloads.
FEATINV_FEATURES: core.feature_map.FeatureMap, values float32 [B, C, H, W] (H = W = 1 if pooled) and their source.
FEATINV_CONTROL_NET: host.controlnet.FeatureControl, an inversion model.
FEATINV_FEATURE_DECODER: host.decoders.ManagedDecoder, a decoder of feature maps to images.
FEATINV_CONCEPTS: core.concepts.Concepts, subspaces of one backbone and layer.
FEATINV_EDIT: core.viz.Edit, a feature map, what it becomes when concepts are scaled, and which.
FEATINV_LINEAR_MAP: core.linear_maps.LinearMap, a change of every feature vector of one backbone and layer.

The host's own IMAGE is [B, H, W, 3] in 0..1 and its MASK [B, H, W]; core wants channels first.
"""

from __future__ import annotations

from dataclasses import fields

from comfy_api.latest import io
from torch import Tensor

from ..core.images import as_rgb

Backbone = io.Custom("FEATINV_BACKBONE")
Features = io.Custom("FEATINV_FEATURES")
Control = io.Custom("FEATINV_CONTROL_NET")
Decoder = io.Custom("FEATINV_FEATURE_DECODER")
ConceptSet = io.Custom("FEATINV_CONCEPTS")
Change = io.Custom("FEATINV_EDIT")
Linear = io.Custom("FEATINV_LINEAR_MAP")

#: the scope of a changed map without an inversion model
WITHOUT_MODEL = "connect the inversion model to see whether the map is still in scope"
#: what people type who know the idea, not the node's name
ALIASES = (
    "FeatInv",
    "feature inversion",
    "what the model sees",
    "what does the network see",
    "interpret",
    "explain",
    "timm",
    "vision model",
)
YOUNGER = {field.name for field in fields(io.Schema)}  # the oldest hosts lack some


class Menu:
    """Where nodes stand in the host's node menu."""

    LOAD, FEATURES, CONTROL = "FeatInv/load", "FeatInv/features", "FeatInv/control"
    CONCEPTS, LOOK = "FeatInv/concepts", "FeatInv/look"


def schema(*, aliases: tuple[str, ...] = (), says: bool = False, **about) -> io.Schema:
    """A node's schema. aliases: more words that the host's search finds it by. says: it shows a text on itself, which
    newer hosts send again to a page that was loaded anew."""
    younger = {"search_aliases": [*ALIASES, *aliases], "has_intermediate_output": says}
    return io.Schema(**about, **{name: value for name, value in younger.items() if name in YOUNGER})


def channels_first(image: Tensor) -> Tensor:
    """IMAGE [B, H, W, 1 to 4] -> [B, 3, H, W], transparency on white. Raises FeatInvError for other shapes."""
    return as_rgb(image.movedim(-1, 1))


def channels_last(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> IMAGE [B, H, W, 3]."""
    return pictures.movedim(1, -1).float().cpu()
