"""What all suites share: models, evaluators, feature spaces, and the conditions that are in every report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.weights import InversionInfo, read_info
from featinv_nodes.worlds import model_file, open_backbone

from ..models.pipeline import ATTEMPT, UNKNOWN, InversionPipeline, allow_other_weights, load_pipeline
from ..models.sampling import round_trip
from . import paper
from .evaluator import Columns, Evaluator
from .inception import Inception
from .metrics import FEWEST, require_kid
from .shards import Condition, Table
from .sources import Originals, Source
from .spaces import RESIZE, Space, TimmSpace, scaled

#: conditions of every suite; those that begin with the first go first
ORIGINAL, UNCONDITIONAL, ROUND_TRIP = "original", "unconditional", "round trip"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, on what: as load_pipeline's arguments."""

    model: str
    base: str | None = None
    backbone_weights: str | None = None
    backbone: str | None = None
    other_weights: bool = False


@dataclass
class EvalContext:
    """Opens models and pictures for the suites. One inversion model is in memory at a time, the backbones stay.

    changes: sampling settings that replace a weights file's own, None leaves one alone. seed: added to a picture's
    number. side: of the pictures that are compared as sets, None for the base model's own. papers: everything as in the
    paper's tables, see paper.py. precision: of the diffusion models, see pipeline.set_precision.
    """

    source: Source
    device: str = "cpu"
    changes: dict = field(default_factory=dict)
    seed: int = 0
    inception: str | None = None
    space: str | None = None
    space_weights: str | None = None
    side: int | None = None
    papers: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self._resolutions: dict[ModelSpec, int] = {}
        self._weights: dict[ModelSpec, tuple[dict[str, str], list[str]]] = {}
        self._pipeline: tuple[ModelSpec, InversionPipeline] | None = None
        self._backbones: dict[tuple, Backbone] = {}
        self._space: Backbone | None = None

    def open(self, spec: ModelSpec) -> InversionPipeline:
        """A spec's model, which stays in memory until another one is asked for. Raises FeatInvError as load_pipeline
        does."""
        if self._pipeline is None or self._pipeline[0] != spec:
            self._pipeline = None  # let go before the next is read
            pipeline = load_pipeline(
                spec.model,
                spec.base,
                spec.backbone_weights,
                spec.backbone,
                self.device,
                spec.other_weights,
                self.precision,
            )
            self._resolutions[spec] = pipeline.base.resolution
            self._weights[spec] = pipeline.digests, pipeline.allowed
            # the evaluators' own backbone: in memory once
            self._pipeline = spec, replace(pipeline, backbone=self.backbone(spec))
        return self._pipeline[1]

    def weights(self, spec: ModelSpec) -> tuple[dict[str, str], list[str]]:
        """The digests of a spec's backbone and base model, and a sentence for each that is allowed though it is not
        the weights file's. Raises FeatInvError for one that is not allowed."""
        if spec not in self._weights:
            self.open(spec)
        return self._weights[spec]

    def backbone(self, spec: ModelSpec) -> Backbone:
        """A spec's backbone without its model."""
        source = self.info(spec).source
        key = spec.backbone or source.backbone, spec.backbone_weights, source.input_size, spec.other_weights
        if key not in self._backbones:
            height, width = source.input_size
            backbone = open_backbone(
                key[0], spec.backbone_weights, height if height == width else None, bool(spec.backbone)
            )
            if spec.other_weights:
                allow_other_weights(self.info(spec), spec.model, backbone)
            if self.papers:
                paper.set_cut(backbone)
            self._backbones[key] = backbone.to(self.device, memory_format=torch.channels_last)
        return self._backbones[key]

    def named(self, name: str) -> Backbone:
        """An embedded backbone, or a timm-hub folder's."""
        key = name, None, None
        if key not in self._backbones:
            self._backbones[key] = open_backbone(name).to(self.device, memory_format=torch.channels_last)
        return self._backbones[key]

    @staticmethod
    def info(spec: ModelSpec) -> InversionInfo:
        return read_info(model_file(spec.model))

    def recommended(self, spec: ModelSpec) -> dict:
        """The weights file's own settings, or the paper's."""
        info = self.info(spec)
        return asdict(paper.sampling(info.source.pooled)) if self.papers else info.recommended

    def sampling(self, spec: ModelSpec, **changes) -> Sampling:
        """The recommended settings with the run's changes, and these."""
        return Sampling.chosen(self.recommended(spec), self.changes | changes)

    def seed_of(self, number: int) -> int:
        """The seed of a picture's noise."""
        return paper.SEED + self.seed if self.papers else number + self.seed

    @property
    def seeds(self) -> str:
        """The seeds in words."""
        return f"{self.seed_of(0)} for every image" if self.papers else f"image number + {self.seed}"

    @property
    def resize(self) -> str:
        """How sets are brought to one size."""
        return paper.RESIZE if self.papers else RESIZE

    def set_side(self, spec: ModelSpec) -> int:
        """The side in pixels of the pictures that are compared as sets."""
        if self.side is None and spec not in self._resolutions:
            self.open(spec)
        return self.side or self._resolutions[spec]

    def spaces(self, spec: ModelSpec) -> list[Space]:
        """The named feature space, or the spec's own backbone; and Inception's where its file is given. Raises
        FeatInvError where the pictures are enough to be compared as sets, and what does so is not installed."""
        if len(self.source.names) >= FEWEST:
            require_kid()
        if self.space and self._space is None:
            self._space = open_backbone(self.space, self.space_weights, run_code=True).to(self.device)
        own = self._space or self.backbone(spec)
        return [TimmSpace(own), *([self._inception] if self.inception else [])]

    def further_digests(self) -> dict[str, str]:
        """The digests of the models that are open beside those of the specs: of --space, of Inception and of
        independent evaluators."""
        named = {
            f"backbone {key[0]}": backbone.weights
            for key, backbone in self._backbones.items()
            if key[1:] == (None, None)
        }
        if self._space:
            named[f"space {self.space}"] = self._space.weights
        if self.inception:
            named["Inception"] = self._inception.weights
        return {name: weights or UNKNOWN for name, weights in named.items()}

    @cached_property
    def _inception(self) -> Inception:
        return Inception(self.inception, self.device)


class ModelUnderTest:
    """One model under test: its conditions draw with its own settings, and its evaluators look at what was drawn.

    evaluators: prefix of the columns -> evaluator. spaces: those in which the sets are compared. sized_by: the model
    that decides their size, this one unless several are compared.
    """

    def __init__(
        self, context: EvalContext, spec: ModelSpec, evaluators: dict[str, Evaluator], spaces: list[Space]
    ) -> None:
        self.context, self.spec, self.evaluators, self.spaces = context, spec, evaluators, spaces
        self.backbone, self.sized_by = context.backbone(spec), spec

    def start(self, originals: Originals, sample: int = 0) -> Tensor:
        """Starting noise, a picture's number its seed; `sample` further ones lie a million apart."""
        seeds = [self.context.seed_of(n) + 1_000_000 * sample for n in originals.numbers]
        return self.context.open(self.spec).noise(seeds)

    def draw(self, pixel_values: Tensor, sampling: Sampling, start: Tensor) -> Tensor:
        """Pictures with the features of preprocessed ones."""
        pipeline = self.context.open(self.spec)
        return pipeline.draw(pipeline.features(pixel_values), sampling, start, len(start))

    def measure(self, pixel_values: Tensor, pictures: Tensor, single: Tensor | None) -> Columns:
        """All evaluators' columns, and the vectors in all spaces, of pictures drawn for originals."""
        columns: Columns = {"pictures": pictures}
        for prefix, evaluator in self.evaluators.items():
            measured = evaluator.compare(evaluator.extract(pixel_values), evaluator.extract(pictures), single)
            columns |= {prefix + name: values for name, values in measured.items()}
        return columns | self.vectors(pictures)

    def vectors(self, pictures: Tensor, original: bool = False) -> Columns:
        """The pictures in all spaces, at the size that all pictures have there."""
        columns: Columns = {}
        for space in self.spaces:
            alike = pictures
            if space.side is None:
                alike = scaled(pictures, self.context.set_side(self.sized_by), self.context.resize)
            if original and self.context.papers:
                alike = paper.stored(alike)
            columns[f"vectors/{space.name}"] = space(alike)
        return columns

    def original(self, originals: Originals) -> Columns:
        """The originals themselves: their vectors, and the sums for the centres."""
        pixel_values = originals.preprocess(self.backbone)
        columns: Columns = {"pictures": pixel_values} | self.vectors(pixel_values, True)
        for prefix, evaluator in self.evaluators.items():
            columns |= {
                f"mean/{prefix}{name}": values
                for name, values in evaluator.means(evaluator.extract(pixel_values)).items()
            }
        return columns

    def centre(self, originals: Table) -> None:
        """Gives the evaluators the originals' mean vectors."""
        for prefix, evaluator in self.evaluators.items():
            evaluator.centres = {name: originals.columns[f"mean/{prefix}{name}"].mean(0) for name in evaluator.compared}

    def reconstruction(self, sampling: Sampling, by: ModelSpec | None = None) -> Condition:
        """Pictures with the originals' features. by: another model that draws them, from maps of its own input size."""

        def condition(originals: Originals) -> Columns:
            pipeline = self.context.open(by or self.spec)

            def start_of(attempt: int) -> Tensor:
                return pipeline.noise([self.context.seed_of(n) + ATTEMPT * attempt for n in originals.numbers])

            drawn, _ = pipeline.best(
                pipeline.features(originals.preprocess(pipeline.backbone)), sampling, start_of, len(originals.numbers)
            )
            return self.measure(originals.preprocess(self.backbone), drawn, originals.single)

        return condition

    def unconditional(self, sampling: Sampling) -> Condition:
        """What the base model draws without features, from the same noise."""

        def condition(originals: Originals) -> Columns:
            pictures = self.context.open(self.spec).draw(None, sampling, self.start(originals), len(originals.numbers))
            return self.measure(originals.preprocess(self.backbone), pictures, originals.single)

        return condition

    def round_trip(self, originals: Originals) -> Columns:
        """The autoencoder's round trip of the originals."""
        pixel_values = originals.preprocess(self.backbone)
        return self.measure(
            pixel_values,
            round_trip(self.context.open(self.spec).base, pixel_values.to(self.context.device)).cpu(),
            originals.single,
        )

    def bounds(self, sampling: Sampling) -> dict[str, Condition]:
        """The conditions that every report carries beside its own. sampling: the unconditional baseline's sampling."""
        return {UNCONDITIONAL: self.unconditional(sampling), ROUND_TRIP: self.round_trip}


def own_evaluator(context: EvalContext, spec: ModelSpec, subset: list[int] | None = None) -> Evaluator:
    """A model's own backbone, on the maps that the model inverts, and for a pooled model also on the unpooled ones,
    which the paper's tables are about."""
    source = context.info(spec).source
    compared = {"cosine": (source.layer, source.pooled)} | (
        {"cosine_unpooled": (source.layer, False)} if source.pooled else {}
    )
    return Evaluator(context.backbone(spec), compared, subset)
