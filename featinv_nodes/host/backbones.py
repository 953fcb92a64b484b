"""Opens the backbones that widgets name, lists their layers, and finds them by the name in a weights file."""

from __future__ import annotations

import json
from functools import lru_cache
from math import prod
from pathlib import Path

import torch

from ..core.backbone_opening import load_backbone, smaller_backbone, untrained_backbone
from ..core.backbone_weights import HUB_FILES
from ..core.backbones import Backbone
from ..core.errors import FeatInvError, UnknownBackbone
from ..core.feature_map import FeatureSource
from ..core.model_folder import stored_shapes
from ..worlds import BACKBONES, open_backbone
from . import folders
from .models import in_gb, require_memory


def open_file(weights: str, timm_name: str = "", input_size: int = 0) -> Backbone:
    """The backbone of Load Backbone's widgets. Raises FeatInvError as _open_path and open_backbone do."""
    if (short := folders.embedded(weights, BACKBONES)) is not None:
        return open_backbone(short, input_size=input_size or None)
    return _open_path(folders.path(folders.BACKBONES, weights), timm_name.strip(), input_size or None)


def _open_path(file: Path, timm_name: str, input_size: int | None) -> Backbone:
    """The backbone in a file of models/backbones. timm_name: "" for the file's own name, or its folder's. Raises
    FeatInvError as load_backbone does, and for a name that is not timm's where to write one."""
    _require_room(file, timm_name)
    hub = file.name in HUB_FILES
    described = hub and not timm_name and (file.parent / "config.json").is_file()
    try:
        if described:
            return load_backbone(str(file.parent), input_size=input_size)
        return load_backbone(timm_name or file.stem, file, input_size)
    except UnknownBackbone as error:
        bare = hub and not described
        missing = f"{file.parent} has no config.json, which would say what model it is. " if bare else ""
        raise FeatInvError(
            f"Load Backbone: {missing}{error}. Write the model's timm name, architecture.tag, into timm_name, or choose"
            f" an embedded model: {', '.join(BACKBONES)}"
        ) from error


def _require_room(file: Path, timm_name: str) -> None:
    """Raises FeatInvError, before it is read, for a backbone's weights that are larger than the memory: how much they
    need, and what smaller one there is."""
    if not file.is_file():
        return  # said where it is opened
    name = timm_name or (file.parent.name if file.name in HUB_FILES else file.stem)
    size = 4 * sum(map(prod, stored_shapes(file).values())) if file.suffix == ".safetensors" else file.stat().st_size
    require_memory(f"the backbone {name}", size, lambda: _smaller(name))


def _smaller(name: str) -> str:
    smaller = smaller_backbone(name)
    if smaller is None:
        return f"Choose a smaller backbone, or an embedded one: {', '.join(BACKBONES)}"
    return f"A smaller one of its family is {smaller[0]}, which needs {in_gb(smaller[1])}"


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
