"""Runs the embedded world's evaluation and writes its tables into docs/evaluation.md.

    python training/evaluation_page.py                        everything; what is done already is not done again
    python training/evaluation_page.py --only rcdm layers     some of it
    python training/evaluation_page.py --count 8 --out out/trial --page out/trial/page.md     a trial on few scenes

A run is one call of training/evaluate.py with its records in OUT/NAME. The page's tables stand between the lines
<!-- NAME --> and <!-- end NAME -->; all other lines are left alone. What is concluded from the tables is written by hand:
read it again when figures have changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featinv_nodes.core.feature_map import FeatInvError
from training import evaluate
from training.cli import make_folder, run, write_text
from training.evaluation.page import PANELS, TABLES
from training.evaluation.suites.corruptions import library

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"


@dataclass(frozen=True)
class Run:
    """A call of evaluate.py: suite, number of scenes, further options."""

    suite: str
    count: int
    options: str = ""

    def words(self, count: int | None) -> list[str]:
        return ["--suite", self.suite, "--count", str(count or self.count), *self.options.split()]


RUNS = {
    "corruptions": Run("corruptions", 50),  # first, as it needs a package that may not be there
    "quality": Run("quality", 500),
    "layers": Run("layers", 500),
    "layers-vit": Run("layers", 500, "--models tiny_cnn_last tiny_cnn_stage --space tiny-vit"),
    "cross-model": Run("cross-model", 500),
    "rcdm": Run("rcdm", 500),
    "sweep": Run("sweep", 100, "--gradient 0"),
    "sweep-pooled": Run("sweep", 100, "--model tiny_cnn_pooled --gradient 0"),
    "mixing": Run("mixing", 200),
    "variability": Run("variability", 100),
    "variability-pooled": Run("variability", 100, "--model tiny_cnn_pooled"),
    "guidances": Run("guidances", 500, "--guidances 1 1.25 1.5 2 3 --text-guidances 0 1 2 --gradient 0"),
    "cost": Run("cost", 500),
}


def block(found: dict, command: list[str], table: Callable[[dict], list[str]]) -> str:
    """The lines of a run in the page: its command, number of scenes, tables."""
    return "\n".join([f"`python training/evaluate.py {' '.join(command)}` (n = {found['count']})", "", *table(found)])


def fill(text: str, name: str, lines: str) -> str:
    """The page with other lines between a run's marks. Raises FeatInvError for a page without them."""
    head, first, rest = text.partition(f"<!-- {name} -->\n")
    _, last, tail = rest.partition(f"<!-- end {name} -->\n")
    if not first or not last:
        raise FeatInvError(f"the page has no lines <!-- {name} --> and <!-- end {name} -->; put them where the tables of {name} belong")
    return f"{head}{first}\n{lines}\n\n{last}{tail}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--count", type=int, help="scenes in every run (default: each its own number)")
    parser.add_argument("--options", default="", help="further options of every run, in one word, as '--batch 64'")
    parser.add_argument("--out", type=Path, default=Path("out/evaluate"), help="folder of the records")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write; copied from the project's own if it is not there")
    args = parser.parse_args(argv)
    make_folder(args.page.parent)
    if args.count is not None and args.count < 8:
        raise FeatInvError(f"--count {args.count}: the panels show eight scenes; give at least as many")
    text = (args.page if args.page.is_file() else PAGE).read_text()
    for name in args.only:
        fill(text, name, "")  # before any work
    if "corruptions" in args.only:
        library()
    for name in args.only:
        command = RUNS[name].words(args.count)
        evaluate.main([*command, *args.options.split(), "--out", str(args.out / name)])
        found = json.loads((args.out / name / "results.json").read_text())
        text = fill(text, name, block(found, command, TABLES[name]))
        write_text(args.page, text)
        for there, here in PANELS.get(name, {}).items():
            shutil.copyfile(args.out / name / there, args.page.with_name(here))


if __name__ == "__main__":
    run(main)
