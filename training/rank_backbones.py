"""Ranks backbones and their layers by how much of the image their feature maps keep, without an inversion model.

    python training/rank_backbones.py --out DIR                        (the drawn world's two backbones, all layers)
    python training/rank_backbones.py --backbones NAME NAME@LAYER,LAYER --data FOLDER --held-out FOLDER --out DIR
    python training/rank_backbones.py --models tiny_cnn_last tiny_vit_last --out DIR

The same linear probe predicts the pixels of each map's cells from its vectors. report.md, index.html and results.json
say how well it does so on held-out images, and how large and expensive the map is. Shrunk copies of the images are
ranked too. --models adds the cosines of images that inversion models give.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featinv_nodes.worlds import BACKBONES, model_file
from training.cli import add_device, require_device, require_positive, run
from training.evaluation.report import write
from training.files import make_folder
from training.spaces.parts import add_parts, split
from training.spaces.ranking import add_models, rank, report_of


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=["tiny-cnn", "tiny-vit"],
        metavar="NAME[@LAYER,...]",
        help=f"timm-hub folders or names of local weights, or {', '.join(BACKBONES)}; without layers all of them",
    )
    add_parts(parser)
    parser.add_argument(
        "--per-picture", type=int, default=16, help="vectors of each image that a probe is fitted to, at most"
    )
    parser.add_argument(
        "--around",
        type=int,
        default=1,
        help="cells a side that a probe reads: 1, or 3 for a vector with its neighbours",
    )
    parser.add_argument("--models", nargs="+", default=[], help="inversion models whose images are compared as well")
    parser.add_argument("--drawn", type=int, default=32, help="held-out images that each of these inverts")
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    add_device(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    require_positive(args, "count", "held_out_count", "drawn", "batch")
    require_device(args.device)
    for model in args.models:
        model_file(model)  # said before the work
    parts = split(args.data, args.count, args.held_out, args.held_out_count)
    make_folder(args.out)
    ranked = rank(args.backbones, parts, args.per_picture, args.around, args.device)
    add_models(ranked, args.models, parts[1], args.drawn, args.batch, args.device)
    fitted, measured = (len(part) - len(set(part.unreadable)) for part in parts)
    given = sys.argv[1:] if argv is None else argv
    about = {
        "count": measured,
        "data": Path(args.data).name,
        "command": shlex.join(["python", "training/rank_backbones.py", *given]),
    }
    notes = sorted({line for part in parts for line in part.unreadable})
    print(write(args.out, report_of(ranked, args.around, fitted, measured), about, notes))


if __name__ == "__main__":
    run(main)
