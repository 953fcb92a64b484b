"""How much reconstructions of one feature map differ (paper Fig. 12, Appendix A.3)."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import Sampling

from ...report import panel
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..evaluator import Columns
from ..report import Report, by_measure, figures_of
from ..shards import Condition, Table
from ..sources import Originals
from .base import Suite

RECONSTRUCTION = "reconstruction"
ROWS = 6  # originals in the panel


class Variability(Suite):
    """Several seeds per map: the variance of the pictures and of their features, beside that of the base model
    alone."""

    name = "variability"
    chooses = False
    count = 24

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        if args.samples < 2:
            raise FeatInvError(f"--samples {args.samples}: a variance needs at least 2")
        self.tested = self.one_model()
        self.sampling = {RECONSTRUCTION: context.sampling(self.spec), UNCONDITIONAL: context.sampling(self.spec)}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--samples", type=int, default=4, help="reconstructions of each map")

    def varied(self, sampling: Sampling, steered: bool) -> Condition:
        """A condition with --samples pictures of each original, or of none: its mean columns, and

        pixel_variance: over the samples, averaged over pixels and colours, of pictures in 0..1; feature_variance: over
        the samples, of the unpooled map's vectors at the inverted layer, summed over channels, averaged over locations,
        as a share of the original vectors' mean squared length.
        """

        def condition(originals: Originals) -> Columns:
            tested, pipeline = self.tested, self.context.open(self.spec)
            pixel_values = originals.preprocess(tested.backbone)
            target = pipeline.features(pixel_values) if steered else None
            layer = pipeline.info.source.layer

            def values(pictures: Tensor) -> Tensor:
                return tested.backbone.extract(tested.backbone.preprocess(pictures, "stretch"), layer).values.cpu()

            drawn, measured, maps = [], [], []
            for sample in range(self.args.samples):
                start = tested.start(originals, sample)
                drawn.append(pipeline.draw(target, sampling, start, len(start)))
                measured.append(tested.measure(pixel_values, drawn[-1], originals.single))
                maps.append(values(drawn[-1]))
            columns = {
                name: torch.stack([f[name] for f in measured]).mean(0)
                for name in measured[0]
                if measured[0][name].ndim == 1
            }
            length = values(pixel_values).square().sum(1).mean((1, 2))
            columns["pixel_variance"] = torch.stack(drawn).var(0).mean((1, 2, 3))
            columns["feature_variance"] = torch.stack(maps).var(0).sum(1).mean((1, 2)) / length
            return columns | {"pictures": torch.stack(drawn, 1)}

        return condition

    def conditions(self) -> dict[str, Condition]:
        own = {RECONSTRUCTION: self.varied(self.sampling[RECONSTRUCTION], True)}
        return own | {
            UNCONDITIONAL: self.varied(self.sampling[UNCONDITIONAL], False),
            ROUND_TRIP: self.tested.round_trip,
        }

    def report(self, tables: dict[str, Table]) -> Report:
        figures = {
            condition: figures_of(tables[condition], tables[ORIGINAL])
            for condition in (RECONSTRUCTION, UNCONDITIONAL, ROUND_TRIP)
        }
        originals, drawn, unconditional = (
            tables[condition].pictures for condition in (ORIGINAL, RECONSTRUCTION, UNCONDITIONAL)
        )
        rows = [
            [(originals[k], "original"), *((x, f"sample {s}") for s, x in enumerate(drawn[k]))]
            for k in range(min(ROWS, len(drawn)))
        ]
        rows.append([(x, "no features") for x in unconditional[0]])
        grid = by_measure(
            f"{self.args.samples} samples of each map; measures are averaged over the samples",
            figures,
            [UNCONDITIONAL, RECONSTRUCTION, ROUND_TRIP],
        )
        return Report(self.title(), figures, [grid], panels={"panel.png": panel(rows, [""] * len(rows), self.title())})
