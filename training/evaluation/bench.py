"""What every suite works with: models, judges and feature spaces, and the arms that every report carries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.weights import InversionInfo, read_info
from featinv_nodes.worlds import model_file, open_backbone

from ..models.inversion import ATTEMPT, Opened, open_model
from ..models.pipeline import round_trip
from .judge import Columns, Judge
from .shards import Arm, Table
from .sources import Originals, Source
from .spaces import Inception, Space, TimmSpace

ORIGINAL, FLOOR, CEILING = "original", "floor", "ceiling"  # arms of every suite; those that begin with the first go first


@dataclass(frozen=True)
class Choice:
    """Which model, on what: as open_model's arguments."""

    model: str
    base: str | None = None
    backbone_weights: str | None = None
    backbone: str | None = None


@dataclass
class Bench:
    """Opens what the suites ask for. One inversion model is in memory at a time, the backbones stay.

    changes: sampling settings that replace a weights file's own, None leaves one alone. seed: added to a picture's number.
    """

    source: Source
    device: str = "cpu"
    changes: dict = field(default_factory=dict)
    seed: int = 0
    inception: str | None = None
    space: str | None = None
    space_weights: str | None = None

    def __post_init__(self) -> None:
        self._opened: tuple[Choice, Opened] | None = None
        self._backbones: dict[tuple, Backbone] = {}
        self._space: Backbone | None = None

    def open(self, choice: Choice) -> Opened:
        if self._opened is None or self._opened[0] != choice:
            self._opened = None  # let go before the next is read
            opened = open_model(choice.model, choice.base, choice.backbone_weights, choice.backbone, self.device)
            self._opened = choice, replace(opened, backbone=self.backbone(choice))  # the judges' own: in memory once
        return self._opened[1]

    def backbone(self, choice: Choice) -> Backbone:
        """A choice's backbone without its model."""
        source = self.info(choice).source
        key = choice.backbone or source.backbone, choice.backbone_weights, source.input_size
        if key not in self._backbones:
            height, width = source.input_size
            opened = open_backbone(key[0], choice.backbone_weights, height if height == width else None)
            self._backbones[key] = opened.to(self.device, memory_format=torch.channels_last)
        return self._backbones[key]

    def named(self, name: str) -> Backbone:
        """An embedded backbone, or a timm-hub folder's."""
        key = name, None, None
        if key not in self._backbones:
            self._backbones[key] = open_backbone(name).to(self.device, memory_format=torch.channels_last)
        return self._backbones[key]

    @staticmethod
    def info(choice: Choice) -> InversionInfo:
        return read_info(model_file(choice.model))

    def sampling(self, choice: Choice, **changes) -> Sampling:
        """The weights file's own settings with the run's changes, and these."""
        return Sampling.chosen(self.info(choice).recommended, self.changes | changes)

    def spaces(self, choice: Choice) -> list[Space]:
        """The named feature space, or the choice's own backbone; and Inception's where its file is given."""
        if self.space and self._space is None:
            self._space = open_backbone(self.space, self.space_weights).to(self.device)
        own = self._space or self.backbone(choice)
        return [TimmSpace(own), *([self._inception] if self.inception else [])]

    @cached_property
    def _inception(self) -> Inception:
        return Inception(self.inception, self.device)


class Subject:
    """One model under judgement: its arms draw with its own settings, and its judges look at what was drawn.

    judges: prefix of the columns -> judge. spaces: those in which the sets are compared.
    """

    def __init__(self, bench: Bench, choice: Choice, judges: dict[str, Judge], spaces: list[Space]) -> None:
        self.bench, self.choice, self.judges, self.spaces = bench, choice, judges, spaces
        self.backbone = bench.backbone(choice)

    def start(self, originals: Originals, sample: int = 0) -> Tensor:
        """Starting noise, a picture's number its seed; `sample` further ones lie a million apart."""
        return self.bench.open(self.choice).noise([n + self.bench.seed + 1_000_000 * sample for n in originals.numbers])

    def draw(self, framed: Tensor, how: Sampling, start: Tensor) -> Tensor:
        """Pictures with the features of framed ones."""
        opened = self.bench.open(self.choice)
        return opened.draw(opened.features(framed), how, start, len(start))

    def measure(self, framed: Tensor, pictures: Tensor, single: Tensor | None) -> Columns:
        """All judges' columns, and the vectors in all spaces, of pictures drawn for framed originals."""
        columns: Columns = {"pictures": pictures}
        for prefix, judge in self.judges.items():
            found = judge.compare(judge.see(framed), judge.see(pictures), single)
            columns |= {prefix + name: values for name, values in found.items()}
        return columns | self.vectors(pictures)

    def vectors(self, pictures: Tensor) -> Columns:
        return {f"vectors/{space.name}": space(pictures) for space in self.spaces}

    def original(self, originals: Originals) -> Columns:
        """The originals themselves: their vectors, and what the centres are made of."""
        framed = originals.framed(self.backbone)
        columns: Columns = {"pictures": framed} | self.vectors(framed)
        for prefix, judge in self.judges.items():
            columns |= {f"mean/{prefix}{name}": values for name, values in judge.means(judge.see(framed)).items()}
        return columns

    def centre(self, originals: Table) -> None:
        """Gives the judges the originals' mean vectors."""
        for prefix, judge in self.judges.items():
            judge.centres = {name: originals.columns[f"mean/{prefix}{name}"].mean(0) for name in judge.compared}

    def reconstruction(self, how: Sampling, by: Choice | None = None) -> Arm:
        """Pictures with the originals' features. by: another model that draws them, from maps of its own input size."""

        def arm(originals: Originals) -> Columns:
            opened = self.bench.open(by or self.choice)

            def start_of(attempt: int) -> Tensor:
                return opened.noise([n + self.bench.seed + ATTEMPT * attempt for n in originals.numbers])

            drawn, _ = opened.best(opened.features(originals.framed(opened.backbone)), how, start_of, len(originals.numbers))
            return self.measure(originals.framed(self.backbone), drawn, originals.single)

        return arm

    def floor(self, how: Sampling) -> Arm:
        """What the base model draws without features, from the same noise."""

        def arm(originals: Originals) -> Columns:
            pictures = self.bench.open(self.choice).draw(None, how, self.start(originals), len(originals.numbers))
            return self.measure(originals.framed(self.backbone), pictures, originals.single)

        return arm

    def ceiling(self, originals: Originals) -> Columns:
        """The autoencoder's round trip of the originals."""
        framed = originals.framed(self.backbone)
        return self.measure(framed, round_trip(self.bench.open(self.choice).base, framed.to(self.bench.device)).cpu(), originals.single)

    def bounds(self, how: Sampling) -> dict[str, Arm]:
        """The arms that every report carries beside its own. how: the floor's sampling."""
        return {FLOOR: self.floor(how), CEILING: self.ceiling}


def own_judge(bench: Bench, choice: Choice, subset: list[int] | None = None) -> Judge:
    """A model's own backbone, on the maps that the model inverts, and for a pooled model also on the unpooled ones, which
    the paper's tables are about."""
    source = bench.info(choice).source
    compared = {"cosine": (source.layer, source.pooled)} | ({"cosine_unpooled": (source.layer, False)} if source.pooled else {})
    return Judge(bench.backbone(choice), compared, subset)
