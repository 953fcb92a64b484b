"""Any nn.Module as a source of feature maps: torchvision's, transformers', your own. docs/own-models.md shows how."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from .backbones import LAST, MODULE, Backbone, LastMap
from .digests import digest
from .errors import FeatInvError
from .files import require_finite

FORMS = ("NCHW", "NHWC", "NLC")


class Layer(NamedTuple):
    """Where a feature map is in a model: what one of its modules gives.

    module: its name in named_modules(). form: of its output, or of the first entry of a tuple: "NCHW", "NHWC" or "NLC"
    (tokens, the grid row by row). prefix: class and register tokens that come before the grid's. grid: (H, W) of
    tokens; None for a square.
    """

    module: str
    form: str = "NCHW"
    prefix: int = 0
    grid: tuple[int, int] | None = None


class ModuleBackbone(Backbone):
    """A frozen model of any kind, called as model(pixel_values), with its maps read by hooks."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Mapping[str, Layer],
        input_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        crop_mode: str = "center",
        head: Callable[[Tensor], Tensor] | None = None,
        num_classes: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        """name: what weights files call it, for one set of weights. layers: name -> Layer; "last" is one of them.
        input_size: (height, width) in pixels. mean, std: per colour channel, for pictures in 0..1. interpolation,
        crop_pct, crop_mode: as timm evaluates, see preprocess.py. head: what the module of "last" gives -> logits
        [B, num_classes]; None for a model without a classifier. classes: names of the logits.

        Raises FeatInvError for layers that the model does not have, and settings that are not known.
        """
        nn.Module.__init__(self)
        modules = dict(model.named_modules())
        for layer, where in layers.items():
            if where.module not in modules or where.form not in FORMS:
                raise FeatInvError(
                    f"{name}: layer {layer!r} is {where}; expected a module that the model has, and a form of"
                    f" {', '.join(FORMS)}"
                )
        if LAST not in layers or name.startswith(MODULE):
            raise FeatInvError(f"{name}: expected a layer {LAST!r}, and a name that does not begin with {MODULE}")
        view = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode, "mean": mean, "std": std}
        self._prepare(model, name, classes, input_size, view)
        self._layers, self._head_of, self._num_classes = dict(layers), head, num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes if self._head_of else 0

    @property
    def has_classes(self) -> bool:
        """Whether the head's outputs are classes."""
        return self.num_classes > 0

    @property
    def layers(self) -> list[str]:
        return [LAST, *(layer for layer in self._layers if layer != LAST)]

    @property
    def last_map(self) -> LastMap:
        channels, grid = self._size(LAST)
        return LastMap(self._layers[LAST].form, channels, grid, self._layers[LAST].prefix)

    def several(self, pixel_values: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        outputs = self._outputs(self._normalised(pixel_values), layers)
        return {layer: self._map_of(outputs[layer], layer) for layer in layers}

    def stages(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps [B, C, H, W] of every layer but "last", from one pass."""
        return list(self.several(pixel_values, self.layers[1:]).values())

    def _definition(self, layer: str) -> str:
        where = self._layers[layer]
        tokens = f" after {where.prefix} tokens" if where.form == "NLC" else ""
        return (
            f"output of {where.module} as {where.form}{tokens}; {self.crop_mode} crop of {self.crop_pct:g},"
            f" {self.interpolation}"
        )

    def _size(self, layer: str) -> tuple[int, tuple[int, int]]:
        if layer not in self._sources:
            values, _ = self._tried(lambda blank: self._spatial(blank, layer))
            _, channels, height, width = values.shape
            return channels, (height, width)
        return self._sources[layer].channels, self._sources[layer].grid

    def _spatial(self, x: Tensor, layer: str) -> tuple[Tensor, Tensor | None]:
        if layer not in self._layers:
            raise FeatInvError(f"{self.name} has no layer {layer!r}; choose one of {', '.join(self.layers)}")
        out, prefix = self._outputs(x, [layer])[layer], self._layers[layer].prefix
        return self._map_of(out, layer), out[:, :prefix] if layer == LAST and prefix else None

    def _outputs(self, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """What the layers' modules give in one pass. Raises FeatInvError unless each gives one tensor."""
        outputs: dict[str, list] = {layer: [] for layer in layers}
        hooks = [
            self.model.get_submodule(self._layers[layer].module).register_forward_hook(
                lambda _module, _inputs, out, found=outputs[layer]: found.append(out)
            )
            for layer in layers
        ]
        try:
            self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {layer: self._one(found, layer) for layer, found in outputs.items()}

    def _one(self, found: list, layer: str) -> Tensor:
        first = [out[0] if isinstance(out, (tuple, list)) else out for out in found]
        where = self._layers[layer]
        if len(first) != 1 or not isinstance(first[0], Tensor) or first[0].ndim != len(where.form):
            kinds = [tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__ for out in first]
            raise FeatInvError(
                f"{self.name}: {where.module} gave {kinds}; expected one tensor of the form {where.form}"
            )
        return first[0]

    def _map_of(self, out: Tensor, layer: str) -> Tensor:
        where = self._layers[layer]
        if where.form != "NLC":
            return out.permute(0, 3, 1, 2) if where.form == "NHWC" else out
        count = out.shape[1] - where.prefix
        grid = where.grid or (math.isqrt(max(count, 0)),) * 2
        if grid[0] * grid[1] != count:
            raise FeatInvError(
                f"{self.name}: {where.module} gave {out.shape[1]} tokens, of which the first"
                f" {where.prefix} have no location; the others do not form a grid of {grid[0]} x {grid[1]}. State"
                " prefix and grid in its Layer"
            )
        return out[:, where.prefix :].transpose(1, 2).unflatten(2, grid)

    def _classified(self, out: Tensor) -> Tensor:
        if self._head_of is None:
            raise FeatInvError(f"{self.name} has no classifier: its adapter gives no head")
        return self._head_of(out)


def load_module_backbone(
    name: str, weights: str | Path | None, input_size: int | None, run_code: bool
) -> ModuleBackbone:
    """What NAME(weights, input_size) returns in the FILE.py of module:FILE.py:NAME. weights, input_size: as in
    load_backbone, None where the user gave none. Raises FeatInvError where running files is not allowed, and for
    whatever goes wrong in FILE.py."""
    file, _, attribute = name.removeprefix(MODULE).rpartition(":")
    if not run_code:
        raise FeatInvError(
            f"{name} names a Python file, which is never run because a file or a workflow names it. If you trust it,"
            " give it to a program of training/ with --backbone"
        )
    if not attribute or Path(file).suffix != ".py" or not Path(file).is_file():
        raise FeatInvError(f"{name}: expected {MODULE}FILE.py:NAME, with a FILE.py that exists")
    try:
        made = getattr(_imported(Path(file)), attribute)(weights, input_size)
    except FeatInvError:
        raise
    except Exception as error:  # the file is the user's
        reason = " ".join(str(error).split())[:300]
        raise FeatInvError(f"{name} could not be opened ({type(error).__name__}: {reason})") from error
    if not isinstance(made, ModuleBackbone):
        raise FeatInvError(f"{name} returned a {type(made).__name__}; expected a ModuleBackbone")
    require_finite(dict(made.model.named_parameters()), f"the model of {name}")
    made.weights = digest(made.model)
    return made


def _imported(file: Path) -> ModuleType:
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"featinv_backbone_{place}", file)
    if spec is None or spec.loader is None:
        raise FeatInvError(f"Python cannot import {file}; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
