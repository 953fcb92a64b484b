"""An inversion model ready to use: weights file, base model and backbone opened together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.sampling import PartWay, Sampling
from featinv_nodes.core.weights import InversionInfo, read_info
from featinv_nodes.worlds import World, find_world, model_file, open_backbone

from .base_model import BaseModel, load_base
from .channels_last import move
from .controlnet import FeatureControlNet
from .sampling import noise, sample

ATTEMPT = 1_000_000_000  # how far apart the seeds of best-of-N's attempts lie
PRECISIONS = ("fp32", "bf16")  # of the diffusion model, the default first
UNKNOWN = "unknown"  # in place of a digest
#: how to go on with other weights
WAY = "To go on all the same, give --other-weights, which the reports repeat"
ALLOWED = "Other weights are allowed by --other-weights: "


class FeaturePipeline:
    """What every way from features to pictures does with its backbone, and the source of the maps that it inverts."""

    backbone: Backbone

    @property
    def source(self) -> FeatureSource:
        """Of the maps that are inverted."""
        raise NotImplementedError

    def features(self, pixel_values: Tensor) -> FeatureMap:
        """Feature maps of pictures [B, 3, *input_size] at the layer and pooling that are inverted."""
        return self.backbone.extract(pixel_values, self.source.layer, self.source.pooled)

    def extract(self, pictures: Tensor) -> FeatureMap:
        """Feature maps of drawn pictures: scaled whole to the backbone's input (paper Sec. 2, full pipeline)."""
        return self.features(self.backbone.preprocess(pictures, "stretch"))

    def score(self, target: FeatureMap, pictures: Tensor) -> Tensor:
        """[B] cosine similarity of the pictures' features with the target ones."""
        return cosine(target, self.extract(pictures))


@dataclass
class InversionPipeline(FeaturePipeline):
    """Everything that inverting needs; see load_pipeline.

    digests: of the weights that are open, "backbone" and "base model". allowed: a sentence for each difference between
    these and what a file was made with, for reports; empty unless the user allows such.
    """

    info: InversionInfo
    base: BaseModel
    backbone: Backbone
    model: FeatureControlNet
    digests: dict[str, str] = field(default_factory=dict)
    allowed: list[str] = field(default_factory=list)

    def allow(self, source: FeatureSource, file: str) -> None:
        """Notes that a further file's features are of other weights than the open backbone's, where other weights are
        allowed; where they are not, FeatureSource.require refuses such features."""
        if difference := other_weights_of(
            file, f"backbone {self.backbone.name}", source.weights, self.digests.get("backbone", "")
        ):
            self.allowed.append(ALLOWED + difference)

    @property
    def world(self) -> World | None:
        """The embedded world that the model belongs to, if any."""
        return find_world(self.info.base["name"])

    @property
    def source(self) -> FeatureSource:
        return self.info.source

    def recommended(self, **changes) -> Sampling:
        """The weights file's own sampling settings with the given ones replaced; None leaves a setting alone."""
        return Sampling.chosen(self.info.recommended, changes)

    @torch.inference_mode()
    def draw(
        self,
        features: FeatureMap | None,
        sampling: Sampling,
        start: Tensor,
        batch: int = 16,
        report: Callable[[int], object] = lambda n: None,
        part_way: PartWay | None = None,
    ) -> Tensor:
        """Pictures [B, 3, h, w] in 0..1 from starting noise [B, ...] and a feature map per row, or from the base
        model alone where features is None. part_way: pictures' latents to begin from, a row each. `batch` bounds the
        memory; report is called with each batch's size."""
        parts = []
        for first in range(0, len(start), batch):
            rows = slice(first, first + batch)
            model = self.model if features is not None else None
            own = features.select(rows) if features is not None else None
            begin = part_way.select(rows) if part_way else None
            latents = sample(self.base, model, own, start[rows], sampling, self.info.prompt, self.backbone, begin)
            parts.append(self.base.decode(latents).cpu())
            report(len(latents))
        return torch.cat(parts)

    @torch.inference_mode()
    def best(
        self,
        features: FeatureMap,
        sampling: Sampling,
        start_of: Callable[[int], Tensor],
        batch: int = 16,
        report: Callable[[int], object] = lambda n: None,
        part_way: PartWay | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Best of N by the cosine: of sampling.best_of pictures of each map the one that score puts highest, the first
        among equals. Returns the pictures [B, 3, h, w] and which attempt each is [B].

        start_of: attempt, from 0 -> starting noise of all rows. Attempt 0 alone is what draw gives; only the best
        pictures and one attempt are kept at a time. part_way: as in draw.
        """
        pictures = self.draw(features, sampling, start_of(0), batch, report, part_way)
        attempt = torch.zeros(len(pictures), dtype=torch.int64)
        if sampling.best_of > 1:
            highest = self.score(features, pictures)
        for number in range(1, sampling.best_of):
            others = self.draw(features, sampling, start_of(number), batch, report, part_way)
            scores = self.score(features, others)
            better = scores > highest
            highest = torch.where(better, scores, highest)
            pictures[better.cpu()], attempt[better.cpu()] = others[better.cpu()], number
        return pictures, attempt

    def noise(self, seeds: range | list[int]) -> Tensor:
        """Starting noise [len(seeds), ...], one picture per seed."""
        return torch.cat([noise(self.base, seed) for seed in seeds])


def load_pipeline(
    name: str,
    base: str | None = None,
    backbone_weights: str | None = None,
    backbone: str | None = None,
    device: str = "cpu",
    other_weights: bool = False,
    precision: str = "fp32",
) -> InversionPipeline:
    """Opens a shipped model or a weights file. base: a base model other than the one the file names; backbone,
    backbone_weights: where the file's backbone is. other_weights: whether these may have other weights than those that
    the file was trained with. precision: of the diffusion model, see set_precision. Raises FeatInvError where a part is
    missing or does not fit."""
    file: Path = model_file(name)
    info = read_info(file)
    height, width = info.source.input_size
    side = height if height == width else None  # what it reads where that is not its own default
    if info.source.definition and not backbone:
        raise FeatInvError(
            f"{file.name} inverts {info.source.backbone}, which is not a timm model ({info.source.definition}); give"
            " its adapter with --backbone module:FILE.py:NAME"
        )
    source = open_backbone(backbone or info.source.backbone, backbone_weights, side, bool(backbone)).to(
        device, memory_format=torch.channels_last
    )
    digests = {"backbone": source.weights or UNKNOWN}
    allowed = allow_other_weights(info, file.name, source) if other_weights else []
    info.source.require(source.source(info.source.layer, info.source.pooled), f"{file.name}", "the backbone", WAY)
    frozen = load_base(base or info.base["name"], info.prompt).to(device)
    digests["base model"] = frozen.weights or UNKNOWN
    if difference := other_weights_of(
        file.name, f"base model {frozen.name}", info.base.get("weights", ""), frozen.weights
    ):
        if not other_weights:
            raise FeatInvError(f"{difference} Give the base model that it was trained on, with --base. {WAY}")
        allowed.append(ALLOWED + difference)
    model, _ = FeatureControlNet.load(file, frozen)
    move(model, device)
    set_precision(precision, frozen, model)
    return InversionPipeline(info, frozen, source, model, digests, allowed)


def set_precision(name: str, base: BaseModel, model: FeatureControlNet | None = None) -> None:
    """Casts the U-Net and the ControlNet of float32 models to one of PRECISIONS, in place. What reads pictures or
    features stays in float32: autoencoder, backbone and encoder."""
    for part in (base.unet, *([model.controlnet] if model else [])) if name == "bf16" else ():
        part.bfloat16()


def allow_other_weights(info: InversionInfo, file: str, backbone: Backbone) -> list[str]:
    """Lets a backbone's maps pass for those of any weights of its name; a sentence where they are other ones than the
    weights file's. From then on no file is refused for them."""
    difference = other_weights_of(file, f"backbone {backbone.name}", info.source.weights, backbone.weights)
    backbone.weights = ""
    return [ALLOWED + difference] if difference else []


def other_weights_of(file: str, what: str, made_with: str, there: str) -> str:
    """A sentence where both digests are known and differ, else "". what: the model of which they are."""
    if not made_with or there in ("", UNKNOWN) or made_with == there:
        return ""
    return f"{file} was made with other weights of the same name: digest {made_with} there, {there} in the {what}."
