"""Control strength against guidance scale (paper Figs. 9 to 11)."""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import torch

from featinv_nodes.core.files import read_metadata, read_tensors, write_safetensors
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file

from ...plots import matrix
from .. import paper
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..report import Report, by_condition, condition_panel, figures_of
from ..shards import Table
from .base import Suite

SHOWN = 4  # pictures of each setting in the panel of all settings


class Sweep(Suite):
    """A condition per setting, on the same pictures with the same noise."""

    name = "sweep"
    count = 32
    papers = paper.ONE_OF_EACH

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.tested = self.one_model()
        self.settings_of = {
            f"strength={s:g}, guidance={g:g}": (s, g)
            for s, g in product(sorted(set(args.strengths)), sorted(set(args.guidances)))
        }
        self.sampling = {
            condition: context.sampling(self.spec, strength=s, guidance=g)
            for condition, (s, g) in self.settings_of.items()
        }
        # whatever the file recommends, before --write-back and after it
        self.sampling[UNCONDITIONAL] = context.sampling(self.spec, strength=1.0, guidance=1.0)
        self.require_own_file()

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--strengths", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="control strengths"
        )
        parser.add_argument(
            "--guidances", type=float, nargs="+", default=[1.0, 1.75, 3.0, 5.0, 8.0], help="guidance scales"
        )
        parser.add_argument(
            "--write-back",
            action="store_true",
            help="make the setting of the highest cosine the file's recommended one",
        )

    def report(self, tables: dict[str, Table]) -> Report:
        figures = {
            condition: figures_of(tables[condition], tables[ORIGINAL])
            for condition in (*self.settings_of, UNCONDITIONAL, ROUND_TRIP)
        }
        scored = [
            (self.score, "cosine"),
            *([] if self.tested.evaluators[""].no_match else [("top1_match", "top-1 match")]),
        ]
        highest = {
            name: max(self.settings_of, key=lambda condition, name=name: figures[condition][name]["value"])
            for name, _ in scored
        }
        best = highest[self.score]
        strengths, guidances = (sorted({pair[k] for pair in self.settings_of.values()}) for k in (0, 1))
        panels = {}
        for name, title in scored:
            values = torch.tensor(
                [[figures[f"strength={s:g}, guidance={g:g}"][name]["value"] for g in guidances] for s in strengths]
            )
            panels[f"{name}.png"] = matrix(
                values,
                [f"strength {s:g}" for s in strengths],
                [f"guid. {g:g}" for g in guidances],
                f"{title}, {self.args.model}",
            )
        panels["panel.png"] = condition_panel(
            tables,
            list(dict.fromkeys([ORIGINAL, *highest.values(), ROUND_TRIP, UNCONDITIONAL])),
            self.title(),
            self.score,
        )
        panels["settings.png"] = condition_panel(
            tables, [ORIGINAL, *self.settings_of], f"{self.title()}: all settings (Fig. 9)", self.score, SHOWN
        )
        lines = [
            f"Highest {', highest '.join(f'{title} at {highest[name]}' for name, title in scored)}: the best of"
            f" {len(self.settings_of)} settings on these images, whose figures are therefore too favourable; measure"
            " the chosen one on others."
        ]
        if self.args.write_back:
            self.best = best
            lines.append(f"{self.args.model} now recommends {best}.")
        grid = by_condition(
            "All settings",
            figures,
            [UNCONDITIONAL, *self.settings_of, ROUND_TRIP],
            [self.score, "top1_match", "top5_match"],
            "setting",
        )
        return Report(
            self.title(),
            figures,
            [grid],
            lines,
            {"best": dict(zip(("strength", "guidance"), self.settings_of[best]))},
            panels,
        )

    def afterwards(self) -> None:
        if self.args.write_back:
            recommend(model_file(self.args.model), *self.settings_of[self.best])


def recommend(file: Path, strength: float | None = None, guidance: float | None = None, **settings) -> None:
    """Writes a weights file again with other recommended settings and everything else as it was, whole or not at all.
    None leaves strength or guidance alone; settings: further fields of Sampling."""
    read_info(file)  # refuses what is no weights file
    metadata = read_metadata(file)
    about = json.loads(metadata["featinv"])
    about["recommended"] |= {
        k: v for k, v in (("strength", strength), ("guidance", guidance)) if v is not None
    } | settings
    write_safetensors(file, read_tensors(file), metadata | {"featinv": json.dumps(about)})
