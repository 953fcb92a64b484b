"""A timm model as a source of feature maps, with its own preprocessing and classifier head."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .feature_map import FeatInvError, FeatureMap, FeatureSource, concatenate

LAST = "last"
FITS = ("crop", "stretch")


class Backbone(nn.Module):
    """A frozen timm model.

    `layers` lists what can be inverted: "last", the map that the model's own head reads, and every stage or block
    that timm names in feature_info. Shapes are read from the model by one forward pass of zeros, never from a table.
    """

    def __init__(self, model: nn.Module, name: str, classes: list[str] | None = None) -> None:
        """model: from timm.create_model. name: architecture.tag. classes: names of the logits, if known."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name, self.classes = name, classes
        config = timm.data.resolve_model_data_config(model)
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # a transformer may be built for another size
        self.input_size: tuple[int, int] = tuple(built_for or config["input_size"][1:])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.interpolation, self.crop_pct = config["interpolation"], config["crop_pct"]
        self.register_buffer("_mean", torch.tensor(self.mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(self.std)[:, None, None], persistent=False)
        info = getattr(model, "feature_info", None) or []
        self._stages = [stage["module"] for stage in getattr(info, "info", info)]
        self._sources: dict[str, FeatureSource] = {}

    @property
    def layers(self) -> list[str]:
        return [LAST, *self._stages] if hasattr(self.model, "forward_intermediates") else [LAST]

    def source(self, layer: str = LAST, pooled: bool = False) -> FeatureSource:
        """Where maps of a layer come from. Raises FeatInvError for a layer that the model does not offer."""
        if layer not in self._sources:
            blank = torch.zeros(1, 3, *self.input_size, device=self._mean.device, dtype=self._mean.dtype)
            with torch.inference_mode():
                values, _ = self._spatial(blank, layer)
            channels, *grid = values.shape[1:]
            self._sources[layer] = FeatureSource(
                self.name, layer, False, channels, tuple(grid), self.input_size, self.mean, self.std
            )
        known = self._sources[layer]
        return FeatureSource(**{**known.to_dict(), "pooled": pooled})

    def frame(self, images: Tensor, fit: str = "crop") -> Tensor:
        """Cuts and scales pictures [B, 3, h, w] in 0..1 to what the backbone reads, [B, 3, *input_size] in 0..1.

        fit "crop": the largest centred region of the input's aspect, times timm's crop_pct, as in the model's own
        evaluation; "stretch": the whole picture. Antialiased, by the model's own interpolation.
        """
        if fit not in FITS:
            raise FeatInvError(f"fit {fit!r}: expected one of {FITS}")
        if fit == "crop":
            height, width = images.shape[2:]
            scale = min(height / self.input_size[0], width / self.input_size[1]) * self.crop_pct
            h, w = (max(1, round(side * scale)) for side in self.input_size)
            top, left = (height - h) // 2, (width - w) // 2
            images = images[:, :, top : top + h, left : left + w]
        if tuple(images.shape[2:]) == self.input_size:
            return images
        mode = "bicubic" if self.interpolation == "bicubic" else "bilinear"
        return F.interpolate(images.float(), self.input_size, mode=mode, antialias=True).clamp(0, 1)

    def forward(self, framed: Tensor, layer: str = LAST, pooled: bool = False) -> FeatureMap:
        """Feature maps of framed pictures [B, 3, *input_size] in 0..1. Gradients reach the pictures if they ask."""
        values, prefix = self._spatial(self._normalised(framed), layer)
        found = FeatureMap(values.float(), self.source(layer), prefix)
        return found.pool() if pooled else found

    def values(self, framed: Tensor, layer: str = LAST, pooled: bool = False) -> Tensor:
        """The bare values [B, C, H, W] of forward's feature maps, unchecked: what training reads, without waiting for
        the device."""
        values, _ = self._spatial(self._normalised(framed), layer)
        return values.mean((2, 3), keepdim=True) if pooled else values

    def _normalised(self, framed: Tensor) -> Tensor:
        return (framed.to(self._mean) - self._mean) / self._std

    @torch.inference_mode()
    def extract(self, framed: Tensor, layer: str = LAST, pooled: bool = False, batch: int = 64) -> FeatureMap:
        """Feature maps of any number of framed pictures, `batch` at a time, without gradients."""
        return concatenate([self(part, layer, pooled) for part in framed.split(batch)])

    def logits(self, features: FeatureMap) -> Tensor:
        """[B, classes] the model's own head on its last-layer map; equals the model's own forward.

        Raises FeatInvError for another layer, a pooled map, or a map whose prefix tokens the head needs but which
        has lost them (after mixing).
        """
        if features.source.layer != LAST or features.source.pooled:
            raise FeatInvError(f"the classifier head of {self.name} reads layer {LAST!r}, unpooled; got {features.source.describe()}")
        features.source.require(self.source(), "the feature map", "the backbone")
        values = features.values.to(self._mean)
        if self._is_tokens():
            prefix = features.prefix
            count = getattr(self.model, "num_prefix_tokens", 0)
            if count and prefix is None:
                if getattr(self.model, "global_pool", "token") in ("token", ""):
                    raise FeatInvError(f"the head of {self.name} reads the class token, which this feature map no longer has")
                prefix = values.new_zeros(len(values), count, values.shape[1])  # an averaging head skips them
            values = values.flatten(2).transpose(1, 2)
            values = values if not count else torch.cat([prefix.to(values), values], 1)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            values = values.permute(0, 2, 3, 1)
        return self.model.forward_head(values).float()

    @property
    def groups(self) -> dict[str, slice]:
        """Label groups in the logits: those that the class names state as "group: name", else one of all."""
        if not self.classes:
            return {"class": slice(None)}
        groups = [name.split(":")[0] for name in self.classes]
        return {g: slice(groups.index(g), groups.index(g) + groups.count(g)) for g in dict.fromkeys(groups)}

    def top_classes(self, logits: Tensor, k: int) -> list[list[tuple[str, float]]]:
        """For each row of logits [B, classes]: the k most probable (name, probability) of every label group."""
        found: list[list[tuple[str, float]]] = [[] for _ in logits]
        for part in self.groups.values():
            chances = logits[:, part].softmax(1)
            best, numbers = chances.topk(min(k, chances.shape[1]), 1)
            for row, values, places in zip(found, best.tolist(), (numbers + (part.start or 0)).tolist()):
                row += [(self._class_name(n), v) for n, v in zip(places, values)]
        return found

    def _class_name(self, number: int) -> str:
        if self.classes:
            return self.classes[number]
        if self.model.num_classes == 1000:
            return timm.data.ImageNetInfo().index_to_description(number)
        return f"class {number}"

    def _is_tokens(self) -> bool:
        return hasattr(self.model, "num_prefix_tokens") or hasattr(self.model, "patch_embed") and not hasattr(self.model, "output_fmt")

    def _spatial(self, x: Tensor, layer: str) -> tuple[Tensor, Tensor | None]:
        """Normalised pictures to (values [B, C, H, W], prefix tokens [B, P, C] or None)."""
        if layer == LAST:
            out = self.model.forward_features(x)
            if out.ndim == 4:
                return (out.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else out), None
            if out.ndim == 3:
                count = getattr(self.model, "num_prefix_tokens", 0)
                height, width = self._token_grid(x, out.shape[1] - count)
                return out[:, count:].transpose(1, 2).unflatten(2, (height, width)), out[:, :count] if count else None
            raise FeatInvError(f"{self.name} has no spatial map at its last layer (shape {tuple(out.shape)})")
        if layer not in self.layers:
            raise FeatInvError(f"{self.name} has no layer {layer!r}; choose one of {', '.join(self.layers)}")
        index = self._stages.index(layer)
        (values,) = self.model.forward_intermediates(x, indices=[index], intermediates_only=True, output_fmt="NCHW")
        return values, None

    def _token_grid(self, x: Tensor, tokens: int) -> tuple[int, int]:
        embed = getattr(self.model, "patch_embed", None)
        grid = embed.dynamic_feat_size(x.shape[2:]) if hasattr(embed, "dynamic_feat_size") else getattr(embed, "grid_size", None)
        if grid is None or grid[0] * grid[1] != tokens:
            raise FeatInvError(f"{self.name}: {tokens} tokens at the last layer do not form its patch grid {grid}")
        return tuple(grid)


def load_backbone(name: str, weights: str | Path | None = None) -> Backbone:
    """A backbone from local files alone; the network is never asked.

    name: timm architecture[.tag], with weights a .safetensors file of its state dict; or a timm-hub folder
    (config.json and model.safetensors), whose configuration then decides everything. Raises FeatInvError for an
    unknown name (with the nearest known ones), a missing or unreadable file, and keys that do not fit.
    """
    folder = Path(name)
    if weights is None and (folder / "config.json").is_file():
        return _from_folder(folder)
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = ", ".join(get_close_matches(architecture, timm.list_models(), 4, 0.5)) or "none near"
        raise FeatInvError(f"timm does not know the architecture {architecture!r}; similar names: {near}")
    if weights is None:
        raise FeatInvError(f"backbone {name} needs a local weights file (.safetensors) or a timm-hub folder; nothing is downloaded")
    return Backbone(_filled(timm.create_model(name, pretrained=False), Path(weights)), name)


def _from_folder(folder: Path) -> Backbone:
    try:
        config = json.loads((folder / "config.json").read_text())
        architecture = config["architecture"]
    except (ValueError, KeyError) as error:
        raise FeatInvError(f"{folder / 'config.json'} is not a timm-hub configuration: {error}") from error
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    tag = config.get("pretrained_cfg", {}).get("tag", "")
    classes = config.get("label_names")
    return Backbone(_filled(model, folder / "model.safetensors"), f"{architecture}.{tag}" if tag else architecture, classes)


def _filled(model: nn.Module, file: Path) -> nn.Module:
    if not file.is_file():
        raise FeatInvError(f"backbone weights {file} do not exist")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise FeatInvError(f"{file} is not a readable safetensors file: {error}") from error
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FeatInvError(f"{file} does not fit {type(model).__name__}: {error}") from error
    return model
