"""Lists inversion models by the backbone and layer that they invert."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from ..core.errors import FeatInvError
from ..core.files import read_metadata
from ..worlds import MODELS
from . import folders


def listed() -> dict[str, dict[str, str]]:
    """Backbone -> layer as the loader lists it -> name of the inversion model, embedded ones first.

    A layer is listed as "blocks.4" or "last, pooled". Files in models/featinv have their name appended, so that a
    choice always means the same file. Unreadable and other files are left out.
    """
    result: dict[str, dict[str, str]] = {}
    for name in [*(name + folders.EMBEDDED for name in MODELS), *folders.names(folders.CONTROLS)]:
        try:
            file = folders.located(folders.CONTROLS, name, MODELS)
            inverted = _inverts(file, folders.stamp(file))
        except (FeatInvError, OSError):  # gone meanwhile, or a broken link
            continue
        if inverted:
            backbone, layer, pooled = inverted
            own = "" if name.endswith(folders.EMBEDDED) else f" ({name})"
            result.setdefault(backbone, {})[layer + (", pooled" if pooled else "") + own] = name
    return result


@lru_cache(maxsize=1024)
def _inverts(file: Path, stamp: str) -> tuple[str, str, bool] | None:
    """(backbone, layer, pooled) of a weights file; None for any other. Its header is read once for each stamp, and
    without the checks of read_info, whose library the host need not import at its start: opening the file has them."""
    try:
        source = json.loads(read_metadata(file)["featinv"])["source"]
        return str(source["backbone"]), str(source["layer"]), bool(source["pooled"])
    except (FeatInvError, KeyError, TypeError, ValueError):
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
