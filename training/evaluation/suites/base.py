"""What a suite is: a row of the paper, as conditions to be recorded and a report made of their records."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import find_world, model_file

from .. import paper
from ..context import ORIGINAL, UNCONDITIONAL, EvalContext, ModelSpec, ModelUnderTest, own_evaluator
from ..evaluator import Evaluator, deepest
from ..report import Report
from ..shards import Condition, Table

INDEPENDENT = "independent: "  # prefix of the figures of a backbone that took no part in training or sampling


class Suite:
    """count: pictures of the drawn world where the user does not say. papers: the paper's pictures, with --paper.

    sampling: condition -> how its pictures are drawn, for results.json. tested_models: the condition of a model's
    originals -> the model under test. A suite fills both in its constructor and offers a report.
    """

    name: str
    count = 500
    papers = paper.TEN_OF_EACH
    chooses = True  # whether --best-of counts

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        self.context, self.args = context, args
        self.sampling: dict[str, Sampling] = {}
        self.tested_models: dict[str, ModelUnderTest] = {}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the suite's own options, if it has any; all of them are settings of its figures."""

    def conditions(self) -> dict[str, Condition]:
        """A reconstruction for each sampling, and the bounds; other suites say otherwise."""
        tested = self.tested_models[ORIGINAL]
        return {
            condition: tested.reconstruction(sampling)
            for condition, sampling in self.sampling.items()
            if condition != UNCONDITIONAL
        } | tested.bounds(self.sampling[UNCONDITIONAL])

    def report(self, tables: dict[str, Table]) -> Report:
        raise NotImplementedError

    def afterwards(self) -> None:
        """What is left to do once the report is written."""

    def all_conditions(self) -> dict[str, Condition]:
        """The originals' conditions first: the evaluators' centres come from their records."""
        return {name: tested.original for name, tested in self.tested_models.items()} | self.conditions()

    def centre(self, tables: dict[str, Table]) -> None:
        for name, tested in self.tested_models.items():
            tested.centre(tables[name])

    def files(self) -> dict[str, Path]:
        """The weights under test; the report's digests are theirs."""
        return {tested.spec.model: model_file(tested.spec.model) for tested in self.tested_models.values()}

    def weight_digests(self) -> dict[str, str]:
        """Digests of the backbones and base models that are open and of the other networks that measure, for the
        report. Raises FeatInvError where they are not those that a file was made with, unless that is allowed."""
        specs = [tested.spec for tested in self.tested_models.values()]
        return {
            f"{part} of {spec.model}": value
            for spec in dict.fromkeys(specs)
            for part, value in self.context.weights(spec)[0].items()
        } | self.context.further_digests()

    def allowed(self) -> list[str]:
        """A sentence for each of them that is allowed though it is another than its file's."""
        specs = dict.fromkeys(tested.spec for tested in self.tested_models.values())
        return [sentence for spec in specs for sentence in self.context.weights(spec)[1]]

    def settings(self) -> dict:
        return {condition: asdict(sampling) for condition, sampling in self.sampling.items()}

    @property
    def spec(self) -> ModelSpec:
        """The model of --model."""
        a = self.args
        return ModelSpec(a.model, a.base, a.backbone_weights, a.backbone, a.other_weights)

    @property
    def score(self) -> str:
        """The cosine by which settings are chosen: the unpooled map's, as in the paper, whatever the model inverts."""
        return "cosine_unpooled" if self.context.info(self.spec).source.pooled else "cosine"

    def require_own_file(self) -> None:
        """Raises FeatInvError for --write-back to a shipped model."""
        if self.args.write_back and not Path(self.args.model).is_file():
            raise FeatInvError(
                f"--write-back changes the model's file; {self.args.model} is a shipped model, copy its file and name"
                " the copy"
            )

    def one_model(self, subset: list[int] | None = None) -> ModelUnderTest:
        """The model of --model, evaluated by its own backbone."""
        evaluator = own_evaluator(self.context, self.spec, subset)
        tested = ModelUnderTest(self.context, self.spec, {"": evaluator}, self.context.spaces(self.spec))
        self.tested_models[ORIGINAL] = tested
        return tested

    def require_imagenet(self) -> None:
        """Raises FeatInvError for a backbone without ImageNet-1k's classes."""
        if (classes := self.context.backbone(self.spec).num_classes) != 1000:
            raise FeatInvError(
                f"suite {self.name} needs a backbone with ImageNet-1k's 1000 classes; {self.args.model}'s has"
                f" {classes}. Use suite ood"
            )

    def no_match(self) -> list[str]:
        """A sentence for each backbone by which there is no match of classes."""
        evaluators = [evaluator for tested in self.tested_models.values() for evaluator in tested.evaluators.values()]
        return list(dict.fromkeys(f"No match of classes: {e.no_match}." for e in evaluators if e.no_match))

    def departures(self, count: int) -> list[str]:
        """With --paper, what still differs from the paper's set-up, a sentence each."""
        if not self.context.papers:
            return []
        tested = next(iter(self.tested_models.values()))
        info, base = self.context.info(tested.spec), self.context.open(tested.spec).base
        set_to = asdict(paper.sampling(info.source.pooled))
        changed = [
            f"{name} is {value} here; --paper sets {set_to[name]}."
            for name, value in self.context.changes.items()
            if value is not None and value != set_to[name]
        ]
        return changed + paper.departures(info.source, base, count, self.args.data, self.papers)

    def sets(self) -> str:
        """How pictures are compared as sets, in words."""
        tested = next(iter(self.tested_models.values()))
        side = self.context.set_side(tested.sized_by)
        jpeg = "; the originals as JPEG" if self.context.papers else ""
        return f"compared at {side} x {side} pixels, {self.context.resize}, antialiased{jpeg}"

    def title(self) -> str:
        return f"{self.name}: {self.args.model}, {self.context.info(self.spec).source.describe()}"


def several(args: argparse.Namespace, default: tuple[str, ...]) -> list[ModelSpec]:
    """The models of --models, each FILE or FILE=BACKBONE with a timm-hub folder; --backbone-weights for those
    without."""
    pairs = [(text, "", "") if Path(text).is_file() else text.partition("=") for text in args.models or default]
    return [
        ModelSpec(file, args.base, None if folder else args.backbone_weights, folder or None, args.other_weights)
        for file, _, folder in pairs
    ]


def independent_name(context: EvalContext, spec: ModelSpec) -> str | None:
    """The backbone that took no part in a shipped model's training, by its embedded name; None for other models."""
    info = context.info(spec)
    world = find_world(info.base["name"])
    return world.independent.get(info.source.backbone) if world else None


def independent_evaluator(context: EvalContext, name: str | None) -> dict[str, Evaluator]:
    """Its evaluator, by its last layer; none without a name."""
    return {INDEPENDENT: last_evaluator(context.named(name))} if name else {}


def last_evaluator(backbone: Backbone) -> Evaluator:
    """A backbone by its last layer, or where its head reads several maps by the last that timm names."""
    return Evaluator(backbone, {"cosine": (deepest(backbone), False)})
