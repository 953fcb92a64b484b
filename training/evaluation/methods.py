"""Methods from feature maps to images: the trained model, guidance by features alone, a feature decoder, and a
diffusion model that starts from the decoder's image. Each says what one of its images costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from featinv_nodes.core.feature_decoder import FeatureDecoder
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.sampling import PartWay, Sampling

from ..models.flops import gmac_of
from ..models.pipeline import InversionPipeline
from ..models.sampling import latents_of, round_trip
from ..models.untrained import UntrainedPipeline, UntrainedSampling
from .context import EvalContext, ModelSpec


@dataclass(frozen=True)
class Method:
    """A way to pictures. draw: originals as the backbone reads them [B, 3, h, w], their feature maps, a seed each ->
    pictures [B, 3, h, w] in 0..1, on the CPU. gmac: multiply-accumulates (10^9) of a picture, by torch's counter.
    settings: what decides the pictures. gradients: taken for a picture."""

    draw: Callable[[Tensor, FeatureMap, Sequence[int]], Tensor]
    gmac: Callable[[], float]
    settings: dict = field(default_factory=dict)
    gradients: int = 0


@dataclass(frozen=True)
class MethodsOfModel:
    """Makes methods of a model. Nothing is opened before a method is used. share: of the steps that are taken from a
    decoder's picture on, see PartWay."""

    context: EvalContext
    spec: ModelSpec
    decoder: FeatureDecoder | None = None
    share: float = 0.5

    @property
    def pipeline(self) -> InversionPipeline:
        return self.context.open(self.spec)

    @property
    def alone(self) -> UntrainedPipeline:
        """The model's base model and backbone without its ControlNet."""
        pipeline = self.pipeline
        source = pipeline.source
        return UntrainedPipeline(pipeline.base, pipeline.backbone, pipeline.info.prompt, source.layer, source.pooled)

    def trained(self, sampling: Sampling, from_decoder: bool = False) -> Method:
        """The inversion model. from_decoder: it begins part way, from the decoder's picture."""

        def draw(pixel_values: Tensor, features: FeatureMap, seeds: Sequence[int]) -> Tensor:
            pipeline = self.pipeline
            part_way = self._decoded(features) if from_decoder else None
            return pipeline.draw(features, sampling, pipeline.noise(list(seeds)), len(seeds), part_way=part_way)

        first = self._first(sampling.steps, from_decoder)
        gradients = sum(sampling.moves(step) for step in range(first, sampling.steps))
        return self._counted(draw, self._settings(sampling, from_decoder), gradients)

    def guided(self, sampling: UntrainedSampling, from_decoder: bool = False) -> Method:
        """Guidance by features alone, with the base model and the backbone; its arithmetic is counted in parts, as a
        picture of hundreds of gradients is long."""

        def draw(pixel_values: Tensor, features: FeatureMap, seeds: Sequence[int]) -> Tensor:
            part_way = self._decoded(features) if from_decoder else None
            return self.alone.draw_each(features, sampling, seeds, part_way)

        def gmac() -> float:
            blank = self._blank()

            def counted(steps: int, moves: int) -> float:
                few = replace(sampling, steps=steps, moves=moves, recurrence=1, start=0.0, end=1.0)
                return gmac_of(lambda: self.alone.draw_each(blank, few, [0]))

            once, before = counted(1, 0), gmac_of(lambda: self._decoded(blank)) if from_decoder else 0.0
            prediction, gradient = counted(2, 0) - once, counted(1, 1) - once if gradients else 0.0
            return before + once + (sampling.evaluations(sampling.steps, first) - 1) * prediction + gradients * gradient

        first = self._first(sampling.steps, from_decoder)
        gradients = sampling.gradients(sampling.steps, first)
        return Method(draw, gmac, self._settings(sampling, from_decoder), gradients)

    def decoded(self) -> Method:
        """The feature decoder's picture."""
        return self._counted(lambda pixel_values, features, seeds: self.decoder.decode(features, len(seeds)).cpu())

    def unconditional(self, sampling: Sampling) -> Method:
        """What the base model draws without features."""

        def draw(pixel_values: Tensor, features: FeatureMap, seeds: Sequence[int]) -> Tensor:
            pipeline = self.pipeline
            return pipeline.draw(None, sampling, pipeline.noise(list(seeds)), len(seeds))

        return self._counted(draw, asdict(sampling))

    def round_trip(self) -> Method:
        """The autoencoder's round trip of the originals."""
        return self._counted(lambda pixel_values, features, seeds: round_trip(self.pipeline.base, pixel_values).cpu())

    def _counted(self, draw: Callable[..., Tensor], settings: dict | None = None, gradients: int = 0) -> Method:
        """A method whose arithmetic is counted on a whole picture."""

        def gmac() -> float:
            blank = self._blank()
            pixel_values = torch.zeros(1, 3, *blank.source.input_size)
            return gmac_of(lambda: draw(pixel_values, blank, [0]))

        return Method(draw, gmac, settings or {}, gradients)

    def _decoded(self, features: FeatureMap) -> PartWay:
        return PartWay(latents_of(self.pipeline.base, self.decoder.decode(features, len(features))), self.share)

    def _first(self, steps: int, from_decoder: bool) -> int:
        return PartWay(torch.empty(0), self.share).first(steps) if from_decoder else 0

    def _settings(self, sampling: Sampling | UntrainedSampling, from_decoder: bool) -> dict:
        return asdict(sampling) | ({"share": self.share} if from_decoder else {})

    def _blank(self) -> FeatureMap:
        """A map of zeros, on which arithmetic is counted. Its source is the backbone's, which may look for it by
        reading a picture: that is not counted."""
        backbone, source = self.pipeline.backbone, self.pipeline.source
        source = backbone.source(source.layer, source.pooled)
        return FeatureMap(torch.zeros(1, source.channels, *((1, 1) if source.pooled else source.grid)), source)
