"""The fields of the files' JSON metadata, checked by pydantic.

Fields that are not listed here are ignored, so that a later release can add some; what older releases must not ignore
raises the format version. Imported where a file is read, because pydantic takes tenths of a second.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from .errors import FeatInvError
from .feature_map import FeatureSource
from .sampling import PAPER_SAMPLING, Sampling

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Count = Annotated[int, Field(gt=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Size = tuple[Count, Count]
Deviation = Annotated[float, Field(gt=0)]
SHOWN = 3  # faults named in a message, and
LONGEST = 60  # characters of a wrong value


class Fields(BaseModel):
    """Fields of a JSON text. version: the newest format that this release understands, where the text states one."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    version: ClassVar[int] = 1


class Format(Fields):
    """What is read first: whether the other fields can be understood."""

    format: Annotated[int, Field(gt=0)] = 1


class Source(Fields):
    """A FeatureSource."""

    backbone: Text
    layer: Text
    pooled: bool
    channels: Count
    grid: Size
    input_size: Size
    mean: tuple[float, float, float]
    std: tuple[Deviation, Deviation, Deviation]
    definition: str = ""
    weights: str = ""

    def made(self) -> FeatureSource:
        return FeatureSource(**dict(self))


class ConvSettings(Fields):
    """Settings of encoders.ConvEncoder and MapConvEncoder."""

    kind: Literal["conv", "conv_at_map"]
    channels: Count
    out_channels: Count
    width: Count = 512
    kernel: Count = 3

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the encoder's largest tensors."""
        ends = ((self.channels, self.width), (self.width, self.width), (self.width, self.out_channels))
        return {f"block.{2 * i}.weight": (b, a, self.kernel, self.kernel) for i, (a, b) in enumerate(ends)}


class PerceiverSettings(Fields):
    """Settings of encoders.PerceiverEncoder."""

    kind: Literal["perceiver"]
    channels: Count
    out_channels: Count
    width: Count = 512
    tokens: Size = (1, 1)
    queries: Size = (32, 32)
    heads: Count = 8

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the encoder's largest tensors."""
        return {
            "queries": (1, self.width, *self.queries),
            "position": (1, self.width, *self.tokens),
            "in_proj.weight": (self.width, self.channels, 1, 1),
            "to_query.weight": (self.width, self.width),
            "out.weight": (self.out_channels, self.width),
        }

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> PerceiverSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        return self


class Base(Fields):
    """The base model of an inversion model; see weights.InversionInfo."""

    name: Text
    width: Count
    context: Count
    latent_channels: Count
    heads: Count
    latent_size: Count | None = None
    resolution: Count | None = None
    weights: Text | None = None


_TYPES = get_type_hints(Sampling)
_SETTINGS: dict[str, Any] = {f.name: (_TYPES[f.name], f.default) for f in fields(Sampling)}


class Recommended(create_model("Settings", __base__=Fields, **_SETTINGS)):  # type: ignore[misc]
    """Settings of sampling.Sampling, which checks their values; all that nodes and programs rely on are filled in."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Recommended:
        Sampling(**dict(self))
        return self

    def made(self) -> dict:
        """The settings that the file states, and the four that every file has."""
        usual = {name: getattr(self, name) for name in PAPER_SAMPLING}
        return usual | self.model_dump(exclude_unset=True)


class Inversion(Fields):
    """The entry "featinv" of a weights file; see weights.InversionInfo."""

    format: int
    source: Source
    encoder: Annotated[ConvSettings | PerceiverSettings, Field(discriminator="kind")]
    base: Base
    prompt: str
    recommended: Recommended = Recommended()
    images_seen: Annotated[int, Field(ge=0)] = 0
    config: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


class ScopeStatistics(Fields):
    """The entry "featinv_scope" of a weights file; see scope.Scope."""

    levels: list[float]
    scale: Deviation
    maps: Count
    quantiles: dict[str, list[float]]


class ConceptFile(Fields):
    """The entry "featinv_concepts" of a concept file; see concepts.Concepts."""

    format: int
    labels: Annotated[list[str], Field(min_length=1)]
    source: Source
    method: str = ""
    settings: dict[str, Any] = {}


class ModelType(Fields):
    """The field that identifies the config.json of a transformers folder; "" for others."""

    model_type: str = ""


class Figure(Fields):
    """A measured figure with its 95 % interval, as metrics.bootstrap makes it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: Count


class LinearMapFile(Fields):
    """The entry "featinv_linear_map" of a linear map's file; see linear_maps.LinearMap."""

    format: int
    kind: Literal["affine", "rotation", "direction"]
    source: Source
    low: float | None = None
    settings: dict[str, Any] = {}
    measured: dict[str, Figure] = {}

    def figures(self) -> dict[str, dict]:
        return {name: dict(figure) for name, figure in self.measured.items()}


class HubFolder(Fields):
    """The config.json of a timm-hub folder."""

    architecture: Text
    pretrained_cfg: dict[str, Any] = {}
    label_names: list[str] | dict[str, str] | None = None

    def classes(self, count: int, file: str | Path) -> list[str] | None:
        """The names of a model's `count` classes in the order of its logits, if the configuration has them. Raises
        FeatInvError for another number of them."""
        if isinstance(self.label_names, dict):  # by the number, where some are left out
            return [self.label_names.get(str(number), f"class {number}") for number in range(count)]
        if self.label_names and len(self.label_names) != count:
            raise FeatInvError(f"{file}: label_names has {len(self.label_names)} names for a model of {count} classes")
        return self.label_names or None


class ModelClass(Fields):
    """What the config.json of a diffusers folder is read for first."""

    class_name: str = Field("", alias="_class_name")


class DecoderFolder(ModelClass):
    """The config.json of an AutoencoderRAE folder, as far as its decoder needs it; defaults are diffusers'.

    featinv_source: where the maps come from, of a decoder of this pack's own (encoder_type "timm").
    """

    encoder_type: Literal["dinov2", "siglip2", "mae", "timm"] = "dinov2"
    encoder_hidden_size: Count = 768
    encoder_patch_size: Count = 14
    encoder_input_size: Count = 224
    encoder_norm_mean: tuple[float, float, float] | None = None
    encoder_norm_std: tuple[Deviation, Deviation, Deviation] | None = None
    decoder_hidden_size: Count = 512
    decoder_num_hidden_layers: Count = 8
    decoder_num_attention_heads: Count = 16
    decoder_intermediate_size: Count = 2048
    patch_size: Count = 16
    num_channels: Literal[3] = 3
    featinv_source: Source | None = None

    @property
    def side(self) -> int:
        """Of the map, in cells."""
        return self.encoder_input_size // self.encoder_patch_size

    @model_validator(mode="after")
    def _fits(self) -> DecoderFolder:
        if self.encoder_input_size % self.encoder_patch_size:
            raise ValueError(
                f"encoder_input_size {self.encoder_input_size} is not a multiple of the patches of"
                f" {self.encoder_patch_size}"
            )
        if self.decoder_hidden_size % self.decoder_num_attention_heads or self.decoder_hidden_size % 4:
            raise ValueError(
                f"decoder_hidden_size {self.decoder_hidden_size} is not a multiple of 4 and of the"
                f" {self.decoder_num_attention_heads} heads"
            )
        if self.encoder_type != "timm":
            return self
        if self.featinv_source is None:
            raise ValueError("featinv_source is missing, which encoder_type 'timm' needs")
        source, side = self.featinv_source, self.side
        if source.pooled or source.grid != (side, side) or source.channels != self.encoder_hidden_size:
            raise ValueError(
                f"featinv_source has {source.channels} channels, {source.grid[0]}x{source.grid[1]}; the other fields"
                f" state {self.encoder_hidden_size} channels, {side}x{side}, not pooled"
            )
        return self


Kind = TypeVar("Kind", bound=Fields)


def parse(model: type[Kind], text: str, file: str | Path, kind: str) -> Kind:
    """The fields in a JSON text of a file. kind: what such a text is called in messages.

    Raises FeatInvError, naming the file and the fields, for what is no JSON, nested too deeply, missing or of another
    type, and for a format version of a later release.
    """
    version = _parsed(Format, text, file, kind).format
    if version > model.version:
        raise FeatInvError(
            f"{file} has format version {version}, which a later release wrote; this release reads version"
            f" {model.version}. Update ComfyUI-FeatInv to open it"
        )
    return _parsed(model, text, file, kind)


def _parsed(model: type[Kind], text: str, file: str | Path, kind: str) -> Kind:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        faults = [_described(fault) for fault in error.errors(include_url=False)]
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise FeatInvError(
            f"{file}: the {kind} cannot be read: {'; '.join(faults[:SHOWN])}{more}. The file is damaged, or another"
            " program wrote it; download or copy it again"
        ) from error


def _described(fault: ErrorDetails) -> str:
    """One fault that pydantic found, with the field's name."""
    name = "field " + ".".join(map(str, fault["loc"])) if fault["loc"] else "it"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "should")
    match fault["type"]:
        case "missing":
            return f"{name} is missing"
        case "json_invalid":
            return f"{name} is no JSON that can be read ({message.removeprefix('Invalid JSON: ')})"
        case "union_tag_invalid":
            return f"{name} is of kind {fault['ctx']['tag']!r}; known: {fault['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return f"{name} does not name its kind"
        case "value_error":
            return f"{name}: {message}"
    value = repr(fault["input"])
    value = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
    return f"{name} {message}, not {value}" if message.startswith("should") else f"{name}: {message}, not {value}"
