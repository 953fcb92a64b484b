"""Beside RCDM, which inverts pooled vectors with a diffusion model in pixel space (paper Table 4, Appendix A.5)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.tiny_world import open_backbone

from ...pipeline import Sampling
from ..bench import CEILING, FLOOR, ORIGINAL, Bench, own_judge
from ..judge import Columns, Judge
from ..rcdm import load_rcdm
from ..report import Report, by_arm, figures_of, set_measures, shown
from ..shards import Arm, Table
from ..sources import Originals
from .base import Suite

RECONSTRUCTION, COMPETITOR, NATIVE = "reconstruction", "RCDM", "native: "


class BesideRCDM(Suite):
    """RCDM's pictures and the model's, at the backbone's resolution and at RCDM's own."""

    name = "rcdm"

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        super().__init__(bench, args)
        if not args.rcdm:
            raise FeatInvError("suite rcdm needs a checkpoint of RCDM: --rcdm FILE; the embedded world has none")
        self.rcdm = load_rcdm(args.rcdm).to(bench.device)
        self.subject = self.one_subject()
        source = bench.info(self.choice).source
        if source.layer != LAST or source.channels != self.rcdm.channels:
            raise FeatInvError(f"--rcdm {args.rcdm} reads vectors of {self.rcdm.channels} channels of the last layer; {args.model} inverts {source.describe()}")
        small = open_backbone(self.choice.backbone or source.backbone, self.choice.backbone_weights, self.rcdm.resolution).to(bench.device)
        self.subject.judges = {"": own_judge(bench, self.choice), NATIVE: Judge(small, {"cosine": (LAST, False)})}
        how = bench.sampling(self.choice)
        self.sampling = {RECONSTRUCTION: how, FLOOR: how, COMPETITOR: Sampling(args.rcdm_steps, 1.0, 1.0)}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rcdm", help="checkpoint in the published layout, as rcdm_ema_supervised.pt")
        parser.add_argument("--rcdm-steps", type=int, default=100, help="its DDIM steps")

    def files(self) -> dict[str, Path]:
        return super().files() | {"rcdm": Path(self.args.rcdm)}

    def vectors(self, framed: Tensor) -> Tensor:
        """[B, C] what RCDM is conditioned on: the backbone's averaged last map of pictures that are scaled to -1..1,
        whatever mean and spread the backbone itself is used with; so its authors trained it."""
        backbone = self.subject.backbone
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
        with torch.inference_mode():
            return backbone.values((2 * framed.cpu() - 1) * std + mean, LAST, True).flatten(1)

    def competitor(self, originals: Originals) -> Columns:
        framed, side = originals.framed(self.subject.backbone), self.rcdm.resolution
        seeds = [torch.Generator().manual_seed(n + self.bench.seed) for n in originals.numbers]
        noise = torch.cat([torch.randn(1, 3, side, side, generator=seed) for seed in seeds])
        drawn = self.rcdm.sample(self.vectors(framed), noise, self.sampling[COMPETITOR].steps)
        return self.subject.measure(framed, drawn, originals.single)

    def arms(self) -> dict[str, Arm]:
        return {COMPETITOR: self.competitor, RECONSTRUCTION: self.subject.reconstruction(self.sampling[RECONSTRUCTION]), **self.subject.bounds()}

    def report(self, tables: dict[str, Table]) -> Report:
        arms = [FLOOR, COMPETITOR, RECONSTRUCTION, CEILING]
        figures = {arm: figures_of(tables[arm], tables[ORIGINAL]) for arm in arms}
        side = self.rcdm.resolution
        measures = ("cosine", "top5_match", "top1_match")
        grids = [
            by_arm("At the backbone's resolution (paper Table 4)", figures, arms, ["cosine_unpooled", *measures, *set_measures(figures[FLOOR])], "model"),
            by_arm(f"Both pictures scaled to {side} pixels, RCDM's own", figures, arms, [NATIVE + name for name in measures], "model"),
        ]
        lines = ["The paper, for ResNet50: RCDM cosine 0.29 at 128 pixels and 0.16 at 224, FID 13.02 and 28.26; FeatInv 0.46 and 11.49, pooled 0.12 and 31.64."]
        panel = shown(tables, [ORIGINAL, RECONSTRUCTION, COMPETITOR, CEILING, FLOOR], self.title())
        return Report(self.title(), figures, grids, lines, panels={"panel.png": panel})
