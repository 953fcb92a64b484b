"""ImageNet-C's corruptions, applied on the fly (paper Sec. 4.2, Appendix C; Hendrycks and Dietterich 2019)."""

from __future__ import annotations

import argparse
import warnings
from itertools import product
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError

from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..evaluator import Columns
from ..report import Report, by_condition, condition_panel, figures_of, set_measures
from ..shards import Condition, Table
from ..sources import Originals
from .base import Suite

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)
SEEDED = ("impulse_noise", "glass_blur")  # those that take a seed; the others draw from numpy's global generator
CLEAN = "clean"
SMALLEST = 32  # pixels per side that the corruptions can be applied to


class Corruptions(Suite):
    """Reconstructions of corrupted pictures, compared with the corrupted pictures that they were drawn from."""

    name = "corruptions"
    chooses = False
    count = 32

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.library = library()
        self.tested, sampling = self.one_model(), context.sampling(self.spec)
        if min(self.tested.backbone.input_size) < SMALLEST:
            raise FeatInvError(
                f"suite corruptions needs images of {SMALLEST} pixels a side or more; the backbone reads"
                f" {self.tested.backbone.input_size}"
            )
        self.kinds = {
            f"{name} {level}": (name, level) for name, level in product(args.corruptions, sorted(set(args.levels)))
        }
        self.sampling = dict.fromkeys([CLEAN, *self.kinds, UNCONDITIONAL], sampling)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--corruptions",
            nargs="+",
            choices=CORRUPTIONS,
            default=list(CORRUPTIONS),
            metavar="NAME",
            help="which of the 19 (default: all)",
        )
        parser.add_argument(
            "--levels", type=int, nargs="+", choices=range(1, 6), default=[1, 5], help="severity, 1 to 5"
        )

    def corrupted(self, kind: str) -> Condition:
        """Reconstructions of the pictures with one corruption at one level."""
        name, level = self.kinds[kind]

        def condition(originals: Originals) -> Columns:
            pixel_values = originals.preprocess(self.tested.backbone)
            spoilt = torch.stack(
                [
                    corrupt(self.library, x, name, level, n + self.context.seed)
                    for x, n in zip(pixel_values, originals.numbers)
                ]
            )
            drawn = self.tested.draw(spoilt, self.sampling[kind], self.tested.start(originals))
            columns = self.tested.measure(spoilt, drawn, originals.single)
            reference = {
                key.replace("vectors/", "reference/"): values
                for key, values in self.tested.vectors(spoilt, True).items()
            }
            return columns | reference | {"pictures": torch.stack([spoilt.cpu(), at_size(drawn, spoilt)], 1)}

        return condition

    def conditions(self) -> dict[str, Condition]:
        clean = {CLEAN: self.tested.reconstruction(self.sampling[CLEAN])}
        return (
            clean
            | {kind: self.corrupted(kind) for kind in self.kinds}
            | self.tested.bounds(self.sampling[UNCONDITIONAL])
        )

    def report(self, tables: dict[str, Table]) -> Report:
        conditions = [UNCONDITIONAL, CLEAN, *self.kinds, ROUND_TRIP]
        figures = {condition: figures_of(tables[condition], tables[ORIGINAL]) for condition in conditions}
        names = ["cosine", "cosine_unpooled", "top1_match", "top5_match", *set_measures(figures[CLEAN])]
        grid = by_condition(
            "Corruptions by level (paper Figs. 15 to 18)", figures, conditions, names, "corruption and level"
        )
        lines = [
            "Every figure of a corruption compares with the corrupted images; unconditional, round trip and clean"
            " with the originals."
        ]
        pairs = {}
        for kind in self.kinds:  # its corrupted pictures above its reconstructions, as in Figs. 19 to 23
            table = tables[kind]
            pairs |= {
                kind: Table(pictures=table.pictures[:, 0]),
                f"{kind}, drawn": Table(pictures=table.pictures[:, 1], columns=table.columns),
            }
        return Report(
            self.title(),
            figures,
            [grid],
            lines,
            panels={"panel.png": condition_panel(pairs, list(pairs), self.title())},
        )


def library() -> ModuleType:
    """The corruptions' package. Raises FeatInvError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import imagecorruptions
    except ImportError as error:
        raise FeatInvError(
            f"suite corruptions needs the package imagecorruptions-imaug: pip install imagecorruptions-imaug ({error})"
        ) from error
    return imagecorruptions


def corrupt(package: ModuleType, picture: Tensor, name: str, level: int, seed: int) -> Tensor:
    """A corrupted picture [3, h, w] in 0..1, a function of the picture, the corruption and the seed."""
    array = (picture.cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        spoilt = package.corrupt(array, level, name, **({"seed": seed} if name in SEEDED else {}))
    finally:
        np.random.set_state(state)
    return torch.from_numpy(spoilt.astype(np.float32) / 255).permute(2, 0, 1)


def at_size(pictures: Tensor, like: Tensor) -> Tensor:
    """Pictures scaled to another batch's size, to be shown beside it."""
    if pictures.shape == like.shape:
        return pictures.cpu()
    return torch.nn.functional.interpolate(pictures.cpu(), like.shape[2:], mode="bilinear", antialias=True)
