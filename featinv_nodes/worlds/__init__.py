"""Embedded worlds: complete set-ups (images, backbones, base model, inversion models) that run without a download.

`drawn` knows scenes that the code draws, with true masks; `photo` knows photographs, through a real ImageNet network.
Made by training/make_world.py; each world's CARD.md says from what.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import FeatInvError, UnknownBackbone
from .drawn import DRAWN
from .photo import PHOTO
from .world import World

if TYPE_CHECKING:
    from ..core.backbones import Backbone

WORLDS = {world.name: world for world in (DRAWN, PHOTO)}
#: name -> world of all shipped inversion models, each world's in the order of its card
MODELS = {name: world for world in WORLDS.values() for name in world.models}
#: short name -> world of all embedded backbones
BACKBONES = {name: world for world in WORLDS.values() for name in world.backbones}
#: file name without suffix -> world of the shipped concept files
CONCEPTS = {name: world for world in WORLDS.values() for name in world.concepts}
#: folder name -> world of the embedded feature decoders that are there
DECODERS = {
    name: world
    for world in WORLDS.values()
    for name in world.decoders
    if (world.folder / name / "config.json").is_file()
}


def find_world(base: str) -> World | None:
    """The world whose base model has this name in weights files; None for any other base model."""
    return next((world for world in WORLDS.values() if world.base == base), None)


def open_backbone(
    name: str, weights: str | Path | None = None, input_size: int | None = None, run_code: bool = False
) -> Backbone:
    """An embedded backbone by its short name or the name in a FeatureSource, any other one by load_backbone. run_code:
    whether name may be a module:FILE.py:NAME, which runs FILE.py."""
    embedded = next(
        (one for world in WORLDS.values() for short, one in world.backbones.items() if name in (short, one.name)), None
    )
    if embedded and weights is None:
        return embedded.open(input_size)
    from ..core.backbone_opening import load_backbone  # timm takes seconds to import

    try:
        return load_backbone(name, weights, input_size, run_code)
    except UnknownBackbone as error:
        if embedded:
            raise FeatInvError(
                f"{name} is embedded with its own weights: leave out {weights}, or give a fine-tune as a timm-hub"
                " folder (training/convert.py --to timm makes one)"
            ) from error
        raise FeatInvError(f"{error}. Embedded backbones: {', '.join(BACKBONES)}") from error


def model_file(name: str) -> Path:
    """The file of a shipped inversion model, or an existing weights file. Raises FeatInvError, listing the names."""
    if name in MODELS:
        return MODELS[name].file(name)
    if Path(name).is_file():
        return Path(name)
    raise FeatInvError(f"there is no model {name!r}: neither a file nor one of the shipped models {', '.join(MODELS)}")


def concepts_file(name: str) -> Path:
    """The file of shipped concepts, or an existing concept file. Raises FeatInvError, listing the names."""
    if name in CONCEPTS:
        return CONCEPTS[name].file(name)
    if Path(name).is_file():
        return Path(name)
    raise FeatInvError(
        f"there are no concepts {name!r}: neither a file nor one of the shipped concept files {', '.join(CONCEPTS)}"
    )


def decoder_folder(name: str) -> Path:
    """The folder of an embedded feature decoder, or an existing folder. Raises FeatInvError, listing the names."""
    if name in DECODERS:
        return DECODERS[name].folder / name
    if Path(name).is_dir():
        return Path(name)
    raise FeatInvError(
        f"there is no feature decoder {name!r}: neither a folder nor one of the embedded decoders"
        f" {', '.join(DECODERS) or '(none here)'}; python3 run.py download rae-dinov2-base fetches one"
    )


def drawing_world(data: str) -> World | None:
    """The world that draws its own pictures, where `data` is its name; None for every other source of pictures."""
    world = WORLDS.get(data)
    return world if world and world.draw else None
