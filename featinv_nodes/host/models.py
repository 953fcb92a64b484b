"""Models as the host manages them: loaded when needed, unloaded with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ..core.backbones import LAST, Backbone
from ..core.errors import FeatInvError
from ..core.feature_map import FeatureMap, FeatureSource, concatenate
from ..core.guidance import kept_bytes
from ..core.waiting import Progress, ask_after_layers

Result = TypeVar("Result", Tensor, FeatureMap)
#: newer hosts have a patcher for models that take part in their own memory scheme
Patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


class Whole(comfy.model_patcher.ModelPatcher):
    """A plain module is loaded whole or not at all, however short memory is: only the host's own layers can have their
    weights brought one by one."""

    def load(self, *args, full_load: bool = False, **kwargs) -> None:
        super().load(*args, full_load=True, **kwargs)

    def partially_unload(self, *_, **__) -> int:
        return 0  # bytes; the host then unloads all of it


def managed(model: nn.Module, load: torch.device | None = None) -> Whole:
    """A patcher for a float32 module: it computes on the host's device and rests where the host lets models rest."""
    return Whole(
        model, load_device=load or management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def require_memory(what: str, size: int, advice: Callable[[], str]) -> None:
    """Raises FeatInvError for weights of `size` bytes where the device that computes, or the computer itself, has less
    memory in all. advice: what to do instead."""
    computes = management.get_torch_device()
    for device in dict.fromkeys((torch.device("cpu"), computes)):
        total = management.get_total_memory(device)
        if size > total:
            way = ". Or start ComfyUI with --cpu" if device != torch.device("cpu") else ""
            raise FeatInvError(
                f"{what} needs {in_gb(size)} of memory for its weights alone, and {device} has {in_gb(total)}."
                f" {advice()}{way}"
            )


def in_gb(size: float) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def stop_if_cancelled(*_: int) -> None:
    """Raises what ends a node that the user has cancelled. Serves as a check and as a progress of core's."""
    management.throw_exception_if_processing_interrupted()


def shown(bar: comfy.utils.ProgressBar, start: int = 0, end: int | None = None) -> Progress:
    """A progress function that moves the host's bar from `start` to `end`, and raises once the user has cancelled."""
    end = bar.total if end is None else end

    def move(done: int, total: int) -> None:
        stop_if_cancelled()
        value = start + (end - start) * done // max(total, 1)
        if value != bar.current:  # each is a message to the browser
            bar.update_absolute(value)

    return move


class ManagedBackbone:
    """A backbone and its patcher. Pictures and feature maps stay on the host's intermediate device. Where the user
    cancels, it stops after the layer that it is in."""

    BATCH = 16

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.patcher = managed(backbone)
        ask_after_layers(backbone, stop_if_cancelled)
        self._kept: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self.backbone.name

    def kept_bytes(self, layer: str) -> int:
        """core.guidance.kept_bytes, counted once, on the device where the backbone is."""
        if layer not in self._kept:
            self._kept[layer] = kept_bytes(self.backbone, layer)
        return self._kept[layer]

    def preprocess(self, images: Tensor, fit: str) -> Tensor:
        """Backbone.preprocess for any number of pictures [B, 3, h, w] in 0..1, one after the other."""
        pictures = []
        for image in images.split(1):
            stop_if_cancelled()
            pictures.append(self.backbone.preprocess(image, fit))
        return torch.cat(pictures)

    def extract(
        self, pixel_values: Tensor, layer: str = LAST, pooled: bool = False, progress: Progress | None = None
    ) -> FeatureMap:
        """Feature maps of preprocessed pictures [B, 3, *input_size] in 0..1; float32. progress: called with pictures
        done, of how many; the host's bar if None."""
        progress = progress or shown(comfy.utils.ProgressBar(len(pixel_values)))
        parts: list[FeatureMap] = []
        for part in pixel_values.split(self.BATCH):
            parts.append(
                self._run(lambda x: self.backbone(x, layer, pooled).to(management.intermediate_device()), part)
            )
            progress(sum(len(p) for p in parts), len(pixel_values))
        return concatenate(parts)

    def read_again(self, pictures: Tensor, source: FeatureSource, progress: Progress | None = None) -> FeatureMap:
        """What the backbone reads, at the layer of a map, in pictures [B, 3, h, w] that were drawn from it. progress:
        as in extract. Raises FeatInvError for another backbone than the map's."""
        self.require(source, "the feature map")
        return self.extract(self.preprocess(pictures, "stretch"), source.layer, source.pooled, progress)

    def require(self, source: FeatureSource, theirs: str) -> None:
        """Raises FeatInvError, naming both sides, for another backbone or input size than a source's. theirs: whose."""
        mine = replace(source, backbone=self.name, input_size=self.backbone.input_size)
        mine.require(source, "the backbone", theirs)

    def logits(self, features: FeatureMap) -> Tensor:
        """[B, classes] the model's own head on a last-layer map."""
        return self._run(lambda values: self.backbone.logits(features.to(values.device)), features.values)

    def _run(self, function: Callable[[Tensor], Result], x: Tensor) -> Result:
        # an estimate: activations of a few times the pictures, per stage
        management.load_models_gpu([self.patcher], memory_required=x.numel() * 4 * 64)
        result = function(x.to(self.patcher.load_device))
        return result.to(management.intermediate_device())
