"""ImageNet-C's corruptions, applied on the fly (paper Sec. 4.2, Appendix C; Hendrycks and Dietterich 2019)."""

from __future__ import annotations

import argparse
import warnings
from itertools import product
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from featinv_nodes.core.feature_map import FeatInvError

from ..bench import CEILING, FLOOR, ORIGINAL, Bench
from ..judge import Columns
from ..report import Report, by_arm, figures_of, set_measures, shown
from ..shards import Arm, Table
from ..sources import Originals
from .base import Suite

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
SEEDED = ("impulse_noise", "glass_blur")  # those that take a seed; the others draw from numpy's global generator
CLEAN = "clean"
SMALLEST = 32  # pixels per side that the corruptions can be applied to


class Corruptions(Suite):
    """Reconstructions of corrupted pictures, judged by the corrupted pictures that they were drawn from."""

    name = "corruptions"
    chooses = False
    count = 32

    def __init__(self, bench: Bench, args: argparse.Namespace) -> None:
        super().__init__(bench, args)
        self.library = library()
        self.subject, how = self.one_subject(), bench.sampling(self.choice)
        if min(self.subject.backbone.input_size) < SMALLEST:
            raise FeatInvError(f"suite corruptions needs pictures of {SMALLEST} pixels a side or more; the backbone reads {self.subject.backbone.input_size}")
        self.kinds = {f"{name} {level}": (name, level) for name, level in product(args.corruptions, sorted(set(args.levels)))}
        self.sampling = dict.fromkeys([CLEAN, *self.kinds, FLOOR], how)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--corruptions", nargs="+", choices=CORRUPTIONS, default=list(CORRUPTIONS), metavar="NAME", help="which of the 19 (default: all)")
        parser.add_argument("--levels", type=int, nargs="+", choices=range(1, 6), default=[1, 5], help="severity, 1 to 5")

    def corrupted(self, kind: str) -> Arm:
        name, level = self.kinds[kind]

        def arm(originals: Originals) -> Columns:
            framed = originals.framed(self.subject.backbone)
            spoilt = torch.stack([corrupt(self.library, x, name, level, n + self.bench.seed) for x, n in zip(framed, originals.numbers)])
            drawn = self.subject.draw(spoilt, self.sampling[kind], self.subject.start(originals))
            columns = self.subject.measure(spoilt, drawn, originals.single)
            reference = {key.replace("vectors/", "reference/"): values for key, values in self.subject.vectors(spoilt).items()}
            return columns | reference | {"pictures": torch.stack([spoilt.cpu(), at_size(drawn, spoilt)], 1)}

        return arm

    def arms(self) -> dict[str, Arm]:
        clean = {CLEAN: self.subject.reconstruction(self.sampling[CLEAN])}
        return clean | {kind: self.corrupted(kind) for kind in self.kinds} | self.subject.bounds(self.sampling[FLOOR])

    def report(self, tables: dict[str, Table]) -> Report:
        arms = [FLOOR, CLEAN, *self.kinds, CEILING]
        figures = {arm: figures_of(tables[arm], tables[ORIGINAL]) for arm in arms}
        names = ["cosine", "cosine_unpooled", "top1_match", "top5_match", *set_measures(figures[CLEAN])]
        grid = by_arm("Corruptions by level (paper Figs. 15 to 18)", figures, arms, names, "corruption and level")
        lines = ["Every figure of a corruption compares with the corrupted pictures, floor, ceiling and clean with the originals."]
        pairs = {}
        for kind in self.kinds:  # its corrupted pictures above its reconstructions, as in Figs. 19 to 23
            table = tables[kind]
            pairs |= {kind: Table(pictures=table.pictures[:, 0]), f"{kind}, drawn": Table(pictures=table.pictures[:, 1], columns=table.columns)}
        return Report(self.title(), figures, [grid], lines, panels={"panel.png": shown(pairs, list(pairs), self.title())})


def library() -> ModuleType:
    """The corruptions' package. Raises FeatInvError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import imagecorruptions
    except ImportError as error:
        raise FeatInvError(f"suite corruptions needs the package imagecorruptions-imaug: pip install imagecorruptions-imaug ({error})") from error
    return imagecorruptions


def corrupt(package: ModuleType, picture: Tensor, name: str, level: int, seed: int) -> Tensor:
    """A corrupted picture [3, h, w] in 0..1, a function of the picture, the corruption and the seed."""
    array = (picture.cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        found = package.corrupt(array, level, name, **({"seed": seed} if name in SEEDED else {}))
    finally:
        np.random.set_state(state)
    return torch.from_numpy(found.astype(np.float32) / 255).permute(2, 0, 1)


def at_size(pictures: Tensor, like: Tensor) -> Tensor:
    """Pictures scaled to another batch's size, to be shown beside it."""
    if pictures.shape == like.shape:
        return pictures.cpu()
    return torch.nn.functional.interpolate(pictures.cpu(), like.shape[2:], mode="bilinear", antialias=True)
