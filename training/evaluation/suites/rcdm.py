"""Beside RCDM, which inverts pooled vectors with a diffusion model in pixel space (paper Table 4, Appendix A.5)."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import open_backbone

from ...models.pipeline import ALLOWED, WAY, other_weights_of
from ..context import ROUND_TRIP, UNCONDITIONAL, EvalContext, ModelSpec
from ..evaluator import Columns, Evaluator
from ..rcdm import EMBEDDED, load_rcdm
from ..report import Report, by_condition, condition_panel, set_measures
from ..shards import Condition, Table
from ..sources import Originals
from ..spaces import Scaled
from .models import Several

COMPETITOR, NATIVE = "RCDM", "native: "
COMPARED = {"cosine": (LAST, False), "cosine_pooled": (LAST, True)}


class BesideRCDM(Several):
    """RCDM's pictures and the models', at the backbone's resolution and at RCDM's own."""

    name, count, fewest = "rcdm", 500, 1
    default = ("tiny_cnn_pooled", "tiny_cnn_last")

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        self.file = Path(args.rcdm or EMBEDDED)
        if not args.rcdm and not self.file.is_file():
            raise FeatInvError(
                "the drawn world's RCDM is not shipped: python training/make_world.py drawn --stage rcdm makes it, or"
                " name a checkpoint with --rcdm"
            )
        self.rcdm = load_rcdm(self.file).to(context.device)
        super().__init__(context, args)
        for name, spec in self.models.items():
            self.require_fitting(name, spec)
        sources = [context.info(spec).source for spec in self.models.values()]
        if len({(source.backbone, source.input_size) for source in sources}) > 1:
            raise FeatInvError("suite rcdm compares models of one backbone; use cross-model for several")
        spec, side = self.first.spec, self.rcdm.resolution
        name = spec.backbone or self.first.backbone.name
        small = open_backbone(name, spec.backbone_weights, side, bool(spec.backbone)).to(context.device)
        for tested in self.tested_models.values():
            tested.evaluators |= {NATIVE: Evaluator(small, COMPARED)}
            tested.spaces = [*self.spaces, *(Scaled(space, side) for space in self.spaces)]
        self.sampling[COMPETITOR] = Sampling(self.rcdm.steps if args.rcdm_steps is None else args.rcdm_steps, 1.0, 1.0)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--rcdm",
            help=(
                "published checkpoint, as rcdm_ema_supervised.pt (default: the one that make_world.py drawn --stage"
                " rcdm makes)"
            ),
        )
        parser.add_argument("--rcdm-steps", type=int, help="RCDM's DDIM steps (default: 100, the drawn world's own 50)")

    def chosen(self) -> dict[str, ModelSpec]:
        """--models, or --model alone; beside the embedded RCDM both shipped models of its features."""
        embedded = not self.args.rcdm and self.args.model in self.default
        return super().chosen() if self.args.models or embedded else {self.args.model: self.spec}

    def require_fitting(self, name: str, spec: ModelSpec) -> None:
        """Raises FeatInvError for a model of other features than RCDM's."""
        source, own = self.context.info(spec).source, self.rcdm.source
        if (
            source.layer != LAST
            or source.channels != self.rcdm.channels
            or own
            and (own.backbone, own.input_size) != (source.backbone, source.input_size)
        ):
            reads = f"{own.backbone}'s vectors" if own else "vectors"
            hint = "" if self.args.rcdm else "; give --rcdm FILE, a checkpoint for these features"
            raise FeatInvError(
                f"RCDM {self.file} reads {reads} of {self.rcdm.channels} channels of the last layer; {name} inverts"
                f" {source.describe()}{hint}"
            )
        if own:
            opened = replace(own, weights=self.context.backbone(spec).weights)
            own.require(opened, f"RCDM {self.file}", "the backbone", WAY)

    def evaluators(self, spec: ModelSpec) -> dict[str, Evaluator]:
        return {"": Evaluator(self.context.backbone(spec), COMPARED)}

    def files(self) -> dict[str, Path]:
        return super().files() | {"rcdm": self.file}

    def allowed(self) -> list[str]:
        made_with = self.rcdm.source.weights if self.rcdm.source else ""
        there = self.context.weights(self.first.spec)[0]["backbone"]
        difference = other_weights_of(f"RCDM {self.file.name}", "backbone", made_with, there)
        return [*super().allowed(), *([ALLOWED + difference] if difference else [])]

    def competitor(self, originals: Originals) -> Columns:
        """RCDM's pictures of the originals' pooled vectors, at its own resolution."""
        pixel_values, side = originals.preprocess(self.first.backbone), self.rcdm.resolution
        seeds = [torch.Generator().manual_seed(self.context.seed_of(n)) for n in originals.numbers]
        noise = torch.cat([torch.randn(1, 3, side, side, generator=seed) for seed in seeds])
        drawn = self.rcdm.sample(
            self.rcdm.vectors(self.first.backbone, pixel_values), noise, self.sampling[COMPETITOR].steps
        )
        return self.first.measure(pixel_values, drawn, originals.single)

    def conditions(self) -> dict[str, Condition]:
        return {COMPETITOR: self.competitor} | super().conditions()

    def report(self, tables: dict[str, Table]) -> Report:
        figures, conditions, side = (
            self.figures(tables),
            [UNCONDITIONAL, COMPETITOR, *self.models, ROUND_TRIP],
            self.rcdm.resolution,
        )
        sets = {
            small: [name for name in set_measures(figures[UNCONDITIONAL]) if (f"at {side} pixels" in name) == small]
            for small in (False, True)
        }
        measures = ("cosine", "cosine_pooled", "top5_match", "top1_match")
        grids = [
            by_condition(
                "At the backbone's resolution (paper Table 4)", figures, conditions, [*measures, *sets[False]], "model"
            ),
            by_condition(
                f"Both images scaled to {side} pixels, RCDM's own",
                figures,
                conditions,
                [*(NATIVE + name for name in measures), *sets[True]],
                "model",
            ),
        ]
        lines = [
            "The paper, for ResNet50: RCDM cosine 0.29 at 128 pixels and 0.16 at 224, FID 13.02 and 28.26; FeatInv 0.46"
            " and 11.49, pooled 0.12 and 31.64."
        ]
        panel = condition_panel(
            tables, [next(iter(self.tested_models)), COMPETITOR, *self.models, ROUND_TRIP, UNCONDITIONAL], self.title()
        )
        return Report(self.title(), figures, grids, lines, panels={"panel.png": panel})

    def title(self) -> str:
        return f"rcdm: {', '.join(self.models)}"
