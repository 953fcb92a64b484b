"""Several models side by side: by the layer they invert (paper Figs. 4 and 14), and judged by each other's backbones
(Table 2)."""

from __future__ import annotations

import argparse

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.feature_map import FeatInvError

from ..bench import CEILING, FLOOR, ORIGINAL, Bench, Choice, Subject
from ..judge import Judge
from ..report import Figures, Grid, Report, by_arm, cell, figures_of, set_measures, shown
from ..shards import Arm, Table
from ..spaces import Space, TimmSpace
from .base import INDEPENDENT, Suite, independent_judge, independent_name, several

MOST = 8  # layers that are compared, if a backbone has more: those of the models and the last


class Several(Suite):
    """An arm per model, with the same noise; floor and ceiling those of the first model."""

    count = 200
    default: tuple[str, ...]
    fewest = 2

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        super().__init__(bench, args)
        self.models = self.chosen()
        if len(self.models) < self.fewest:
            raise FeatInvError(f"suite {self.name} compares models; give two or more to --models")
        self.spaces = self.measured_in(next(iter(self.models.values())))
        for name, choice in self.models.items():
            self.subjects[f"{ORIGINAL} {name}"] = Subject(bench, choice, self.judges(choice), self.spaces)
            self.sampling[name] = bench.sampling(choice)
        self.first = next(iter(self.subjects.values()))
        self.sampling[FLOOR] = bench.sampling(self.first.choice)

    def chosen(self) -> dict[str, Choice]:
        """Arm -> model."""
        return dict(zip(self.args.models or self.default, several(self.args, self.default)))

    def measured_in(self, choice: Choice) -> list[Space]:
        """The spaces in which sets are compared."""
        return self.bench.spaces(choice)

    def judges(self, choice: Choice) -> dict[str, Judge]:
        raise NotImplementedError

    def arms(self) -> dict[str, Arm]:
        own = {name: self.subjects[f"{ORIGINAL} {name}"].reconstruction(self.sampling[name]) for name in self.models}
        return own | self.first.bounds(self.sampling[FLOOR])

    def figures(self, tables: dict[str, Table]) -> dict[str, Figures]:
        """All arms' figures; those of no model compare with the first one's originals."""
        first = next(iter(self.models))
        arms = [arm for arm in tables if arm not in self.subjects]
        return {arm: figures_of(tables[arm], tables[f"{ORIGINAL} {arm if arm in self.models else first}"]) for arm in arms}

    def panel(self, tables: dict[str, Table], scored: str) -> dict:
        arms = [f"{ORIGINAL} {next(iter(self.models))}", *self.models, CEILING, FLOOR]
        return {"panel.png": shown(tables, arms, f"{self.name}: {', '.join(self.models)}", scored)}


class Layers(Several):
    """Cosine at every stage of the backbone, for models that invert different layers of it."""

    name = "layers"
    default = ("tiny_cnn_last", "tiny_cnn_stage", "tiny_cnn_pooled")

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        super().__init__(bench, args)
        names = {bench.info(choice).source.backbone for choice in self.models.values()}
        if len(names) > 1:
            raise FeatInvError(f"suite layers compares models of one backbone; these have {', '.join(sorted(names))}. Use cross-model")

    def measured_in(self, choice: Choice) -> list[Space]:
        """Also that of the independent backbone, unless the user names one."""
        name = None if self.bench.space else independent_name(self.bench, choice)
        return [*super().measured_in(choice), *([TimmSpace(self.bench.named(name))] if name else [])]

    def judges(self, choice: Choice) -> dict[str, Judge]:
        backbone = self.bench.backbone(choice)
        stages = backbone.layers[1:] if len(backbone.layers) <= MOST else sorted({self.bench.info(c).source.layer for c in self.models.values()} - {LAST})
        own = {"": Judge(backbone, {f"cosine {layer}": (layer, False) for layer in (*stages, LAST)})}
        return own | independent_judge(self.bench, independent_name(self.bench, choice))

    def report(self, tables: dict[str, Table]) -> Report:
        figures, arms = self.figures(tables), [FLOOR, *self.models, CEILING]
        compared = [name for judge in self.first.judges.values() for name in judge.compared]
        inverts = [[name, (s := self.bench.info(choice).source).layer, "yes" if s.pooled else "no"] for name, choice in self.models.items()]
        grids = [
            Grid("Models", ["model", "inverts layer", "pooled"], inverts),
            by_arm("Cosine at every stage (paper Fig. 4a)", figures, arms, compared, "model"),
            by_arm("Match and distance of the sets (Fig. 4b, 4c)", figures, arms, ["top1_match", "top5_match", *set_measures(figures[FLOOR])], "model"),
            *self.by_another(figures, arms),
        ]
        return Report(f"layers of {self.first.backbone.name}", figures, grids, panels=self.panel(tables, f"cosine {LAST}"))


    def by_another(self, figures: dict[str, Figures], arms: list[str]) -> list[Grid]:
        """What a backbone says that took no part in training or sampling, where there is one."""
        if INDEPENDENT not in self.first.judges:
            return []
        names = [INDEPENDENT + name for name in ("cosine", "top1_match", "top5_match")]
        return [by_arm(f"By {self.first.judges[INDEPENDENT].backbone.name}, which took no part", figures, arms, names, "model")]


class CrossModel(Several):
    """Reconstructions from each model's features, judged by every model's backbone."""

    name = "cross-model"
    default = ("tiny_cnn_last", "tiny_vit_last")

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        super().__init__(bench, args)
        if len(self.first.judges) < 2:
            raise FeatInvError("suite cross-model needs models of two or more backbones; these share one. Use layers")

    def judges(self, choice: Choice) -> dict[str, Judge]:
        backbones = {(found := self.bench.backbone(other)).name: found for other in several(self.args, self.default)}
        return {f"{name}: ": Judge(backbone, {"cosine": (LAST, False)}) for name, backbone in backbones.items()}

    def report(self, tables: dict[str, Table]) -> Report:
        figures, judges = self.figures(tables), list(self.first.judges)
        arms = [FLOOR, *self.models, CEILING]
        grids = []
        for title, measure in (("Top-1 match (paper Table 2)", "top1_match"), ("Top-5 match (Table 2)", "top5_match"), ("Cosine, last layer", "cosine")):
            rows = [[arm, *(cell(figures[arm], judge + measure) for judge in judges)] for arm in arms]
            grids.append(Grid(title, ["conditioned on \\ evaluated by", *(judge.removesuffix(": ") for judge in judges)], rows))
        grids.append(by_arm("Distance of the sets", figures, arms, set_measures(figures[FLOOR]), "model"))
        lines = ["A judge sees the originals cut as the model's own backbone sees them, so that both pictures show the same."]
        return Report("cross-model evaluation", figures, grids, lines, panels=self.panel(tables, f"{judges[0]}cosine"))
