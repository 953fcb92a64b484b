"""All methods from features to images side by side, with what each costs."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from PIL import Image

from featinv_nodes.core.digests import digest
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.universal_guidance import COSTS
from featinv_nodes.feature_decoders import decoder_of

from ...models.untrained import UntrainedSampling
from ...report import panel
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..evaluator import Columns
from ..methods import Method, MethodsOfModel
from ..report import Figures, Grid, Report, by_condition, cell, figures_of, rounded, set_measures
from ..shards import Condition, Table
from ..sources import Originals
from ..spaces import TimmSpace
from .base import INDEPENDENT, Suite
from .cost import STEP
from .guidances import evaluated_by_two

TRAINED, GUIDED, ALONE, DECODER = "trained", "trained, gradient", "guidance alone", "feature decoder"
SECONDS = "seconds"  # column: what a picture of the batch took
ROWS = 6  # pictures in the panel
SEVERAL = 100  # pictures below which a KID says little


class Methods(Suite):
    """A condition per method; same maps, same noise where there is any."""

    name = "methods"
    count = 32
    chooses = False

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        if not 0 < args.start_share <= 1:  # it is used late
            raise FeatInvError(f"--start-share {args.start_share:g}: expected a number above 0 and up to 1")
        self.tested = evaluated_by_two(self)
        if INDEPENDENT in self.tested.evaluators and not context.space:
            self.tested.spaces = [*self.tested.spaces, TimmSpace(self.tested.evaluators[INDEPENDENT].backbone)]
        source, backbone = context.info(self.spec).source, context.backbone(self.spec)
        if decoder := decoder_of(source, backbone, args.decoder, self.spec.other_weights):
            decoder.to(context.device)
        self.decoder = decoder
        self.methods = self.chosen(MethodsOfModel(context, self.spec, self.decoder, args.start_share))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--costs",
            nargs="*",
            choices=COSTS,
            default=list(COSTS),
            help="which lengths of guidance alone are measured; best is slow on a processor",
        )
        parser.add_argument(
            "--decoder", help="a feature decoder's folder or name (default: the embedded one of the model's maps)"
        )
        parser.add_argument(
            "--start-share",
            type=float,
            default=0.5,
            help="share of the steps that are taken from the decoder's image on, above 0 and up to 1",
        )

    @property
    def independent(self) -> str:
        """The backbone that took no part, "" where there is none."""
        evaluator = self.tested.evaluators.get(INDEPENDENT)
        return evaluator.backbone.name if evaluator else ""

    def chosen(self, methods: MethodsOfModel) -> dict[str, Method]:
        """Condition -> method, those without a model between the two with it and the decoder's."""
        own = self.context.sampling(self.spec, best_of=1)
        plain, guided = replace(own, gradient=0.0), replace(own, gradient=own.gradient or STEP)
        alone = [UntrainedSampling.at_cost(cost) for cost in COSTS if cost in self.args.costs]
        result = {TRAINED: methods.trained(plain), GUIDED: methods.trained(guided)}
        for sampling in alone:
            result[f"{ALONE}, {sampling.gradients(sampling.steps)} gradients"] = methods.guided(sampling)
        if self.decoder:
            result[DECODER] = methods.decoded()
            result[f"decoder, then {TRAINED}"] = methods.trained(plain, from_decoder=True)
            result[f"decoder, then {GUIDED}"] = methods.trained(guided, from_decoder=True)
            for sampling in alone[:1]:
                result[f"decoder, then {ALONE}"] = methods.guided(sampling, from_decoder=True)
        return result | {UNCONDITIONAL: methods.unconditional(plain), ROUND_TRIP: methods.round_trip()}

    def conditions(self) -> dict[str, Condition]:
        return {name: self.timed(method) for name, method in self.methods.items()}

    def timed(self, method: Method) -> Condition:
        """Draws, measures, and notes what a picture took from its map on."""

        def condition(originals: Originals) -> Columns:
            pipeline, pixel_values = self.context.open(self.spec), originals.preprocess(self.tested.backbone)
            features, seeds = pipeline.features(pixel_values), [self.context.seed_of(n) for n in originals.numbers]
            if on_gpu := features.values.is_cuda:
                torch.cuda.synchronize()
            clock = time.perf_counter if on_gpu else time.process_time  # which other programs do not disturb
            began = clock()
            pictures = method.draw(pixel_values, features, seeds)  # on the CPU: a GPU is done with them
            seconds = (clock() - began) / len(pictures)
            columns = self.tested.measure(pixel_values, pictures, originals.single)
            return columns | {SECONDS: torch.full((len(pictures),), seconds)}

        return condition

    def weight_digests(self) -> dict[str, str]:
        return super().weight_digests() | ({DECODER: digest(self.decoder)} if self.decoder else {})

    def settings(self) -> dict:
        return {name: method.settings for name, method in self.methods.items() if method.settings}

    def report(self, tables: dict[str, Table]) -> Report:
        figures = {name: figures_of(tables[name], tables[ORIGINAL]) for name in self.methods}
        for entries in figures.values():
            del entries[SECONDS]  # no figure of the pictures
        costs = {
            name: {
                "gradients": method.gradients,
                "gmac": method.gmac(),
                # of the fastest batch: the first one warms up
                SECONDS: tables[name].columns[SECONDS].min().item(),
            }
            for name, method in self.methods.items()
        }
        matches = [f"{of}{name}" for of in self.tested.evaluators for name in ("top1_match", "top5_match")]
        grids = [
            self.cost_grid(figures, costs, [self.score, f"{INDEPENDENT}cosine"]),
            by_condition("Match of classes", figures, list(figures), matches, "method"),
            by_condition("Distance of the sets", figures, list(figures), set_measures(figures[TRAINED]), "method"),
        ]
        grids = [grid for grid in grids if len(grid.header) > 1]
        return Report(
            self.title(),
            figures,
            grids,
            self.lines(len(tables[TRAINED].numbers)),
            {"costs": costs, "independent": self.independent},
            {"panel.png": self.panel(tables)},
        )

    def cost_grid(self, figures: dict[str, Figures], costs: dict[str, dict], measures: list[str]) -> Grid:
        """What a picture costs beside the cosines."""
        measures = [name for name in measures if name in figures[TRAINED]]
        rows = [
            [
                name,
                str(cost["gradients"]),
                rounded(cost["gmac"], 3),
                rounded(cost[SECONDS], 2),
                *(cell(figures[name], measure) for measure in measures),
            ]
            for name, cost in costs.items()
        ]
        return Grid("Cost and faithfulness", ["method", "gradients", "GMAC", "seconds", *measures], rows)

    def lines(self, count: int) -> list[str]:
        """What the tables do not say."""
        on_gpu = self.context.device.startswith("cuda")
        clock = f"on {torch.cuda.get_device_name()}" if on_gpu else "processor time of all threads"
        lines = [
            (
                "An image's cost begins with its feature map and ends with its pixels. GMAC counts only what is run."
                f" Seconds: of an image in the fastest batch of up to {self.args.batch}, {clock}; another computer"
                " gives others."
            )
        ]
        if self.independent:
            lines.append(f"Independent: {self.independent}, which took no part in training or sampling.")
        if count < SEVERAL:
            lines.append(
                f"A KID of {count} images says little: compare the intervals, and take {SEVERAL} images or more to"
                " choose by it."
            )
        if self.decoder is None:
            source = self.context.info(self.spec).source.describe()
            lines.append(
                f"Rows of a feature decoder are left out: no decoder of {source} is embedded; name one with --decoder."
            )
        return lines

    def panel(self, tables: dict[str, Table]) -> Image.Image:
        """A column per method, a row per picture."""
        shown = {ORIGINAL: tables[ORIGINAL]} | {name: tables[name] for name in self.methods}
        rows = []
        for row, _ in enumerate(tables[ORIGINAL].pictures[:ROWS]):
            cells = []
            for name, table in shown.items():
                values, caption = table.columns.get(self.score), name.replace(", ", "\n")
                cells.append((table.pictures[row], caption if values is None else f"{caption}\ncos {values[row]:.2f}"))
            rows.append(cells)
        return panel(rows, [str(number) for number in tables[ORIGINAL].numbers[: len(rows)]], self.title())
