"""What the outputs of a classifier's head mean: whether they are classes, their groups and their names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import timm
from torch import Tensor

#: outputs of classifiers of ImageNet's label sets: 1k, 12k, and the variants of 21k and 22k
IMAGENET_COUNTS = (1000, 11221, 11821, 19168, 21841, 21842, 21843)
#: in the names of timm's models that compare pictures with texts
CONTRASTIVE = ("clip", "vit_pe_core", "vitamin")


def are_classes(model: str, count: int, names: Sequence[str] | None) -> bool:
    """Whether `count` outputs of a timm model's head are classes; names: of the outputs, if known."""
    if names or count in IMAGENET_COUNTS:
        return True
    kin = any(word in model for word in CONTRASTIVE)
    return count > 0 and not (kin and count in _published_counts(model.partition(".")[0]))


@cache
def _published_counts(architecture: str) -> frozenset[int]:
    """num_classes of an architecture's weights in timm."""
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    known = (timm.get_pretrained_cfg(name) for name in tagged)
    return frozenset(config.num_classes for config in known if config)


def label_groups(names: Sequence[str] | None) -> dict[str, slice]:
    """Label groups in the logits: those that the class names state as "group: name", two or more of each beside each
    other; else one of all."""
    groups = [name.partition(": ")[0] for name in names or () if ": " in name]
    parts = {g: slice(groups.index(g), groups.index(g) + groups.count(g)) for g in dict.fromkeys(groups)}
    stated = bool(parts) and len(groups) == len(names or ())
    if stated and all(groups.count(g) > 1 and set(groups[part]) == {g} for g, part in parts.items()):
        return parts
    return {"class": slice(None)}


def ranked(logits: Tensor, k: int, names: Sequence[str] | None) -> list[list[tuple[str, float]]]:
    """For each row of logits [B, classes]: the k most probable (name, probability) of every label group."""
    rows: list[list[tuple[str, float]]] = [[] for _ in logits]
    for part in label_groups(names).values():
        probabilities = logits[:, part].softmax(1)
        best, numbers = probabilities.topk(min(k, probabilities.shape[1]), 1)
        for row, values, classes in zip(rows, best.tolist(), (numbers + (part.start or 0)).tolist()):
            row += [(_class_name(n, logits.shape[1], names), v) for n, v in zip(classes, values)]
    return rows


def _class_name(number: int, count: int, names: Sequence[str] | None) -> str:
    if names:
        return names[number]
    return _imagenet().index_to_description(number) if count == 1000 else f"class {number}"


@cache
def _imagenet() -> timm.data.ImageNetInfo:
    """ImageNet's class names; reading them takes tenths of a second."""
    return timm.data.ImageNetInfo()
