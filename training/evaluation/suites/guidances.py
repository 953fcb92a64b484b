"""Separate guidance scales for features and text, compared with the paper's single scale."""

from __future__ import annotations

import argparse
from itertools import product

import torch

from featinv_nodes.core.sampling import PAPER_SAMPLING, Sampling

from ...plots import matrix
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext, ModelUnderTest
from ..report import Report, by_condition, condition_panel, figures_of, paired_kids, set_measures
from ..shards import Table
from .base import INDEPENDENT, Suite, independent_evaluator, independent_name

PAPER = "the paper's sampling"
PAPERS_OWN = Sampling(**PAPER_SAMPLING)


class Guidances(Suite):
    """A condition per pair of scales, and per scale against the same features without text; same pictures, same
    noise."""

    name = "guidances"
    count = 100

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.tested = evaluated_by_two(self)
        self.features, self.texts = sorted(set(args.guidances)), sorted(set(args.text_guidances))
        self.apart = {
            pair(f, t): context.sampling(self.spec, guidance=f, text_guidance=t, negative="features")
            for f, t in product(self.features, self.texts)
        }
        recommended, changes = (
            context.recommended(self.spec),
            context.changes | {"text_guidance": None, "negative": "text"},
        )
        self.joint = {
            f"against text={g:g}": Sampling.chosen(recommended, changes | {"guidance": g})
            for g in self.features
            if g != 1
        }
        self.sampling = self.apart | self.joint | {PAPER: PAPERS_OWN, UNCONDITIONAL: PAPERS_OWN}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--text-guidances",
            type=float,
            nargs="+",
            default=[0.0, 1.0, 2.0, 4.0],
            help="the text's scales; the features' are --guidances",
        )
        parser.add_argument(
            "--independent",
            help=(
                "for guidances and cost: timm-hub folder or name of a backbone that took no part "
                "(default in an embedded world: the one it names)"
            ),
        )

    def report(self, tables: dict[str, Table]) -> Report:
        figures = {
            condition: figures_of(tables[condition], tables[ORIGINAL]) for condition in (*self.sampling, ROUND_TRIP)
        }
        tried, measures = [*self.apart, *self.joint], [self.score, *extra_measures(figures[PAPER])]
        best = {
            name: (min if name.startswith("kid") else max)(
                tried, key=lambda condition: figures[condition][name]["value"]
            )
            for name in measures
        }
        panels = {
            "panel.png": condition_panel(
                tables,
                list(dict.fromkeys([ORIGINAL, *best.values(), PAPER, ROUND_TRIP, UNCONDITIONAL])),
                self.title(),
                self.score,
            )
        }
        for name in measures:
            values = torch.tensor([[figures[pair(f, t)][name]["value"] for t in self.texts] for f in self.features])
            labels = [f"features {f:g}" for f in self.features], [f"text {t:g}" for t in self.texts]
            digits = 4 if name.startswith("kid") else 3
            panels[f"{name.split(' (')[0].replace(': ', '_')}.png"] = matrix(
                values, *labels, f"{name}, {self.args.model}", digits
            )
        lines = [
            f"Best {name}: {condition} ({figures[condition][name]['value']:.4f}; {PAPER}"
            f" {figures[PAPER][name]['value']:.4f})."
            for name, condition in best.items()
        ]
        lines.append(
            f"The best of {len(tried)} settings on these images: their figures are too favourable; measure the chosen"
            " one on others."
        )
        grid = by_condition(
            "All settings",
            figures,
            [UNCONDITIONAL, PAPER, *tried, ROUND_TRIP],
            [self.score, f"{INDEPENDENT}cosine", "top1_match", *set_measures(figures[UNCONDITIONAL])],
            "setting",
        )
        return Report(self.title(), figures, [grid], lines, {"best": best}, panels)


def pair(features: float, text: float) -> str:
    return f"features={features:g}, text={text:g}"


def evaluated_by_two(suite: Suite) -> ModelUnderTest:
    """The model of --model, evaluated by its own backbone and by one that took no part, where there is one."""
    tested = suite.one_model()
    tested.evaluators |= independent_evaluator(
        suite.context, suite.args.independent or independent_name(suite.context, suite.spec)
    )
    return tested


def extra_measures(figures: dict) -> list[str]:
    """What else a setting is chosen by: the independent backbone's cosine and the paired KIDs, those that there are."""
    return [name for name in figures if name == f"{INDEPENDENT}cosine"] + paired_kids(figures)
