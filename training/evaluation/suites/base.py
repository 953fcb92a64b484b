"""What a suite is: a row of the paper, as arms to be recorded and a report made of their records."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import find_world, model_file

from ..bench import FLOOR, ORIGINAL, Bench, Choice, Subject, own_judge
from ..judge import Judge
from ..report import Report
from ..shards import Arm, Table

INDEPENDENT = "independent: "  # prefix of the figures of a backbone that took no part in training or sampling


class Suite:
    """count: pictures of the drawn world where the user does not say.

    sampling: arm -> how its pictures are drawn, for results.json. subjects: the arm of a model's originals -> the model
    under judgement. A suite fills both in its constructor and offers a report.
    """

    name: str
    count = 500
    chooses = True  # whether --best-of counts

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        self.bench, self.args = bench, args
        self.sampling: dict[str, Sampling] = {}
        self.subjects: dict[str, Subject] = {}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the suite's own options, if it has any; all of them are settings of its figures."""

    def arms(self) -> dict[str, Arm]:
        """A reconstruction for each sampling, and the bounds; other suites say otherwise."""
        subject = self.subjects[ORIGINAL]
        return {arm: subject.reconstruction(how) for arm, how in self.sampling.items() if arm != FLOOR} | subject.bounds(self.sampling[FLOOR])

    def report(self, tables: dict[str, Table]) -> Report:
        raise NotImplementedError

    def afterwards(self) -> None:
        """What is left to do once the report is written."""

    def all_arms(self) -> dict[str, Arm]:
        """The originals' arms first: the judges' centres come from their records."""
        return {name: subject.original for name, subject in self.subjects.items()} | self.arms()

    def centre(self, tables: dict[str, Table]) -> None:
        for name, subject in self.subjects.items():
            subject.centre(tables[name])

    def files(self) -> dict[str, Path]:
        """The weights under judgement."""
        return {subject.choice.model: model_file(subject.choice.model) for subject in self.subjects.values()}

    def settings(self) -> dict:
        return {arm: asdict(how) for arm, how in self.sampling.items()}

    @property
    def choice(self) -> Choice:
        """The model of --model."""
        a = self.args
        return Choice(a.model, a.base, a.backbone_weights, a.backbone)

    @property
    def score(self) -> str:
        """The cosine by which settings are chosen: the unpooled map's, as in the paper, whatever the model inverts."""
        return "cosine_unpooled" if self.bench.info(self.choice).source.pooled else "cosine"

    def require_own_file(self) -> None:
        """Raises FeatInvError for --write-back to a shipped model."""
        if self.args.write_back and not Path(self.args.model).is_file():
            raise FeatInvError(f"--write-back changes the model's file; {self.args.model} is a shipped model, copy its file and name the copy")

    def one_subject(self, subset: list[int] | None = None) -> Subject:
        """The model of --model, judged by its own backbone."""
        judge = own_judge(self.bench, self.choice, subset)
        subject = Subject(self.bench, self.choice, {"": judge}, self.bench.spaces(self.choice))
        self.subjects[ORIGINAL] = subject
        return subject

    def require_imagenet(self) -> None:
        """Raises FeatInvError for a backbone without ImageNet-1k's classes."""
        if (classes := self.bench.backbone(self.choice).model.num_classes) != 1000:
            raise FeatInvError(f"suite {self.name} needs a backbone with ImageNet-1k's 1000 classes; {self.args.model}'s has {classes}. Use suite ood")

    def title(self) -> str:
        return f"{self.name}: {self.args.model}, {self.bench.info(self.choice).source.describe()}"


def several(args: argparse.Namespace, default: tuple[str, ...]) -> list[Choice]:
    """The models of --models, each FILE or FILE=BACKBONE with a timm-hub folder; --backbone-weights for those without."""
    pairs = [(text, "", "") if Path(text).is_file() else text.partition("=") for text in args.models or default]
    return [Choice(file, args.base, None if folder else args.backbone_weights, folder or None) for file, _, folder in pairs]


def independent_name(bench: Bench, choice: Choice) -> str | None:
    """The backbone that took no part in a shipped model's training, by its embedded name; None for other models."""
    info = bench.info(choice)
    world = find_world(info.base["name"])
    return world.independent.get(info.source.backbone) if world else None


def independent_judge(bench: Bench, name: str | None) -> dict[str, Judge]:
    """Its judge, by its last layer; none without a name."""
    return {INDEPENDENT: Judge(bench.named(name), {"cosine": (LAST, False)})} if name else {}
