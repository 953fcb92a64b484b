"""A timm model as a source of feature maps, with its own preprocessing and classifier head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from .classes import are_classes, label_groups, ranked
from .errors import FeatInvError, some_of
from .feature_map import FeatureMap, FeatureSource, concatenate
from .preprocess import evaluation_view, require_known, stretched

LAST = "last"
RESIZE_MODES = ("crop", "stretch")
BATCH = 64  # pictures that go through a model together
#: begins the name of a backbone of one's own, module:FILE.py:NAME
MODULE = "module:"
#: what models raise that cannot read what they get; not all exceptions, of which one says that the user has cancelled
STUMBLES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class LastMap(NamedTuple):
    """How a model's forward_features lays out its last map.

    form: "NCHW", "NHWC" or "NLC" (timm's letters; L: prefix tokens, then the grid row by row). channels: C.
    grid: (H, W). prefix: number of class and register tokens.
    """

    form: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0


class TimmModel(Protocol):
    """What timm's models have beside what every nn.Module has."""

    num_classes: int

    def forward_features(self, x: Tensor, /) -> Any:
        """Normalised pictures to the input of the head: a tensor, in some models several."""

    def forward_head(self, x: Tensor, /) -> Tensor:
        """What forward_features gives to logits [B, num_classes]."""

    def forward_intermediates(self, x: Tensor, /, **options: Any) -> Any:
        """The maps of stages or blocks; before them what forward_features gives, unless intermediates_only."""


class Backbone(nn.Module):
    """A frozen timm model.

    `layers` lists what can be inverted: "last", the map that the model's own head reads, and every stage or block
    that timm names in feature_info. Shapes are read from the model by passes of zeros, never from a table.
    """

    model: nn.Module
    _mean: Tensor
    _std: Tensor

    def __init__(self, model: nn.Module, name: str, classes: list[str] | None = None) -> None:
        """model: from timm.create_model. name: architecture.tag. classes: names of the logits, if known."""
        super().__init__()
        config = timm.data.resolve_model_data_config(model)
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = 1 if first is not None and first.in_channels == 1 else config["input_size"][0]
        if channels != 3:
            raise FeatInvError(
                f"{name} reads images with a channel count of {channels}; expected 3, red, green and blue"
            )
        # a transformer may be built for another size than its configuration's
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
        self._prepare(model, name, classes, built_for or config["input_size"][1:], config)
        info = getattr(model, "feature_info", None) or []
        names = [stage["module"] for stage in getattr(info, "info", info)]
        self._stages = {name: names.index(name) for name in names if name}

    def _prepare(
        self, model: nn.Module, name: str, classes: list[str] | None, size: Collection[int], view: Mapping
    ) -> None:
        """view: how pictures are evaluated, under timm's names."""
        self.model = model.eval().requires_grad_(False)
        self.name, self.classes = name, classes
        height, width = size
        self.input_size = (height, width)
        self.mean, self.std = tuple(view["mean"]), tuple(view["std"])
        self.interpolation, self.crop_pct, self.crop_mode = (
            view[key] for key in ("interpolation", "crop_pct", "crop_mode")
        )
        require_known(name, self.interpolation, self.crop_mode)
        self.register_buffer("_mean", torch.tensor(self.mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(self.std)[:, None, None], persistent=False)
        self._sources: dict[str, FeatureSource] = {}
        self.weights = ""  # their digest, once they are those of a file

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self._timm.num_classes

    @property
    def _timm(self) -> TimmModel:
        return cast(TimmModel, self.model)  # nn.Module's type does not say what timm's models have

    @property
    def layers(self) -> list[str]:
        """What can be read: "last", then the stages or blocks that timm names, in the order of the network."""
        return [LAST, *self._stages] if hasattr(self.model, "forward_intermediates") else [LAST]

    def source(self, layer: str = LAST, pooled: bool = False) -> FeatureSource:
        """Where maps of a layer come from. Raises FeatInvError for a layer that the model does not offer."""
        if layer not in self._sources:
            channels, grid = self._size(layer)
            self._sources[layer] = FeatureSource(
                self.name, layer, False, channels, grid, self.input_size, self.mean, self.std, self._definition(layer)
            )
        return replace(self._sources[layer], pooled=pooled, weights=self.weights)

    def _definition(self, layer: str) -> str:
        return ""  # timm's names say it all

    def preprocess(self, images: Tensor, resize_mode: str = "crop") -> Tensor:
        """Crops and resizes pictures [B, 3, h, w] in 0..1 to the backbone's input, [B, 3, *input_size] in 0..1.

        resize_mode "crop": as the model's own evaluation, by timm's crop_mode, crop_pct and interpolation; "stretch":
        the whole picture, whatever its aspect. Gradients reach pictures that require them.
        """
        if resize_mode not in RESIZE_MODES:
            raise FeatInvError(f"resize_mode {resize_mode!r}: expected one of {RESIZE_MODES}")
        if resize_mode == "stretch":
            return stretched(images, self.input_size, self.interpolation)
        return evaluation_view(images, self.input_size, self.crop_pct, self.crop_mode, self.interpolation, self.mean)

    def forward(self, pixel_values: Tensor, layer: str = LAST, pooled: bool = False) -> FeatureMap:
        """Feature maps of preprocessed pictures [B, 3, *input_size] in 0..1. Gradients reach pictures that
        require them."""
        values, prefix = self._spatial(self._normalised(pixel_values), layer)
        features = FeatureMap(values.float(), self.source(layer), prefix)
        return features.pool() if pooled else features

    def values(self, pixel_values: Tensor, layer: str = LAST, pooled: bool = False) -> Tensor:
        """The bare values [B, C, H, W] of forward's feature maps, unchecked: what training reads, without waiting for
        the device."""
        values, _ = self._spatial(self._normalised(pixel_values), layer)
        return values.mean((2, 3), keepdim=True) if pooled else values

    def several(self, pixel_values: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """The values [B, C, H, W] of several layers from one pass, as `values` gives them one by one."""
        named = [layer for layer in layers if layer != LAST]
        indices = [self._stages[layer] for layer in named] or 1  # timm cannot give none
        early = LAST not in layers  # then the layers after them are not computed
        outputs = self._timm.forward_intermediates(
            self._normalised(pixel_values),
            indices=indices,
            output_fmt="NCHW",
            stop_early=early,
            intermediates_only=early,
        )
        maps = dict(zip(sorted(named, key=self._stages.__getitem__), outputs if early else outputs[1]))
        return {layer: self._grid(outputs[0]) if layer == LAST else maps[layer] for layer in layers}

    def stages(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps [B, C, H, W] of every stage that timm names, from one pass."""
        return self._timm.forward_intermediates(
            self._normalised(pixel_values), output_fmt="NCHW", intermediates_only=True
        )

    def _normalised(self, pixel_values: Tensor) -> Tensor:
        return (pixel_values.to(self._mean) - self._mean) / self._std

    @torch.inference_mode()
    def extract(self, pixel_values: Tensor, layer: str = LAST, pooled: bool = False) -> FeatureMap:
        """Feature maps of any number of preprocessed pictures, 64 at a time, without gradients."""
        return concatenate([self(part, layer, pooled) for part in pixel_values.split(BATCH)])

    @torch.inference_mode()
    def extract_several(self, pixel_values: Tensor, layers: Collection[str]) -> dict[str, FeatureMap]:
        """What extract gives of several layers, without prefix tokens, from one pass."""
        if not layers:
            return {}
        parts = [self.several(part, layers) for part in pixel_values.split(BATCH)]
        return {
            layer: FeatureMap(torch.cat([part[layer] for part in parts]).float(), self.source(layer))
            for layer in layers
        }

    def logits(self, features: FeatureMap) -> Tensor:
        """[B, classes] the model's own head on its last-layer map; equals the model's own forward.

        Raises FeatInvError for another layer, a pooled map, or a map whose prefix tokens the head needs but which
        has lost them (after mixing).
        """
        if features.source.layer != LAST or features.source.pooled:
            raise FeatInvError(
                f"the classifier head of {self.name} reads layer {LAST!r}, unpooled; got {features.source.describe()}"
            )
        features.source.require(self.source(), "the feature map", "the backbone")
        values, prefix = features.values.to(self._mean), features.prefix
        if prefix is None and self.last_map.prefix:
            # Two fillings in place of the lost tokens: a head that does not read them answers alike.
            ramp = torch.linspace(-1, 1, values.shape[1]).to(values).expand(len(values), self.last_map.prefix, -1)
            answer, other = self._head(values, ramp), self._head(values, -ramp)
            if not torch.equal(answer, other):
                raise FeatInvError(
                    f"the head of {self.name} reads the class token, which this feature map no longer has"
                )
            return answer
        return self._head(values, prefix)

    @cached_property
    def has_classes(self) -> bool:
        """Whether the head's outputs are classes. False without a head (DINO, SigLIP), and for the projection of CLIP
        and its kin: the channels of an embedding, which timm counts as num_classes."""
        return are_classes(self.name, self.num_classes, self.classes)

    def require_classes(self) -> None:
        """Raises FeatInvError for a backbone without classes."""
        if not self.has_classes:
            raise FeatInvError(
                f"{self.name} has no classes: it ends in features or an embedding, not in a classifier; choose weights"
                " with a classifier, as those that timm tags ft_in1k"
            )

    @property
    def groups(self) -> dict[str, slice]:
        """Label groups in the logits: those that the class names state as "group: name", else one of all."""
        return label_groups(self.classes)

    def top_classes(self, logits: Tensor, k: int) -> list[list[tuple[str, float]]]:
        """For each row of logits [B, classes]: the k most probable (name, probability) of every label group. Raises
        FeatInvError for a backbone without classes."""
        self.require_classes()
        return ranked(logits, k, self.classes)

    @cached_property
    def last_map(self) -> LastMap:
        """The last map's layout, from one or two passes of zeros. Raises FeatInvError if the head reads no spatial
        map."""
        out = self._tried(self._timm.forward_features)
        if not isinstance(out, Tensor):
            raise FeatInvError(f"the head of {self.name} reads {len(out)} maps, not one; {self._other_layers()}")
        if out.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            _, height, width, channels = out.shape
            return LastMap("NHWC", channels, (height, width))
        if out.ndim == 4:
            _, channels, height, width = out.shape
            return LastMap("NCHW", channels, (height, width))
        # Tokens do not say their grid: the same tokens, as forward_intermediates shapes them, do.
        grid = self._size(next(reversed(self._stages)))[1] if self.layers[1:] else (0, 0)
        prefix = out.shape[1] - grid[0] * grid[1]
        known = getattr(self.model, "num_prefix_tokens", None)  # where timm does not say: a class token or none
        if out.ndim != 3 or prefix not in ((0, 1) if known is None else (known,)):
            raise FeatInvError(
                f"the head of {self.name} reads no spatial map: its last output has the shape {tuple(out.shape)}, "
                f"its grid {grid[0]}x{grid[1]}; {self._other_layers()}"
            )
        return LastMap("NLC", out.shape[2], grid, prefix)

    def _other_layers(self) -> str:
        return f"choose one of the layers {some_of(self.layers[1:], 16)}"

    def _blank(self) -> Tensor:
        return torch.zeros(1, 3, *self.input_size, device=self._mean.device, dtype=self._mean.dtype)

    def _size(self, layer: str) -> tuple[int, tuple[int, int]]:
        """(C, (H, W)) of a layer's map."""
        if layer == LAST:
            return self.last_map.channels, self.last_map.grid
        values, _ = self._tried(lambda blank: self._spatial(blank, layer))
        _, channels, height, width = values.shape
        return channels, (height, width)

    @torch.inference_mode()
    def forward_blank(self) -> Any:
        """What the model's forward_features gives of a picture of zeros. Raises whatever the model stumbles over."""
        return self._timm.forward_features(self._blank())

    @torch.inference_mode()
    def _tried(self, run: Callable[[Tensor], Any]) -> Any:
        """What comes of a picture of zeros. Raises FeatInvError if the model cannot read one."""
        try:
            return run(self._blank())
        except FeatInvError:
            raise
        except STUMBLES as error:
            size = "3 x {} x {}".format(*self.input_size)
            reason = " ".join(str(error).split())[:300]
            raise FeatInvError(f"{self.name} cannot read images of {size} ({reason})") from error

    def _spatial(self, x: Tensor, layer: str) -> tuple[Tensor, Tensor | None]:
        """Normalised pictures to (values [B, C, H, W], prefix tokens [B, P, C] or None)."""
        if layer not in self.layers:
            raise FeatInvError(f"{self.name} has no layer {layer!r}; choose one of {some_of(self.layers, 16)}")
        if layer != LAST:
            (values,) = self._timm.forward_intermediates(
                x, indices=[self._stages[layer]], stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            return values, None
        out, count = self._timm.forward_features(x), self.last_map.prefix
        return self._grid(out), out[:, :count] if count else None

    def _grid(self, out: Tensor) -> Tensor:
        """What forward_features gives, as [B, C, H, W] without prefix tokens."""
        form, _, grid, count = self.last_map
        if form == "NLC":
            return rearrange(out[:, count:], "b (h w) c -> b c h w", h=grid[0])
        return rearrange(out, "b h w c -> b c h w") if form == "NHWC" else out

    def _head(self, values: Tensor, prefix: Tensor | None) -> Tensor:
        """The inverse of _spatial for the last layer, then the model's own head: [B, classes]."""
        form = self.last_map.form
        if form == "NLC":
            values = rearrange(values, "b c h w -> b (h w) c")
            values = values if prefix is None else torch.cat([prefix.to(values), values], 1)
        elif form == "NHWC":
            values = rearrange(values, "b c h w -> b h w c")
        return self._classified(values).float()

    def _classified(self, out: Tensor) -> Tensor:
        """The model's own head on what forward_features gives."""
        return self._timm.forward_head(out)
