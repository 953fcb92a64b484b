"""Prints a table of docs/feature-spaces.md: how many pairs a linear map needs, with and without negative values.

    OMP_NUM_THREADS=1 python training/experiments/measure_linear_maps.py

Drawn scenes, tiny-cnn, last layer. The maps are measured on 64 scenes that they were not fitted to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.linear_maps import KINDS, LinearMap, figures, from_pairs, measure
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training.spaces.changes import change_of

CHANGE, HELD_OUT = "hue:120", 64
PAIRS = (4, 8, 16, 64, 256)


def cell(linear: LinearMap, before: FeatureMap, after: FeatureMap) -> str:
    """The cosine of mapped maps and their share of the change."""
    values = figures(measure(linear, before, after, after.values.mean((0, 2, 3))))
    return f"{values['cosine_mapped']['value']:.3f}, {values['explained']['value']:.2f} of the change"


def row(name: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    backbone = open_backbone("tiny-cnn")
    pictures = backbone.preprocess(draw(0, torch.arange(HELD_OUT + max(PAIRS)), "held-out").image)
    before, after = (backbone.extract(x) for x in (pictures, change_of(CHANGE)(pictures).clamp(0, 1)))
    own = [m.select(slice(0, HELD_OUT)) for m in (before, after)]
    unchanged = measure(from_pairs(*own, "direction"), *own, own[1].values.mean((0, 2, 3)))["cosine_before"].mean()
    print(f"{CHANGE}, cosine {unchanged:.3f} without a map\n", row("pairs", KINDS), "|---" * 4 + "|", sep="\n")
    for count in PAIRS:
        pairs = [m.select(slice(HELD_OUT, HELD_OUT + count)) for m in (before, after)]
        maps = [from_pairs(*pairs, kind) for kind in KINDS]
        print(row(str(count), (cell(linear, *own) for linear in maps)))
    print(row(f"{count}, values below 0 kept", (cell(replace(linear, low=None), *own) for linear in maps)))


if __name__ == "__main__":
    main()
