"""The embedded default: where its files are. Made by training/make_tiny_world.py; see CARD.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.feature_map import FeatInvError

if TYPE_CHECKING:
    from ..core.backbones import Backbone

FOLDER = Path(__file__).parent
#: short name -> (timm-hub folder, name in a FeatureSource)
BACKBONES = {"tiny-cnn": ("backbone_cnn", "resnet10t.tiny_world"), "tiny-vit": ("backbone_vit", "vit_tiny_patch16_224.tiny_world")}
#: shipped inversion models, in the order of the card
MODELS = ("tiny_cnn_last", "tiny_cnn_stage", "tiny_cnn_pooled", "tiny_vit_last")

#: subspaces of the CNN's last layer: its backgrounds and its objects
CONCEPTS = "tiny_cnn_concepts.safetensors"


def open_backbone(name: str, weights: str | Path | None = None, input_size: int | None = None) -> Backbone:
    """An embedded backbone by its short name or source name, any other one by load_backbone."""
    from ..core.backbones import load_backbone  # timm takes seconds to import

    for short, (folder, full) in BACKBONES.items():
        if name in (short, full):
            return load_backbone(str(FOLDER / folder), input_size=input_size)
    return load_backbone(name, weights, input_size)


def model_file(name: str) -> Path:
    """The file of a shipped inversion model, or an existing weights file. Raises FeatInvError, listing the names."""
    if name in MODELS:
        return FOLDER / f"{name}.safetensors"
    if Path(name).is_file():
        return Path(name)
    raise FeatInvError(f"there is no model {name!r}: neither a file nor one of the shipped models {', '.join(MODELS)}")
