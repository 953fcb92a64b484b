"""Faithfulness against the cost of sampling: solvers, their steps, and guidance by the gradient."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from itertools import product

import torch
from PIL import Image

from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.sampling import SOLVERS, Sampling
from featinv_nodes.worlds import model_file

from ...models.flops import gmac_of
from ...models.pipeline import InversionPipeline
from ...plots import curves
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..report import Figures, Grid, Report, cell, condition_panel, figures_of
from ..shards import Table
from .base import Suite
from .guidances import PAPER, PAPERS_OWN, evaluated_by_two, extra_measures
from .sweep import recommend

REFERENCE = "ddim", 50
GUIDED, STEP = "gradient", 0.05  # the step where the file recommends none


class Cost(Suite):
    """A condition per solver and number of steps without guidance by the gradient, and per number of last steps with
    it, all else as the weights file recommends; same pictures, same noise."""

    name = "cost"
    count = 100

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.tested = evaluated_by_two(self)
        own = context.sampling(self.spec)
        chosen = [*product(SOLVERS, sorted(set(args.solver_steps))), REFERENCE, (own.solver, own.steps)]
        self.tried = {
            f"{solver}, {steps} steps": context.sampling(self.spec, solver=solver, steps=steps, gradient=0.0)
            for solver, steps in chosen
        }
        self.tried |= {
            f"{own.solver}, {own.steps} steps, gradient in the last {last}": context.sampling(
                self.spec, gradient=own.gradient or STEP, gradient_steps=last
            )
            for last in sorted(set(args.gradient_last))
        }
        self.sampling = self.tried | {PAPER: PAPERS_OWN, UNCONDITIONAL: PAPERS_OWN}
        self.require_own_file()

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--solver-steps",
            type=int,
            nargs="+",
            default=[8, 12, 20, 30],
            help="steps of each solver; --write-back writes the cheapest good one",
        )
        parser.add_argument(
            "--gradient-last",
            type=int,
            nargs="+",
            default=[3, 5, 10],
            help="numbers of last steps with guidance by the gradient",
        )

    def report(self, tables: dict[str, Table]) -> Report:
        figures = {
            condition: figures_of(tables[condition], tables[ORIGINAL]) for condition in (*self.sampling, ROUND_TRIP)
        }
        drawn = [*self.tried, PAPER]
        pipeline = self.context.open(self.spec)
        costs = {
            condition: {
                "evaluations": self.sampling[condition].evaluations,
                "gmac": drawing_gmac(pipeline, self.sampling[condition]),
            }
            for condition in drawn
        }
        best, cheapest = choose(
            {condition: figures[condition][self.score] for condition in self.tried},
            {condition: cost["gmac"] for condition, cost in costs.items()},
        )
        measures = [self.score, *extra_measures(figures[PAPER])]
        rows = [
            [
                condition,
                str(costs[condition]["evaluations"]),
                f"{costs[condition]['gmac']:.1f}",
                *(cell(figures[condition], name) for name in measures),
            ]
            for condition in drawn
        ]
        rows += [
            [condition, "", "", *(cell(figures[condition], name) for name in measures)]
            for condition in (UNCONDITIONAL, ROUND_TRIP)
        ]
        lines = [
            (
                "Evaluations of the steered model for an image, each branch of guidance one; GMAC of sampling it with"
                " one map, decoding included."
            ),
            (
                f"Highest {self.score}: {best}. The cheapest within its interval: {cheapest},"
                f" {costs[cheapest]['gmac']:.1f} GMAC instead of {costs[best]['gmac']:.1f}; the paper's sampling takes"
                f" {costs[PAPER]['gmac']:.1f}."
            ),
        ]
        if self.args.write_back:
            self.cheapest = cheapest
            lines.append(f"{self.args.model} now recommends {cheapest}.")
        panels = {"cost.png": self.curve(figures, costs)}
        panels["panel.png"] = condition_panel(
            tables,
            list(dict.fromkeys([ORIGINAL, best, cheapest, PAPER, ROUND_TRIP, UNCONDITIONAL])),
            self.title(),
            self.score,
        )
        grid = Grid("Cost and faithfulness", ["setting", "evaluations", "GMAC", *measures], rows)
        return Report(
            self.title(), figures, [grid], lines, {"costs": costs, "best": best, "recommended": cheapest}, panels
        )

    def afterwards(self) -> None:
        """Makes the cheapest condition's sampling the recommended one, where it differs from it."""
        if self.args.write_back:
            recommended, chosen = (
                asdict(sampling)
                for sampling in (Sampling(**self.context.info(self.spec).recommended), self.sampling[self.cheapest])
            )
            recommend(
                model_file(self.args.model),
                **{name: value for name, value in chosen.items() if value != recommended[name]},
            )

    def curve(self, figures: dict[str, Figures], costs: dict[str, dict]) -> Image.Image:
        """Cosine with its interval against GMAC, a line per solver, and one for the gradient."""
        points = {name: (costs[name]["gmac"], bounded(figures[name][self.score])) for name in [*self.tried, PAPER]}
        lines: dict[str, list] = {}
        for condition, sampling in self.tried.items():
            lines.setdefault(GUIDED if sampling.gradient else sampling.solver, []).append(points[condition])
        title = f"{self.score} against cost, {self.args.model}"
        return curves(lines, {PAPER: points[PAPER]}, title, "GMAC for an image")


def bounded(entry: dict) -> dict:
    """A figure with its value as the bounds where it has no interval."""
    return entry if entry["low"] is not None else entry | {"low": entry["value"], "high": entry["value"]}


def drawing_gmac(pipeline: InversionPipeline, sampling: Sampling) -> float:
    """Multiply-accumulates (10^9) of drawing a picture, decoding and the gradient's way back included, by torch's
    counter. Counted on one step, two, and one with the gradient: all steps cost the same."""
    source = pipeline.info.source
    blank = FeatureMap(torch.zeros(1, source.channels, *((1, 1) if source.pooled else source.grid)), source)

    def counted(steps: int, moves: int) -> float:
        few = replace(sampling, steps=steps, gradient=sampling.gradient if moves else 0.0, gradient_steps=moves)
        return gmac_of(lambda: pipeline.draw(blank, few, pipeline.noise([0]), 1))

    once = counted(1, 0)
    total = once + (sampling.steps - 1) * (counted(2, 0) - once)
    if moves := sum(map(sampling.moves, range(sampling.steps))):
        total += moves * (counted(1, 1) - once)
    return total * sampling.best_of


def choose(scores: dict[str, dict], costs: dict[str, float]) -> tuple[str, str]:
    """(the setting of the highest score, the cheapest one whose score lies within that one's interval; of equally cheap
    ones the better)."""
    best = max(scores, key=lambda condition: scores[condition]["value"])
    low = scores[best]["value"] if scores[best]["low"] is None else scores[best]["low"]  # one picture has no interval
    close = [condition for condition in scores if scores[condition]["value"] >= low]
    return best, min(close, key=lambda condition: (costs[condition], -scores[condition]["value"]))
