"""Opens backbones by name, from local files only."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .backbone_weights import HUB_FILES, fill
from .backbones import MODULE, Backbone
from .errors import FeatInvError, UnknownBackbone
from .files import HUB
from .requirements import old_timm

SIGLIP = "_siglip"
#: of a family's models, as timm's names have them
SIZES = (
    "gigantic",
    "giant",
    "huge",
    "xxlarge",
    "xlarge",
    "large",
    "base",
    "small",
    "tiny",
    "nano",
    "pico",
    "femto",
    "atto",
)


@cache
def require_timm() -> None:
    """Raises FeatInvError for a version of timm that is too old."""
    if fault := old_timm(timm.__version__):
        raise FeatInvError(fault)


def load_backbone(
    name: str, weights: str | Path | None = None, input_size: int | None = None, run_code: bool = False
) -> Backbone:
    """A backbone from local files only; nothing is downloaded.

    name: timm architecture[.tag], with weights a file of its state dict (.safetensors, or a PyTorch checkpoint, opened
    without running code from it); or a timm-hub folder (config.json, and model.safetensors or pytorch_model.bin), whose
    configuration then decides. input_size: side in pixels, where not the model's own. Or module:FILE.py:NAME, a model
    of any kind by an adapter (see module_backbones), which runs FILE.py: only where run_code is true, for names that
    the user gave and no file did. Raises UnknownBackbone for an unknown name (with the nearest known ones),
    FeatInvError for a missing or unreadable file, keys that do not fit, a side that the model cannot read, and a timm
    that is too old.
    """
    if name.startswith(MODULE):
        from .module_backbones import load_module_backbone

        return load_module_backbone(name, weights, input_size, run_code)
    folder = Path(name)
    if weights is None and (folder / "config.json").is_file():
        return _from_folder(folder, input_size)
    backbone = untrained_backbone(name, input_size)
    if weights is None:
        raise FeatInvError(
            f"backbone {name} needs its weights from a local file (--backbone-weights FILE) or a timm-hub folder"
            f" (--backbone FOLDER): python3 run.py download CONFIG fetches one, or {HUB}/timm/{name}"
        )
    backbone.weights = fill(backbone.model, name, Path(weights))
    return backbone


def untrained_backbone(name: str, input_size: int | None = None, num_classes: int | None = None) -> Backbone:
    """A backbone at random weights, which says what its maps are. name, input_size: as in load_backbone. num_classes:
    where not the model's own."""
    require_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        # a hub address has the account before the name; some write hyphens, timm writes underscores
        asked, models = name.rpartition("/")[2].replace("-", "_"), timm.list_models()
        stem = asked.partition(".")[0]
        near = [asked] if timm.is_model(stem) else get_close_matches(stem, models, 4, 0.5)
        raise UnknownBackbone(
            f"timm does not know the architecture {architecture!r}; similar names: {', '.join(near) or 'none near'}"
        )
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        near = get_close_matches(name, tagged, 4, 0)
        raise UnknownBackbone(
            f"timm knows no {name!r}; similar names: {', '.join(near) or 'none'}; without a tag: {architecture}"
        )
    known = timm.get_pretrained_cfg(name)
    return _build(name, name, known.to_dict() if known else {}, input_size, num_classes)


def smaller_backbone(name: str) -> tuple[str, int] | None:
    """The next smaller model of a timm model's family: (its name, bytes of its weights in float32); None where timm's
    names tell of none."""
    architecture, _, tag = name.partition(".")
    words = architecture.split("_")
    own = next((word for word in words if word in SIZES), None)
    if own is None:
        return None
    for size in SIZES[SIZES.index(own) + 1 :]:
        other = "_".join(size if word == own else word for word in words)
        if timm.is_model(other):
            tagged = (
                f"{other}.{tag}" if f"{other}.{tag}" in timm.list_models(f"{other}.*", include_tags=True) else other
            )
            with torch.device("meta"):  # no memory, no random numbers
                return tagged, 4 * sum(value.numel() for value in timm.create_model(tagged).state_dict().values())
    return None


def _from_folder(folder: Path, input_size: int | None) -> Backbone:
    from .metadata import HubFolder, ModelType, parse  # pydantic takes tenths of a second

    require_timm()
    file = folder / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FeatInvError(f"{file} is not a timm-hub configuration: {error}") from error
    if kind := parse(ModelType, text, file, "timm-hub configuration").model_type:
        raise UnknownBackbone(
            f"{file} is a configuration of transformers ({kind}), which does not say the model's timm name, such as"
            " vit_base_patch14_reg4_dinov2.lvd142m. Give that name, and the folder's model.safetensors as its weights"
        )
    config = parse(HubFolder, text, file, "timm-hub configuration")
    if not timm.is_model(config.architecture):
        raise UnknownBackbone(f"{file}: timm does not know the architecture {config.architecture!r}")
    known, tag = config.pretrained_cfg, config.pretrained_cfg.get("tag")
    name = f"{config.architecture}.{tag}" if tag else config.architecture
    backbone = _build(f"local-dir:{folder}", name, known, input_size)
    backbone.classes = config.classes(backbone.num_classes, file)
    weights = next((folder / name for name in HUB_FILES if (folder / name).is_file()), folder / HUB_FILES[0])
    backbone.weights = fill(backbone.model, config.architecture, weights)
    return backbone


def _build(what: str, name: str, known: dict, side: int | None, num_classes: int | None = None) -> Backbone:
    """timm's model `what` at random weights. known: its pretrained_cfg. side, num_classes: where not its
    own."""
    overlay: dict[str, Any] = {"input_size": (3, side, side)} if side else {}
    if side and tuple(known.get("test_input_size") or ()) == overlay["input_size"]:
        overlay["crop_pct"] = known.get("test_crop_pct") or known.get("crop_pct", 1.0)  # timm evaluates at that size so
    arguments: dict[str, Any] = {"num_classes": num_classes} if num_classes else {}
    try:
        model = timm.create_model(what, pretrained=False, pretrained_cfg_overlay=overlay or None, **arguments)
        backbone = Backbone(as_published(model, name), name)
        if side:  # whether it runs at that size, whatever its head reads
            backbone.forward_blank()
    except FeatInvError:
        raise
    except Exception as error:  # timm checks little of what it is given, and raises whatever it stumbles over
        reason = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__}, without a reason"
        raise FeatInvError(f"timm cannot run {name}{f' at {side} pixels' if side else ''}: {reason}") from error
    if side and backbone.input_size != (side, side):
        raise FeatInvError(
            f"{name} reads {backbone.input_size[0]} x {backbone.input_size[1]} pixels and cannot be set to {side};"
            " leave the input size out"
        )
    return backbone


def as_published(model: nn.Module, name: str) -> nn.Module:
    """timm's model as the network was published: SigLIP's computes GELU by its tanh approximation in every size, as its
    own code and transformers do; timm computes some sizes with the exact one. Changes the model, and returns it."""
    if SIGLIP in name:
        for module in model.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
    return model
