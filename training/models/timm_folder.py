"""Backbone weights of any common kind, such as one's own fine-tune, as a timm-hub folder with its classes' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from timm.models import save_for_hf
from torch import Tensor

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.backbone_weights import HUB_FILES, prefix_in, read_backbone_weights
from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.checkpoints import Checkpoint
from featinv_nodes.core.errors import FeatInvError, some_of
from featinv_nodes.core.files import misfits, require_finite, require_name, written_whole

#: entries in which trainers keep the classes' names
NAMES = ("class_names", "classes", "label_names", "class_to_idx")


def write_timm_folder(
    folder: Path, file: Path, name: str | None, classes: Path | None, tag: str | None, side: int | None
) -> str:
    """Writes a timm-hub folder whole or not at all, and returns a text on what was used of the file and what was
    left out.

    name: the timm model that the weights were trained from; None for the one in timm's own training checkpoints.
    classes: file with the classes' names. tag: that of the new backbone's name; None for the folder's. side: pixels,
    where not the model's own. Raises FeatInvError for a folder that exists, weights that do not fit or hold NaN, and
    another number of names than classes.
    """
    require_name(folder)
    if folder.exists():
        raise FeatInvError(f"{folder} exists already; choose another folder or remove it")
    checkpoint = read_backbone_weights(file)
    name = name or checkpoint.other.get("arch")
    if not isinstance(name, str):
        raise FeatInvError(f"{file} does not say which timm model it was trained from; give --backbone")
    backbone, state = _filled(name, checkpoint, file, side)
    model, tag = backbone.model, tag or folder.name
    labels = _labels(checkpoint, classes)
    if labels and len(labels) != model.num_classes:
        raise FeatInvError(
            f"{classes or file} names {len(labels)} classes, but the classifier has {model.num_classes}; give as many"
            " names, in the order of the logits"
        )
    with written_whole(folder) as part:
        model.pretrained_cfg = {**model.pretrained_cfg, "tag": tag}
        save_for_hf(model, str(part), {"label_names": labels} if labels else {}, safe_serialization=True)
        shutil.copymode(part / "config.json", part / HUB_FILES[0])  # safetensors lets only its owner read a file
    named = some_of(labels, 3) if labels else "without names"
    said = [f"{name.partition('.')[0]}.{tag}, {model.num_classes} classes ({named}), {len(state)} tensors"]
    prefix = prefix_in(checkpoint, state)
    said += [f"taken from the entry {checkpoint.entry!r}"] if checkpoint.entry else []
    said += [f"took the prefix {prefix!r} off the names"] if prefix else []
    left = [*checkpoint.left, *(k for k in checkpoint if k.removeprefix(prefix) not in state)]
    said += [f"left out {some_of(left, 6)}"] if left else []
    said += [f"did not make objects of {some_of(checkpoint.replaced, 4)}"] if checkpoint.replaced else []
    return "; ".join(said)


def _filled(name: str, checkpoint: Checkpoint, file: Path, side: int | None) -> tuple[Backbone, dict[str, Tensor]]:
    """The backbone with as many classes as the weights have, and its tensors."""
    backbone = untrained_backbone(name, side)
    classifier = backbone.model.pretrained_cfg.get("classifier") or ()
    first = f"{classifier if isinstance(classifier, str) else next(iter(classifier), '')}.weight"
    prefix = prefix_in(checkpoint, backbone.model.state_dict())
    weight = checkpoint.get(prefix + first)
    if weight is not None and len(weight) != backbone.model.num_classes:
        backbone = untrained_backbone(name, side, num_classes=len(weight))
    expected = backbone.model.state_dict()
    state = {k: checkpoint[prefix + k] for k in expected if prefix + k in checkpoint}
    require_finite(state, file)
    try:
        backbone.model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FeatInvError(
            f"{file} does not fit {name}: {misfits(expected, state)}. Name the timm model that it was trained from with"
            " --backbone"
        ) from error
    return backbone, backbone.model.state_dict()


def _labels(checkpoint: Checkpoint, file: Path | None) -> list[str] | None:
    """The classes' names in the order of the logits: those of the file, else the checkpoint's, else none."""
    if file is None:
        found = next((checkpoint.other[name] for name in NAMES if name in checkpoint.other), None)
        if isinstance(found, Mapping) and all(isinstance(number, int) for number in found.values()):
            found = sorted(found, key=found.get)
        return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise FeatInvError(f"--classes {file} cannot be read: {error}") from error
    found = [name for name in found if name]
    if not found or not all(isinstance(name, str) for name in found):
        raise FeatInvError(f"--classes {file}: expected a name on each line, or a JSON list of names")
    return found
