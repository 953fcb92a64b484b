"""A backbone that compares pictures with their originals: the paper's measures of faithfulness (Sec. 4.1), per
picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.metrics import cosine, top_k_match

#: columns of figures: name -> a value per picture [B], NaN where the measure is not defined for a picture
Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What an evaluator makes of pictures: a map per compared layer, and logits [B, classes]."""

    maps: dict[str, FeatureMap]
    logits: Tensor


class Evaluator:
    """Compares pictures with their originals as one backbone sees them.

    compared: column name -> (layer, pooled). subset: the classes that count for the match (ImageNet-A's 200), None for
    all. centres: column name -> mean vector [C] of the originals, for the mean-removed cosine; empty for none.
    """

    def __init__(
        self, backbone: Backbone, compared: dict[str, tuple[str, bool]], subset: Sequence[int] | None = None
    ) -> None:
        self.backbone, self.compared = backbone, compared
        self._subset = None if subset is None else torch.tensor(subset)
        self.centres: dict[str, Tensor] = {}

    def extract(self, pictures: Tensor) -> Features:
        """Pictures [B, 3, h, w] in 0..1, scaled whole to the backbone's input (paper Sec. 2, full pipeline)."""
        pixel_values = self.backbone.preprocess(pictures, "stretch")
        others = {layer for layer, _ in self.compared.values()} - {LAST}
        layers = {LAST: self.backbone.extract(pixel_values)} | self.backbone.extract_several(
            pixel_values, sorted(others)
        )
        maps = {
            name: layers[layer].pool() if pooled else layers[layer] for name, (layer, pooled) in self.compared.items()
        }
        return Features(maps, self.backbone.logits(layers[LAST]))

    def means(self, features: Features) -> Columns:
        """[B, C] for each compared map: its mean over the locations; their mean over the originals is the centre."""
        return {name: feature_map.values.mean((2, 3)).cpu() for name, feature_map in features.maps.items()}

    def compare(self, target: Features, pred: Features, single: Tensor | None = None) -> Columns:
        """Each compared cosine, also with the mean removed; top-1 and top-5 match of the originals' top-1 class in the
        backbone's first label group; and where `single` [B] holds, the top-1 match of every of several label groups."""
        columns = {}
        for name, original in target.maps.items():
            columns[name] = cosine(original, pred.maps[name])
            if name in self.centres:
                columns[f"{name}_centred"] = cosine(original, pred.maps[name], self.centres[name].to(original.values))
        groups = self.backbone.groups
        first = (
            self._chosen(target.logits, next(iter(groups.values()))),
            self._chosen(pred.logits, next(iter(groups.values()))),
        )
        for k in (1, 5):
            columns[f"top{k}_match"] = top_k_match(*first, k).float()
        if single is not None and len(groups) > 1:
            for name, part in groups.items():
                match = top_k_match(target.logits[:, part], pred.logits[:, part], 1).float().cpu()
                columns[f"{name}_match_single"] = match.where(single, torch.nan)
        return {name: values.cpu() for name, values in columns.items()}

    def _chosen(self, logits: Tensor, group: slice) -> Tensor:
        return logits[:, group] if self._subset is None else logits[:, self._subset.to(logits.device)]
