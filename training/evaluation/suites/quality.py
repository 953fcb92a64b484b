"""How faithful the reconstructions of pictures are (paper Tables 1 and 3, Sec. 4.2 for other data)."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm

from .. import paper
from ..bench import CEILING, FLOOR, ORIGINAL, Bench
from ..report import Report, by_measure, figures_of, shown
from ..shards import Table
from .base import Suite

RECONSTRUCTION = "reconstruction"


class Quality(Suite):
    """Reconstruction beside floor and ceiling, by the model's own backbone."""

    name = "quality"

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        super().__init__(bench, args)
        self.subject = self.one_subject(self.subset())
        self.sampling = {RECONSTRUCTION: bench.sampling(self.choice), FLOOR: bench.sampling(self.choice)}

    def subset(self) -> list[int] | None:
        """The classes that count for the match, None for all."""
        return None

    def report(self, tables: dict[str, Table]) -> Report:
        columns = [FLOOR, RECONSTRUCTION, CEILING]
        figures = {arm: figures_of(tables[arm], tables[ORIGINAL]) for arm in (RECONSTRUCTION, FLOOR, CEILING)}
        way = gap_closed(figures)
        source = self.bench.info(self.choice).source
        lines = [f"Cosine: {way:.1%} of the way from floor to ceiling.", paper.beside(source.backbone, source.layer, source.pooled)]
        panel = shown(tables, [ORIGINAL, RECONSTRUCTION, CEILING, FLOOR], self.title())
        return Report(
            self.title(), figures, [by_measure("Faithfulness", figures, columns)], [line for line in lines if line], {"gap_closed": way}, {"panel.png": panel}
        )


class OutOfDistribution(Quality):
    """The same on pictures that the models were not trained on, as the paper does on BAID."""

    name = "ood"


class NaturalAdversarial(Quality):
    """The same on ImageNet-A: the match among its 200 classes."""

    name = "natural-adversarial"

    def subset(self) -> list[int]:
        self.require_imagenet()
        return [int(line) for line in (Path(timm.data.__file__).parent / "_info" / "imagenet_a_indices.txt").read_text().split()]


def gap_closed(results: dict, name: str = "cosine") -> float:
    """How far the reconstruction comes on the way from floor (0) to ceiling (1)."""
    low, mid, high = (results[k][name]["value"] for k in (FLOOR, RECONSTRUCTION, CEILING))
    return (mid - low) / (high - low)
