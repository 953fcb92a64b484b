"""Several models side by side: by the layer they invert (paper Figs. 4 and 14), and evaluated by each other's backbones
(Table 2)."""

from __future__ import annotations

import argparse

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError

from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext, ModelSpec, ModelUnderTest
from ..evaluator import Evaluator, deepest
from ..report import Figures, Grid, Report, by_condition, cell, condition_panel, figures_of, set_measures
from ..shards import Condition, Table
from ..spaces import Space, TimmSpace
from .base import INDEPENDENT, Suite, independent_evaluator, independent_name, last_evaluator, several

UNDER = (
    "Under each image: its cosine on the map that its model inverts, unpooled, by that model's own backbone; the"
    " first model's under round trip and unconditional."
)
MOST = 8  # layers that are compared, if a backbone has more: those of the models and the last


class Several(Suite):
    """A condition per model, with the same noise; unconditional baseline and round trip those of the first model."""

    count = 200
    default: tuple[str, ...]
    fewest = 2

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.models = self.chosen()
        if len(self.models) < self.fewest:
            raise FeatInvError(f"suite {self.name} compares models; give two or more to --models")
        self.spaces = self.measured_in(next(iter(self.models.values())))
        for name, spec in self.models.items():
            self.tested_models[f"{ORIGINAL} {name}"] = ModelUnderTest(context, spec, self.evaluators(spec), self.spaces)
            self.sampling[name] = context.sampling(spec)
        self.first = next(iter(self.tested_models.values()))
        for tested in self.tested_models.values():
            tested.sized_by = self.first.spec
        self.sampling[UNCONDITIONAL] = context.sampling(self.first.spec)

    def chosen(self) -> dict[str, ModelSpec]:
        """Condition -> model."""
        return dict(zip(self.args.models or self.default, several(self.args, self.default)))

    def measured_in(self, spec: ModelSpec) -> list[Space]:
        """The spaces in which sets are compared."""
        return self.context.spaces(spec)

    def evaluators(self, spec: ModelSpec) -> dict[str, Evaluator]:
        raise NotImplementedError

    def conditions(self) -> dict[str, Condition]:
        own = {
            name: self.tested_models[f"{ORIGINAL} {name}"].reconstruction(self.sampling[name]) for name in self.models
        }
        return own | self.first.bounds(self.sampling[UNCONDITIONAL])

    def figures(self, tables: dict[str, Table]) -> dict[str, Figures]:
        """All conditions' figures; those of no model compare with the first one's originals."""
        first = next(iter(self.models))
        conditions = [condition for condition in tables if condition not in self.tested_models]
        return {
            condition: figures_of(
                tables[condition], tables[f"{ORIGINAL} {condition if condition in self.models else first}"]
            )
            for condition in conditions
        }

    def own_cosine(self, spec: ModelSpec) -> str:
        """The column of the cosine on the map that a model inverts, by its own backbone; a pooled model's unpooled."""
        raise NotImplementedError

    def panel(self, tables: dict[str, Table]) -> dict:
        """Under each picture the cosine on its own model's map (paper Figs. 3 and 14), the first one's under the
        others."""
        conditions = [f"{ORIGINAL} {next(iter(self.models))}", *self.models, ROUND_TRIP, UNCONDITIONAL]
        scored = {name: self.own_cosine(spec) for name, spec in self.models.items()}
        scored |= dict.fromkeys((ROUND_TRIP, UNCONDITIONAL), next(iter(scored.values())))
        return {"panel.png": condition_panel(tables, conditions, f"{self.name}: {', '.join(self.models)}", scored)}


class Layers(Several):
    """Cosine at every stage of the backbone, for models that invert different layers of it."""

    name = "layers"
    default = ("tiny_cnn_last", "tiny_cnn_stage", "tiny_cnn_pooled")

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        names = {context.info(spec).source.backbone for spec in self.models.values()}
        if len(names) > 1:
            raise FeatInvError(
                f"suite layers compares models of one backbone; these have {', '.join(sorted(names))}. Use cross-model"
            )

    def measured_in(self, spec: ModelSpec) -> list[Space]:
        """Also that of the independent backbone, unless the user names one."""
        name = None if self.context.space else independent_name(self.context, spec)
        return [*super().measured_in(spec), *([TimmSpace(self.context.named(name))] if name else [])]

    def evaluators(self, spec: ModelSpec) -> dict[str, Evaluator]:
        backbone = self.context.backbone(spec)
        stages = (
            backbone.layers[1:]
            if len(backbone.layers) <= MOST
            else sorted({self.context.info(c).source.layer for c in self.models.values()} - {LAST})
        )
        last = deepest(backbone)
        layers = [layer for layer in stages if layer != last] + [last]
        own = {"": Evaluator(backbone, {f"cosine {layer}": (layer, False) for layer in layers})}
        return own | independent_evaluator(self.context, independent_name(self.context, spec))

    def report(self, tables: dict[str, Table]) -> Report:
        figures, conditions = self.figures(tables), [UNCONDITIONAL, *self.models, ROUND_TRIP]
        compared = [name for evaluator in self.first.evaluators.values() for name in evaluator.compared]
        inverts = [
            [name, (s := self.context.info(spec).source).layer, "yes" if s.pooled else "no"]
            for name, spec in self.models.items()
        ]
        grids = [
            Grid("Models", ["model", "inverts layer", "pooled"], inverts),
            by_condition("Cosine at every stage (paper Fig. 4a)", figures, conditions, compared, "model"),
            by_condition(
                "Match and distance of the sets (Fig. 4b, 4c)",
                figures,
                conditions,
                ["top1_match", "top5_match", *set_measures(figures[UNCONDITIONAL])],
                "model",
            ),
            *self.by_another(figures, conditions),
        ]
        return Report(
            f"layers of {self.first.backbone.name}",
            figures,
            grids,
            [UNDER],
            panels=self.panel(tables),
        )

    def own_cosine(self, spec: ModelSpec) -> str:
        layer, last = self.context.info(spec).source.layer, deepest(self.first.backbone)
        own = f"cosine {layer}"
        return own if own in self.first.evaluators[""].compared else f"cosine {last}"

    def by_another(self, figures: dict[str, Figures], conditions: list[str]) -> list[Grid]:
        """What a backbone says that took no part in training or sampling, where there is one."""
        if INDEPENDENT not in self.first.evaluators:
            return []
        names = [INDEPENDENT + name for name in ("cosine", "top1_match", "top5_match")]
        return [
            by_condition(
                f"By {self.first.evaluators[INDEPENDENT].backbone.name}, which took no part",
                figures,
                conditions,
                names,
                "model",
            )
        ]


class CrossModel(Several):
    """Reconstructions from each model's features, evaluated by every model's backbone."""

    name = "cross-model"
    default = ("tiny_cnn_last", "tiny_vit_last")

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        if len(self.first.evaluators) < 2:
            raise FeatInvError("suite cross-model needs models of two or more backbones; these share one. Use layers")

    def evaluators(self, spec: ModelSpec) -> dict[str, Evaluator]:
        backbones = {
            (backbone := self.context.backbone(other)).name: backbone for other in several(self.args, self.default)
        }
        return {f"{name}: ": last_evaluator(backbone) for name, backbone in backbones.items()}

    def report(self, tables: dict[str, Table]) -> Report:
        figures, evaluators = self.figures(tables), list(self.first.evaluators)
        conditions = [UNCONDITIONAL, *self.models, ROUND_TRIP]
        grids = []
        for title, measure in (
            ("Top-1 match (paper Table 2)", "top1_match"),
            ("Top-5 match (Table 2)", "top5_match"),
            ("Cosine, last layer", "cosine"),
        ):
            rows = [
                [condition, *(cell(figures[condition], evaluator + measure) for evaluator in evaluators)]
                for condition in conditions
            ]
            grids.append(
                Grid(
                    title,
                    ["conditioned on \\ evaluated by", *(evaluator.removesuffix(": ") for evaluator in evaluators)],
                    rows,
                )
            )
        grids.append(
            by_condition("Distance of the sets", figures, conditions, set_measures(figures[UNCONDITIONAL]), "model")
        )
        lines = [
            "An evaluator sees the originals cut as the model's own backbone sees them, so that both images show the"
            " same.",
            UNDER,
        ]
        return Report("cross-model evaluation", figures, grids, lines, panels=self.panel(tables))

    def own_cosine(self, spec: ModelSpec) -> str:
        return f"{self.context.backbone(spec).name}: cosine"
