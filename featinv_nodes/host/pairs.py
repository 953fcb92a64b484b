"""Inversion models by what they invert: backbone, and layer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..core.feature_map import FeatInvError, FeatureSource
from ..core.weights import read_info
from ..worlds import MODELS, model_file
from . import folders


def listed() -> dict[str, dict[str, str]]:
    """Backbone -> layer as the loader lists it -> name of the inversion model, embedded ones first.

    A layer is listed as "blocks.4" or "last, pooled". Files in models/featinv carry their name behind it, so that a
    choice means the same file whatever else is there. Unreadable and foreign files are left out.
    """
    result: dict[str, dict[str, str]] = {}
    for name in [*(name + folders.EMBEDDED for name in MODELS), *folders.names(folders.CONTROLS)]:
        file = folders.located(folders.CONTROLS, name, model_file)
        source = _source(file, folders.stamp(file))
        if source is not None:
            layer = source.layer + (", pooled" if source.pooled else "")
            own = "" if name.endswith(folders.EMBEDDED) else f" ({name})"
            result.setdefault(source.backbone, {})[layer + own] = name
    return result


@lru_cache(maxsize=1024)
def _source(file: Path, stamp: str) -> FeatureSource | None:
    """What a weights file inverts; its header is read once for each stamp."""
    try:
        return read_info(file).source
    except FeatInvError:
        return None


def find(backbone: str, layer: str) -> str:
    """The name of an inversion model. Raises FeatInvError, listing the layers that there are."""
    layers = listed().get(backbone, {})
    if layer not in layers:
        there = ", ".join(layers) or "none"
        raise FeatInvError(
            f"there is no inversion model of {backbone}, layer {layer}; choose one of its layers ({there}), or put a"
            " weights file into models/featinv and press R to refresh the list"
        )
    return layers[layer]
