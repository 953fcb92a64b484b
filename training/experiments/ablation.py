"""Measures what each change to the paper's recipe is worth, one change at a time.

    python training/experiments/ablation.py                          train what is missing, measure, write the report
    python training/experiments/ablation.py --rows ema standardise   these rows only
    python training/experiments/ablation.py --page                   the table and the panel in docs/faithfulness.md
    python training/experiments/ablation.py --world photo --data FOLDER --photos FOLDER --page   docs/photographs.md

The first takes hours.

All rows are trained on equally many of the same images with one seed, and evaluated on the same held-out images
with the same noise: by the inverted backbone, and by an independent backbone that took no part in training or sampling.
The same command continues a stopped run. Writes DIR/ROW (the runs), DIR/measured (the records), results.json,
report.md, index.html and panel.png.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from accelerate import PartialState

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import bootstrap
from featinv_nodes.core.sampling import PAPER_SAMPLING, Sampling
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import drawing_world, model_file, open_backbone
from training.cli import run
from training.config import TrainConfig
from training.evaluation.context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext, ModelSpec, ModelUnderTest
from training.evaluation.evaluator import Evaluator
from training.evaluation.metrics import mean_entry
from training.evaluation.report import (
    Figures,
    Grid,
    Report,
    cell,
    condition_panel,
    figures_of,
    paired_kids,
    to_markdown,
    write,
)
from training.evaluation.run import file_digest
from training.evaluation.shards import Condition, Store, Table, record
from training.evaluation.sources import open_source
from training.evaluation.spaces import TimmSpace
from training.evaluation.suites.cost import drawing_gmac
from training.evaluation.suites.quality import RECONSTRUCTION, gap_closed
from training.experiments.ablation_rows import (
    ABLATIONS,
    RECOMMENDED,
    Ablation,
    Row,
    chosen_rows,
    config_of,
    sampling_of,
    weights_of,
)
from training.files import make_folder, write_text
from training.loop.training import train
from training.models.pipeline import InversionPipeline, load_pipeline
from training.report import figure_text, save_image

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"drawn": DOCS / "faithfulness.md", "photo": DOCS / "photographs.md"}
MARKS = "<!-- ablation: begin -->", "<!-- ablation: end -->"


def trained(config: TrainConfig, folder: Path) -> Path:
    """The weights file of a run. Starts or continues the run if there is none. Raises FeatInvError if the folder
    holds another run."""
    file, noted = folder / f"{config.name}.safetensors", folder / "config.yaml"
    if noted.is_file():
        known, current = yaml.safe_load(noted.read_text(encoding="utf-8")), asdict(config)
        differing = [
            f"{f.name}: {known[f.name]} there, {current[f.name]} now"
            for f in fields(config)
            if f.name in known and known[f.name] != current[f.name]
        ]
        if differing:
            raise FeatInvError(f"{folder} holds another run ({'; '.join(differing)}); give another --out, or delete it")
    if not file.is_file() or read_info(file).images_seen < config.max_images:
        print(f"training {folder.name}", flush=True)
        torch.compiler.reset()
        train(config, folder)
    return file


def model_under_test(context: EvalContext, ablation: Ablation) -> ModelUnderTest:
    """The evaluators of all rows: the inverted backbone at its own input size, and the independent backbone."""
    own, independent = (open_backbone(name).to(context.device) for name in (ablation.own, ablation.independent))
    evaluators = {
        "": Evaluator(own, {"cosine": (ablation.layer, False)}),
        "independent: ": Evaluator(independent, {"cosine": (LAST, False)}),
    }
    return ModelUnderTest(
        context, ModelSpec(Path(ablation.config).stem), evaluators, [TimmSpace(own), TimmSpace(independent)]
    )


def measured(
    rows: dict[str, Row], chosen: list[Row], files: dict[str, Path], args: argparse.Namespace
) -> dict[str, Table]:
    """Records of the originals, the bounds and the chosen rows. files: row -> its weights."""
    dist_state = PartialState(timeout=timedelta(days=7))
    source = open_source(args.photos or args.world, args.count)
    tested = model_under_test(EvalContext(source, str(dist_state.device), dict(PAPER_SAMPLING)), ABLATIONS[args.world])
    tables: dict[str, Table] = {}

    def fill(name: str, conditions: dict[str, Condition], settings: dict) -> None:
        store = Store(args.out / "measured" / name, args.count)
        store.begin(settings | {"pictures": source.fingerprint})
        record(store, source, conditions, args.batch, dist_state)
        tables.update({condition: store.table(condition) for condition in conditions})

    fill("bounds", {ORIGINAL: tested.original}, {"sampling": PAPER_SAMPLING})
    tested.centre(tables[ORIGINAL])
    fill("bounds", tested.bounds(Sampling(**PAPER_SAMPLING)), {"sampling": PAPER_SAMPLING})
    for row in chosen:
        file, sampling = files[row.name], sampling_of(rows, row)
        fill(
            row.name,
            {row.name: tested.reconstruction(sampling, ModelSpec(str(file)))},
            {"sampling": asdict(sampling), "weights": file_digest(file)},
        )
    return tables


def report_of(model: str, rows: dict[str, Row], chosen: list[Row], tables: dict[str, Table]) -> Report:
    """model: one of the architecture that all rows have, but those of smaller maps."""
    figures = {
        condition: figures_of(table, tables[ORIGINAL]) for condition, table in tables.items() if condition != ORIGINAL
    }
    pipeline = load_pipeline(model)
    facts = {row.name: facts_of(rows, row, tables, figures, pipeline) for row in chosen}
    compared, lines = result(chosen, tables, figures, {name: row["gmac"] for name, row in facts.items()})
    panel = condition_panel(
        tables,
        [ORIGINAL, UNCONDITIONAL, *facts, ROUND_TRIP],
        "Ablation: the same images in every row",
        most=5,
    )
    grids = [by_inverted(facts, figures), by_independent(facts, figures)]
    return Report("Ablation", figures, grids, lines, {"rows": facts, "result": compared}, {"panel.png": panel})


def facts_of(
    rows: dict[str, Row], row: Row, tables: dict[str, Table], figures: dict[str, Figures], pipeline: InversionPipeline
) -> dict:
    """What results.json says of a row beside its figures: its change, its gain over the row that it builds on, and what
    an image costs."""
    bounds = {bound: figures[bound] for bound in (UNCONDITIONAL, ROUND_TRIP)}
    sampling, gain = sampling_of(rows, row), None
    if row.base in tables:
        gain = mean_entry(tables[row.name].columns["cosine"] - tables[row.base].columns["cosine"])
    return {
        "change": row.change,
        "from": row.base,
        "gain": gain,
        "gap_closed": gap_closed(bounds | {RECONSTRUCTION: figures[row.name]}),
        "evaluations": sampling.evaluations,
        "gmac": drawing_gmac(pipeline, sampling),
    }


def by_inverted(facts: dict[str, dict], figures: dict[str, Figures]) -> Grid:
    """The rows between their bounds, as the inverted backbone sees them."""
    cells = []
    for name in (UNCONDITIONAL, *facts, ROUND_TRIP):
        own, row = figures[name], facts.get(name, {})
        way = f"{row['gap_closed']:.1%}" if row else ""
        begins = [
            name,
            row.get("change", ""),
            row.get("from") or "",
            cell(own, "cosine"),
            _signed(row.get("gain")),
            way,
        ]
        cells.append([*begins, cell(own, "cosine_centred"), cell(own, "top1_match")])
    head = [
        "row",
        "change",
        "relative to",
        "cosine",
        "change of the cosine",
        "gap closed",
        "cosine, mean removed",
        "top-1 match",
    ]
    return Grid(
        "By the inverted backbone",
        head,
        cells,
        "Change of the cosine: the paired difference from the row under *relative to*. Gap closed: where the cosine"
        " lies between unconditional (0 %) and round trip (100 %).",
    )


def by_independent(facts: dict[str, dict], figures: dict[str, Figures]) -> Grid:
    """The rows between their bounds, as the independent backbone and the distances of sets see them, and their cost."""
    measures = ["independent: cosine", "independent: top1_match", *(kids := paired_kids(figures[UNCONDITIONAL]))]
    cells = []
    for name in (UNCONDITIONAL, *facts, ROUND_TRIP):
        row = facts.get(name)
        cost = [str(row["evaluations"]), f"{row['gmac']:.1f}"] if row else ["", ""]
        cells.append([name, *(cell(figures[name], measure) for measure in measures), *cost])
    return Grid(
        "By the independent backbone, and as sets",
        ["row", "cosine", "top-1 match", *kids, "passes per image", "GMAC"],
        cells,
        "Passes of base model and ControlNet. GMAC: multiply-accumulates (10^9) of sampling an image, decoding and"
        " gradients included.",
    )


def result(
    chosen: list[Row], tables: dict[str, Table], figures: dict[str, Figures], gmac: dict[str, float]
) -> tuple[dict | None, list[str]]:
    """The recommended row beside the paper's recipe at the best of its rates: (figures, lines of the report)."""
    papers = [row.name for row in chosen if row.name.startswith("paper") and row.config]
    if not papers or RECOMMENDED not in tables:
        return None, []
    best = max(papers, key=lambda name: figures[name]["cosine"]["value"])
    pair = [tables[name].columns for name in (best, RECOMMENDED)]
    distances = [1 - columns["cosine"] for columns in pair]
    compared = {
        "paper": best,
        "recommended": RECOMMENDED,
        "distance_ratio": bootstrap(*distances, statistic=lambda a, b, axis: a.mean(axis) / b.mean(axis)),
    }
    compared |= {
        name: mean_entry(pair[1][name] - pair[0][name])
        for name in ("top1_match", "independent: cosine", "independent: top1_match")
    }
    cost = [gmac[name] for name in (best, RECOMMENDED)]
    kid_names = [
        f"{name}: {cell(figures[best], name)} against {cell(figures[RECOMMENDED], name)}"
        for name in paired_kids(figures[best])
    ]
    return compared | {"gmac": cost}, [
        f"The paper's recipe at the best of its rates ({best}) against {RECOMMENDED}: the cosine distance, 1 - cosine,"
        f" is {cell(compared, 'distance_ratio')} times as large; {RECOMMENDED}'s top-1 match is"
        f" {_signed(compared['top1_match'])} higher, the independent backbone's"
        f" {_signed(compared['independent: top1_match'])}, its cosine {_signed(compared['independent: cosine'])};"
        f" {'; '.join(kid_names)}; {cost[0]:.1f} GMAC per image against {cost[1]:.1f}."
    ]


def _signed(entry: dict | None) -> str:
    return figure_text(entry, sign="+") if entry else ""


def write_page(page: Path, report: Report, notes: list[str], panel: bool) -> None:
    """Puts the tables between the page's marks, and the panel where it may be shown: photographs of research sets may
    not. Raises FeatInvError if the page has no marks."""
    text, picture = page.read_text(encoding="utf-8"), page.with_suffix(".webp")
    panels = {picture.name: report.panels["panel.png"]} if panel else {}
    if any(text.count(mark) != 1 for mark in MARKS):
        raise FeatInvError(f"{page}: expected the lines {MARKS[0]} and {MARKS[1]} once each")
    before, rest = text.split(MARKS[0])
    _, body = to_markdown(replace(report, panels=panels), notes).split("\n", 1)  # without the title
    body = body.replace("\n## ", "\n### ")  # below the page's own heading
    if panel:
        save_image(report.panels["panel.png"], picture)
    write_text(page, "\n".join([before + MARKS[0], "", body.strip(), "", MARKS[1] + rest.split(MARKS[1])[1]]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=ABLATIONS, default="drawn")
    parser.add_argument("--data", help="photographs to train on, a folder of images or of tar files")
    parser.add_argument("--photos", help="folder of held-out photographs")
    parser.add_argument("--rows", nargs="+", default=[], help="these rows only, see ablation_rows.py")
    parser.add_argument("--images", type=int, help="images that each row is trained on")
    parser.add_argument("--count", type=int, help="held-out images")
    parser.add_argument("--batch", type=int, default=32, help="images sampled at once")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    parser.add_argument(
        "--page",
        action="store_true",
        help="write tables and panel into docs/faithfulness.md, or tables into docs/photographs.md",
    )
    args = parser.parse_args(argv)
    if (
        drawing_world(args.world)
        and (args.data or args.photos)
        or not drawing_world(args.world)
        and not (args.data and args.photos)
    ):
        raise FeatInvError(
            "--world photo needs --data and --photos, folders of photographs; the drawn world takes neither"
        )
    ablation = ABLATIONS[args.world]
    args.images, args.count = (
        given if given is not None else own
        for given, own in ((args.images, ablation.images), (args.count, ablation.count))
    )
    for name in ("images", "count", "batch"):
        if getattr(args, name) < 1:
            raise FeatInvError(f"--{name} {getattr(args, name)}: expected at least 1")
    rows = ablation.rows(args.images)
    chosen = chosen_rows(rows, args.rows)
    make_folder(args.out)
    drawn_with = {row.name: weights_of(rows, row) for row in chosen}
    configs = {
        name: config_of(ablation, rows, row, args.images, args.data)
        for name, row in drawn_with.items()
        if not row.weights
    }
    files = {
        name: model_file(row.weights) if row.weights else trained(configs[name], args.out / row.name)
        for name, row in drawn_with.items()
    }
    report = report_of(Path(ablation.config).stem, rows, chosen, measured(rows, chosen, files, args))
    notes = [
        f"{args.images:,} training images a trained row, seed 1; {args.count} held-out images; 95 % bootstrap"
        " intervals."
    ]
    about = {
        "images": args.images,
        "count": args.count,
        "data": args.photos or args.world,
        "seeds": "image number",
        "command": shlex.join(["python", "training/experiments/ablation.py", *sys.argv[1:]]),
        "configs": {name: asdict(config) for name, config in configs.items()},
        "sampling": {row.name: asdict(sampling_of(rows, row)) for row in chosen},
    }
    print(write(args.out, report, about, notes))
    if args.page:
        write_page(PAGES[args.world], report, notes, bool(drawing_world(args.world)))


if __name__ == "__main__":
    run(main)
