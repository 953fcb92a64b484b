"""Opens the backbones that widgets name, lists their layers, and finds them by the name in a weights file."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

from ..core.backbone_opening import untrained_backbone
from ..core.backbone_weights import HUB_FILES
from ..core.backbones import Backbone
from ..core.feature_map import FeatInvError, FeatureSource
from ..worlds import BACKBONES, open_backbone
from . import folders, models


def open_file(weights: str, timm_name: str = "", input_size: int = 0) -> Backbone:
    """The backbone of Load Backbone's widgets. Raises FeatInvError as models.open_file and open_backbone do."""
    if (short := folders.embedded(weights, BACKBONES)) is not None:
        return open_backbone(short, input_size=input_size or None)
    return models.open_file(folders.path(folders.BACKBONES, weights), timm_name.strip(), input_size or None)


def open_for(source: FeatureSource) -> Backbone:
    """The backbone that made features, embedded or from models/backbones, at their input size.

    Raises FeatInvError if it is missing, or if it preprocesses pictures differently.
    """
    weights, side = find_weights(source.backbone), source.input_size[0]
    backbone = open_file(weights)
    if backbone.input_size != source.input_size:
        backbone = open_file(weights, input_size=side)
    backbone.source(source.layer, source.pooled).require(source, f"the backbone in {weights}", "the inversion model")
    return backbone


def find_weights(name: str) -> str:
    """The widget's value for a backbone's full name: an embedded one, NAME.safetensors, NAME/model.safetensors, or a
    timm-hub folder whose configuration has the name. Raises FeatInvError if there is none."""
    for world in BACKBONES.values():
        for short, backbone in world.backbones.items():
            if backbone.name == name:
                return short + folders.EMBEDDED
    listed = folders.names(folders.BACKBONES)
    for weights in listed:
        file = Path(weights)
        if name in (file.stem, file.parent.name if file.name in HUB_FILES else None):
            return weights
    for weights in listed:
        if Path(weights).name in HUB_FILES and _hub_name(folders.path(folders.BACKBONES, weights)) == name:
            return weights
    raise FeatInvError(
        f"the backbone {name} is not in {', '.join(folders.places(folders.BACKBONES))}. Put its weights there as"
        f" {name}.safetensors (from {folders.HUB}/timm/{name}, model.safetensors) and run again"
    )


def _hub_name(file: Path) -> str | None:
    """The full timm name in the configuration beside a weights file; None where there is none."""
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        return f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def layers(weights: str, timm_name: str = "") -> list[str]:
    """The layers of the backbone of Load Backbone's widgets, without its weights. Raises FeatInvError as open_file
    does."""
    if weights.endswith(folders.EMBEDDED):
        return _layers(weights, "")
    file, name = folders.path(folders.BACKBONES, weights), timm_name.strip()
    config = file.parent / "config.json"
    if not name and file.name in HUB_FILES and config.is_file():
        name = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    return _layers(None, name or file.stem)


@lru_cache(maxsize=32)
def _layers(embedded: str | None, name: str) -> list[str]:
    if embedded:
        return open_file(embedded).layers
    with torch.device("meta"):  # no memory, no random numbers
        return untrained_backbone(name).layers
