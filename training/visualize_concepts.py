"""FeatInv-Viz: which pixels change when a concept is turned down (the paper's Algorithm 1 and Fig. 6).

    python training/visualize_concepts.py --image a.png b.png --names "object; sky" --out DIR
    python training/visualize_concepts.py --model FILE --concepts FILE --image photo.jpg --names "0; 1; 2" --out DIR
    python training/visualize_concepts.py --image a.png --names object --factor 2 --keep-length --out DIR

--names: numbers or names. Commas join concepts that are turned down together; semicolons separate the variants of a
row. Writes grid.png (a row per image, a column per variant), details.png (both reconstructions, the difference and
its sign), each map as a PNG, and results.json. Every variant has a slope, the share of the concept that the backbone
finds again in the reconstructions, and a scope, which says whether the edited map is like those of real images.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from featinv_nodes.core.backbones import RESIZE_MODES
from featinv_nodes.core.concepts import load_concepts
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import concatenate
from featinv_nodes.core.images import read_image
from featinv_nodes.core.pictures import diverging, heat_map, spotlight
from featinv_nodes.core.viz import (
    FACTOR,
    ROUNDS,
    SEEDS,
    THRESHOLD,
    Visualization,
    VizSettings,
    affected,
    normalised,
    parse_groups,
    signed_difference,
)
from featinv_nodes.worlds import CONCEPTS, concepts_file, model_file
from training.cli import model_parser, pipeline_from, run
from training.concepts.viz import visualize
from training.data.scope import scope_entries
from training.files import make_folder, write_json
from training.report import Cell, panel, save_image, to_image


def arguments() -> argparse.ArgumentParser:
    parser = model_parser(__doc__, gradient=0.0)  # of an edited map it draws less of the edit: docs/concepts.md
    parser.add_argument("--image", nargs="+", required=True, help="images in any format that Pillow reads")
    parser.add_argument(
        "--concepts",
        default="tiny_cnn_concepts",
        help=f"concept file, or one of the shipped {', '.join(CONCEPTS)} (default: %(default)s)",
    )
    parser.add_argument("--names", required=True, help='concepts, such as "object" or "0, 3; 1"')
    parser.add_argument(
        "--factor",
        type=float,
        default=FACTOR,
        help="factor for the concepts: 0.25 as in the paper, 0 removes them, above 1 amplifies",
    )
    parser.add_argument("--keep-length", action="store_true", help="scale vectors that grow back to their old length")
    parser.add_argument(
        "--closed-loop",
        action="store_true",
        help="search for a factor whose slope is --factor, and sample again for each factor that is tried",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="factors that the closed loop tries at most")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="reconstructions of each map")
    parser.add_argument("--seed", type=int, default=0, help="seed of their noise")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="share of the largest difference below which a pixel counts as unaffected",
    )
    parser.add_argument(
        "--resize-mode", choices=RESIZE_MODES, default="crop", help="how an image comes to the backbone's input size"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    return parser


def title(visualization: Visualization) -> str:
    return visualization.change.titles()[0][:20]


def grid_row(picture: torch.Tensor, row: list[Visualization], threshold: float) -> list[Cell]:
    """A row of Fig. 6: the picture, its reconstruction, and that with unaffected pixels darkened, per variant."""
    cells = [(picture, "image"), (row[0].original[0], "reconstruction")]
    for visualization in row:
        mask = affected(visualization.distance, threshold)
        verdict = "" if visualization.slope.passed else ", NOT as requested"
        cells.append((spotlight(visualization.original[0], mask), f"slope {visualization.slope.own:.2f}{verdict}"))
    return cells


def detail_row(visualization: Visualization) -> list[Cell]:
    signed = signed_difference(visualization.original, visualization.changed)
    return [
        (visualization.original[0], "reconstruction"),
        (visualization.changed[0], f"changed, x{visualization.commanded:.2f}"),
        (heat_map(normalised(visualization.distance)[None])[0], "difference"),
        (diverging(signed[None], float(signed.abs().amax().clamp(min=1e-3)))[0], "darker, brighter"),
    ]


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    if args.seeds < 1 or args.rounds < 1 or not 0 <= args.threshold <= 1:
        raise FeatInvError(
            f"--seeds {args.seeds} --rounds {args.rounds} --threshold {args.threshold}: expected at least 1, at least"
            " 1, and 0 to 1"
        )
    make_folder(args.out)
    concepts, groups = load_concepts(concepts_file(args.concepts)), parse_groups(args.names)
    pictures = [read_image(file) for file in args.image]
    pipeline, sampling = pipeline_from(args)
    if args.other_weights:
        pipeline.allow(concepts.source, Path(args.concepts).name)
    pixel_values = torch.cat([pipeline.backbone.preprocess(x, args.resize_mode) for x in pictures])
    features = pipeline.features(pixel_values)
    settings = VizSettings(args.factor, args.seeds, args.seed, args.keep_length, args.rounds if args.closed_loop else 1)
    rows = []
    with tqdm(desc="drawing", unit="image") as bar:
        for i in range(len(pixel_values)):
            rows.append(
                visualize(pipeline, features.select(i), concepts, groups, settings, sampling, args.batch, bar.update)
            )
    stems = [f"{i:03d}_{Path(file).stem}" for i, file in enumerate(args.image)]
    details = [(Path(file).name[:18], visualization) for file, row in zip(args.image, rows) for visualization in row]
    edited = concatenate([visualization.change.changed for _, visualization in details])
    scores = [pipeline.score(s.change.changed.repeat(args.seeds), s.changed).mean().item() for _, s in details]
    scopes = scope_entries(model_file(args.model), edited, scores, sampling)
    entries = [
        save(args, stem, number, visualization)
        for stem, row in zip(stems, rows)
        for number, visualization in enumerate(row)
    ]
    entries = [entry | {"cosine": cosine, "scope": scope} for entry, cosine, scope in zip(entries, scores, scopes)]
    heading = f"{pipeline.info.source.describe()}; concepts x{args.factor:g}, {args.seeds} seeds"
    names = [Path(file).name[:18] for file in args.image]
    grid = [grid_row(x, row, args.threshold) for x, row in zip(pixel_values, rows)]
    columns = "   ".join(f"{n + 1}: {title(visualization)}" for n, visualization in enumerate(rows[0]))
    save_image(panel(grid, names, heading, "\n".join([columns, *pipeline.allowed])), args.out / "grid.png")
    save_image(
        panel([detail_row(s) for _, s in details], [f"{n}\n{title(s)}" for n, s in details], heading),
        args.out / "details.png",
    )
    write_json(
        args.out / "results.json",
        {
            "model": args.model,
            "concepts": args.concepts,
            "digests": pipeline.digests,
            "notes": pipeline.allowed,
            "images": [str(f) for f in args.image],
            "sampling": asdict(sampling),
            "settings": asdict(settings),
            "maps": entries,
        },
    )
    for (name, visualization), scope in zip(details, scopes):
        said = (
            visualization.describe()
            if args.closed_loop
            else f"{title(visualization)}: {visualization.slope.describe()}"
        )
        print(f"{name}, {said}; scope: {scope.get('line', 'unknown')}")
    print(f"wrote grid.png, details.png and results.json to {args.out}")


def save(args: argparse.Namespace, stem: str, number: int, visualization: Visualization) -> dict:
    """Writes a variant's difference map and mask; returns its entry in results.json."""
    files = {"difference": normalised(visualization.distance), "mask": affected(visualization.distance, args.threshold)}
    for kind, values in files.items():
        save_image(to_image(values.expand(3, -1, -1)), args.out / f"{stem}_{number}_{kind}.png")
    return {
        "picture": stem,
        "variant": number,
        "concepts": list(visualization.change.groups[0]),
        "commanded": visualization.commanded,
        "rounds": visualization.rounds,
        "passed": visualization.slope.passed,
        **asdict(visualization.slope),
        **{kind: f"{stem}_{number}_{kind}.png" for kind in files},
    }


if __name__ == "__main__":
    run(main)
