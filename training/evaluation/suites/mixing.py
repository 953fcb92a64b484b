"""Combinations of two feature maps: along the interpolation (paper Fig. 7), and composed of regions (Fig. 8)."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import cosine_per_location
from featinv_nodes.core.mixing import at_grid, compose, interpolate

from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..evaluator import Columns
from ..report import Report, by_condition, by_measure, condition_panel, figures_of
from ..shards import Condition, Table
from ..sources import Originals, read
from .base import Suite

RECONSTRUCTION, COMPOSED = "reconstruction", "composed"


class Mixing(Suite):
    """Each picture with the next one in the source's order that can be read; the last with the first."""

    name = "mixing"
    chooses = False
    count = 32

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        if not all(0 <= w <= 1 for w in args.weights):
            raise FeatInvError(f"--weights {args.weights}: expected shares between 0 and 1")
        self.tested, sampling = self.one_model(), context.sampling(self.spec)
        self.weights = {f"weight={w:g}": w for w in sorted(set(args.weights))}
        self.pooled = context.info(self.spec).source.pooled
        self.sampling = dict.fromkeys([*self.weights, *([] if self.pooled else [COMPOSED]), UNCONDITIONAL], sampling)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--weights",
            type=float,
            nargs="+",
            default=[0, 0.25, 0.5, 0.75, 1],
            help="shares of the second image's map",
        )

    def partners(self, originals: Originals) -> Originals:
        """The next picture of each that can be read, whatever the batch."""
        partners, count = [], len(self.context.source.names)
        for number in originals.numbers:
            for step in range(1, count + 1):
                other, _ = read(self.context.source, [(number + step) % count])
                if other.numbers:
                    partners.append(other)
                    break
        return Originals(
            *(sum((getattr(o, name) for o in partners), []) for name in ("numbers", "pictures", "classes")),
            torch.cat([o.single for o in partners]),
        )

    def interpolated(self, weight: float) -> Condition:
        """Column "cosine": of the picture's map with the combined one that it was drawn from."""

        def condition(originals: Originals) -> Columns:
            pipeline = self.context.open(self.spec)
            first, second = (
                pipeline.features(o.preprocess(self.tested.backbone)) for o in (originals, self.partners(originals))
            )
            target = interpolate([first, second], [1 - weight, weight])
            drawn = pipeline.draw(
                target, self.sampling[f"weight={weight:g}"], self.tested.start(originals), len(target)
            )
            return {"cosine": pipeline.score(target, drawn).cpu(), "pictures": drawn}

        return condition

    def composed(self, originals: Originals) -> Columns:
        """The partner's map in the middle quarter, the picture's own around it. Columns: cosine with the composed map,
        in the whole and by region; and with the other picture's map in each region, for comparison."""
        pipeline = self.context.open(self.spec)
        pixel_values, others = (
            originals.preprocess(self.tested.backbone),
            self.partners(originals).preprocess(self.tested.backbone),
        )
        outer, inner, mask = pipeline.features(pixel_values), pipeline.features(others), middle(pixel_values)
        drawn = pipeline.draw(
            compose(inner, outer, mask), self.sampling[COMPOSED], self.tested.start(originals), len(pixel_values)
        )
        features, inside = pipeline.extract(drawn), at_grid(mask, outer.source.grid)[0, 0].bool()
        to_inner, to_outer = (cosine_per_location(other, features).cpu() for other in (inner, outer))
        whole = to_inner.where(inside, to_outer)
        columns = {
            "cosine": whole.mean((1, 2)),
            "cosine_inside": to_inner[:, inside].mean(1),
            "cosine_outside": to_outer[:, ~inside].mean(1),
            "cosine_inside_with_other": to_outer[:, inside].mean(1),
            "cosine_outside_with_other": to_inner[:, ~inside].mean(1),
        }
        return columns | {"pictures": drawn}

    def conditions(self) -> dict[str, Condition]:
        interpolations: dict[str, Condition] = {
            name: self.interpolated(weight) for name, weight in self.weights.items()
        }
        return (
            interpolations
            | ({} if self.pooled else {COMPOSED: self.composed})
            | self.tested.bounds(self.sampling[UNCONDITIONAL])
        )

    def report(self, tables: dict[str, Table]) -> Report:
        conditions = [condition for condition in tables if condition != ORIGINAL]
        figures = {condition: figures_of(tables[condition], tables[ORIGINAL]) for condition in conditions}
        title = "Along the interpolation: cosine with the combined map (paper Fig. 7)"
        grids = [
            by_condition(
                title, figures, [UNCONDITIONAL, *self.weights, ROUND_TRIP], ["cosine"], "share of the second map"
            )
        ]
        if not self.pooled:
            grids.append(by_measure("The next image's map in the middle quarter (Fig. 8)", figures, [COMPOSED]))
        lines = ["Pooled maps have no locations to compose."] if self.pooled else []
        rows = [ORIGINAL, *self.weights, *([] if self.pooled else [COMPOSED]), ROUND_TRIP, UNCONDITIONAL]
        return Report(
            self.title(), figures, grids, lines, panels={"panel.png": condition_panel(tables, rows, self.title())}
        )


def middle(pixel_values: Tensor) -> Tensor:
    """[1, h, w] the middle quarter of pictures [B, 3, h, w]."""
    mask = torch.zeros(1, *pixel_values.shape[2:])
    height, width = pixel_values.shape[2:]
    mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return mask
