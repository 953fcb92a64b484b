"""How faithful the reconstructions of images are (paper Tables 1 and 3, Sec. 4.2 for other data)."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm

from .. import paper
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..report import Report, by_measure, condition_panel, figures_of
from ..shards import Table
from .base import Suite

RECONSTRUCTION = "reconstruction"


class Quality(Suite):
    """Reconstruction beside the unconditional baseline and the round trip, by the model's own backbone."""

    name = "quality"

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.tested = self.one_model(self.subset())
        self.sampling = {RECONSTRUCTION: context.sampling(self.spec), UNCONDITIONAL: context.sampling(self.spec)}

    def subset(self) -> list[int] | None:
        """The classes that count for the match, None for all."""
        return None

    def report(self, tables: dict[str, Table]) -> Report:
        columns = [UNCONDITIONAL, RECONSTRUCTION, ROUND_TRIP]
        figures = {
            condition: figures_of(tables[condition], tables[ORIGINAL])
            for condition in (RECONSTRUCTION, UNCONDITIONAL, ROUND_TRIP)
        }
        way = gap_closed(figures)
        info = self.context.info(self.spec)
        lines = [f"Cosine: {way:.1%} of the gap between the unconditional baseline and the round trip."]
        grids = [by_measure("Faithfulness", figures, columns)]
        if row := paper.published(self.name, info.source, info.encoder["kind"]):
            lines.append(paper.beside(row))
            if self.context.papers:
                grids.insert(0, paper.table(row, info.source, figures[RECONSTRUCTION]))
        panel = condition_panel(tables, [ORIGINAL, RECONSTRUCTION, ROUND_TRIP, UNCONDITIONAL], self.title())
        return Report(
            self.title(),
            figures,
            grids,
            lines,
            {"gap_closed": way},
            {"panel.png": panel},
        )


class OutOfDistribution(Quality):
    """The same on pictures that the models were not trained on, as the paper does on BAID."""

    name = "ood"
    papers = paper.BAID


class NaturalAdversarial(Quality):
    """The same on ImageNet-A: the match among its 200 classes."""

    name = "natural-adversarial"
    papers = paper.IMAGENET_A

    def subset(self) -> list[int]:
        self.require_imagenet()
        file = Path(timm.data.__file__).parent / "_info" / "imagenet_a_indices.txt"
        return [int(line) for line in file.read_text(encoding="utf-8").split()]


def gap_closed(results: dict) -> float:
    """How far the reconstruction's cosine comes on the way from the unconditional baseline's (0) to the round trip's
    (1)."""
    low, mid, high = (results[k]["cosine"]["value"] for k in (UNCONDITIONAL, RECONSTRUCTION, ROUND_TRIP))
    return (mid - low) / (high - low)
