"""Runs the worlds' evaluation and writes its tables into docs/evaluation.md, docs/photographs.md and docs/methods.md.

    python training/experiments/evaluation_page.py                        everything that is not yet done
    python training/experiments/evaluation_page.py --only rcdm layers     some of it
    python training/experiments/evaluation_page.py --only photo-depths --photos FOLDER      held-out photographs
    python training/experiments/evaluation_page.py --count 8 --out out/trial --page out/trial/page.md     a trial

A run is one call of training/evaluate.py with its records in OUT/NAME. The program replaces the tables between the
lines <!-- NAME --> and <!-- end NAME -->, and no other lines. The conclusions are written by hand: check them when
figures change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds.photo import PHOTO
from training.cli import run
from training.evaluation.run import arguments, run_suite
from training.evaluation.suites.corruptions import library
from training.experiments.page_tables import PANELS, TABLES
from training.files import make_folder, write_text
from training.report import save_image

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "evaluation.md"
MIDDLE = "photo_lite0_blocks4"


@dataclass(frozen=True)
class Run:
    """A call of evaluate.py: suite, number of pictures, further options. photos: which photographs it needs, "held-out"
    for reports or "training" for those kept back of them, to choose settings."""

    suite: str
    count: int
    options: str = ""
    photos: str = ""

    def words(self, count: int | None) -> list[str]:
        return [
            "--suite",
            self.suite,
            "--count",
            str(count or self.count),
            *self.options.split(),
            *(["--kept-back"] if self.photos == "training" else []),
        ]

    @property
    def page(self) -> Path:
        if self.suite == "methods":
            return DOCS / "methods.md"
        return DOCS / "photographs.md" if self.photos else PAGE


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
    "photo-sweep": Run(
        "sweep", 48, f"--model {MIDDLE} --gradient 0 --strengths 0.75 1 1.25 --guidances 1 2 3 4", "training"
    ),
    "photo-depths": Run("layers", 500, f"--models {' '.join(PHOTO.models)} --gradient 0", "held-out"),
    "photo-gradient": Run(
        "layers", 500, f"--models {' '.join(PHOTO.models)} --gradient 0.06 --gradient-steps 5", "held-out"
    ),
    "methods": Run("methods", 32, "--model tiny_vit_last"),
    "photo-methods": Run("methods", 16, f"--model {MIDDLE}", "held-out"),
}


def block(results: dict, command: list[str], table: Callable[[dict], list[str]]) -> str:
    """The lines of a run in the page: its command, number of scenes, tables."""
    return "\n".join(
        [f"`python training/evaluate.py {' '.join(command)}` (n = {results['count']})", "", *table(results)]
    )


def fill(text: str, name: str, lines: str) -> str:
    """The page with other lines between a run's marks. Raises FeatInvError for a page without them."""
    head, first, rest = text.partition(f"<!-- {name} -->\n")
    _, last, tail = rest.partition(f"<!-- end {name} -->\n")
    if not first or not last:
        raise FeatInvError(
            f"the page has no lines <!-- {name} --> and <!-- end {name} -->; put them where the tables of {name} belong"
        )
    return f"{head}{first}\n{lines}\n\n{last}{tail}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=RUNS,
        metavar="NAME",
        help=f"of {', '.join(RUNS)} (default: all, those of photographs where their folder is named)",
    )
    parser.add_argument("--count", type=int, help="scenes in every run (default: each its own number)")
    parser.add_argument("--photos", help="folder of held-out photographs, for the runs photo-")
    parser.add_argument(
        "--training-photos", help="folder of those that the world of photographs was made from, for photo-sweep"
    )
    parser.add_argument("--options", default="", help="further options of every run, in one word, as '--batch 64'")
    parser.add_argument("--out", type=Path, default=Path("out/evaluate"), help="folder of the records")
    parser.add_argument(
        "--page", type=Path, help="page to write instead of the project's own, and copied from it if it is not there"
    )
    args = parser.parse_args(argv)
    folders = {"held-out": args.photos, "training": args.training_photos, "": "drawn"}
    if args.count is not None and args.count < 8:
        raise FeatInvError(f"--count {args.count}: the panels show eight images; give at least as many")
    if lacking := [name for name in args.only or () if not folders[RUNS[name].photos]]:
        raise FeatInvError(f"{', '.join(lacking)}: name the folders with --photos and --training-photos")
    chosen = args.only or [name for name, one in RUNS.items() if folders[one.photos]]
    for name in chosen:  # before any work
        fill(page_text(args.page, RUNS[name]), name, "")
    if "corruptions" in chosen:
        library()
    for name in chosen:
        command, page = RUNS[name].words(args.count), args.page or RUNS[name].page
        make_folder(page.parent)
        run_suite(
            arguments().parse_args(
                [*command, "--data", folders[RUNS[name].photos], *args.options.split(), "--out", str(args.out / name)]
            )
        )
        results = json.loads((args.out / name / "results.json").read_text(encoding="utf-8"))
        write_text(page, fill(page_text(args.page, RUNS[name]), name, block(results, command, TABLES[name])))
        for there, here in PANELS.get(name, {}).items():
            with Image.open(args.out / name / there) as picture:
                save_image(picture, page.with_name(here))


def page_text(page: Path | None, one: Run) -> str:
    """The page as it is so far."""
    return (page if page and page.is_file() else one.page).read_text(encoding="utf-8")


if __name__ == "__main__":
    run(main)
