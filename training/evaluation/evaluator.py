"""A backbone that compares images with their originals: the paper's measures of faithfulness (Sec. 4.1), per
image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.metrics import cosine, top_k_match

#: columns of figures: name -> a value per picture [B], NaN where the measure is not defined for a picture
Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What an evaluator makes of pictures: a map per compared layer, and logits [B, classes], None without a match."""

    maps: dict[str, FeatureMap]
    logits: Tensor | None


def without_match(backbone: Backbone) -> str:
    """Why there is no match of classes by a backbone, in words; "" where there is one."""
    if not backbone.has_classes:
        return f"{backbone.name} has no classes"
    if not reads_last(backbone):
        return f"the head of {backbone.name} reads no single map"
    return ""


def reads_last(backbone: Backbone) -> bool:
    """Whether the backbone has the layer "last"; PiT, CrossViT and CoaT have several last maps instead."""
    try:
        return bool(backbone.last_map)
    except FeatInvError:
        return False


def deepest(backbone: Backbone) -> str:
    """The layer "last", or where the backbone has none the last that timm names."""
    return LAST if reads_last(backbone) else backbone.layers[-1]


class Evaluator:
    """Compares pictures with their originals as one backbone sees them.

    compared: column name -> (layer, pooled). subset: the classes that count for the match (ImageNet-A's 200), None for
    all. no_match: why there is no match, "" where there is one. centres: column name -> mean vector [C] of the
    originals, for the mean-removed cosine; empty for none.
    """

    def __init__(
        self, backbone: Backbone, compared: dict[str, tuple[str, bool]], subset: Sequence[int] | None = None
    ) -> None:
        self.backbone, self.compared = backbone, compared
        self._subset = None if subset is None else torch.tensor(subset)
        self.no_match, self._last = without_match(backbone), reads_last(backbone)
        self.centres: dict[str, Tensor] = {}

    def extract(self, pictures: Tensor) -> Features:
        """Pictures [B, 3, h, w] in 0..1, scaled whole to the backbone's input (paper Sec. 2, full pipeline)."""
        pixel_values = self.backbone.preprocess(pictures, "stretch")
        wanted = {layer for layer, _ in self.compared.values()}
        if self._last:
            layers = self.backbone.extract_several(pixel_values, sorted(wanted - {LAST}))
            layers[LAST] = self.backbone.extract(pixel_values)
        else:  # forward_intermediates of such models gives no map beside the intermediate ones
            layers = {layer: self.backbone.extract(pixel_values, layer) for layer in wanted}
        maps = {
            name: layers[layer].pool() if pooled else layers[layer] for name, (layer, pooled) in self.compared.items()
        }
        return Features(maps, None if self.no_match else self.backbone.logits(layers[LAST]))

    def means(self, features: Features) -> Columns:
        """[B, C] for each compared map: its mean over the locations; their mean over the originals is the centre."""
        return {name: feature_map.values.mean((2, 3)).cpu() for name, feature_map in features.maps.items()}

    def compare(self, target: Features, pred: Features, single: Tensor | None = None) -> Columns:
        """Each compared cosine, also with the mean removed; and where there is a match, top-1 and top-5 of the
        originals' top-1 class in the backbone's first label group, with a subset of classes also among all of them; and
        where `single` [B] holds, the top-1 match of every of several label groups."""
        columns = {}
        for name, original in target.maps.items():
            columns[name] = cosine(original, pred.maps[name])
            if name in self.centres:
                columns[f"{name}_centred"] = cosine(original, pred.maps[name], self.centres[name].to(original.values))
        if target.logits is not None:
            columns |= self._matches(target.logits, pred.logits, single)
        return {name: values.cpu() for name, values in columns.items()}

    def _matches(self, target: Tensor, pred: Tensor, single: Tensor | None) -> Columns:
        groups = self.backbone.groups
        first = next(iter(groups.values()))
        chosen = self._chosen(target, first), self._chosen(pred, first)
        columns = {f"top{k}_match": top_k_match(*chosen, k).float() for k in (1, 5)}
        if self._subset is not None:
            columns |= {
                f"top{k}_match_of_all": top_k_match(target[:, first], pred[:, first], k).float() for k in (1, 5)
            }
        if single is not None and len(groups) > 1:
            for name, part in groups.items():
                match = top_k_match(target[:, part], pred[:, part], 1).float().cpu()
                columns[f"{name}_match_single"] = match.where(single, torch.nan)
        return columns

    def _chosen(self, logits: Tensor, group: slice) -> Tensor:
        return logits[:, group] if self._subset is None else logits[:, self._subset.to(logits.device)]
