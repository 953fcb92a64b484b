"""Finds concepts in a backbone's feature maps of a folder of images. Writes a concept file and a page about it.

    python training/discover_concepts.py --data FOLDER --backbone resnet50.a1_in1k --backbone-weights FILE --out FILE
    python training/discover_concepts.py                 (drawn scenes and their CNN)
    python training/discover_concepts.py --concepts auto        (as many clusters as completeness needs)
    python training/discover_concepts.py --method sae --concepts 256 --active 8
    python training/discover_concepts.py --directions FILE      (your own directions or sparse autoencoder)

The folder holds the images of one class, or a folder per class. Prints for each concept its dimension, its share of
the feature norm (shares of oblique parts sum to more than one), its relevance (the share of the top classes' logits,
less the head's bias, that it contributes) and the classes to whose logits it adds most. The page beside the concept
file, NAME.html, shows where each concept is. Memory: --count vectors a few times over, the maps of 128 images, and
what the method takes (featinv_nodes/core/concepts/discovery.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from featinv_nodes.core.backbones import LAST, RESIZE_MODES, Backbone
from featinv_nodes.core.concepts import METHODS, Concepts, discover, load_directions, save_concepts
from featinv_nodes.core.concepts.collect import Collected, Folder, Pictures, collect
from featinv_nodes.core.concepts.statistics import concept_statistics, remarks, table, top_weights, with_statistics
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import BACKBONES, drawing_world, open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training.cli import add_device, require_device, require_positive, require_weights_name, run
from training.concepts.page import page
from training.files import make_folder, write_text

SCENES, AUTO = 400, "auto"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="drawn", help=f"folder of images, or drawn for {SCENES} drawn scenes")
    parser.add_argument(
        "--backbone", default="tiny-cnn", help=f"timm-hub folder or name, or one of {', '.join(BACKBONES)}"
    )
    parser.add_argument("--backbone-weights", help="the backbone's .safetensors file")
    parser.add_argument(
        "--input-size",
        type=int,
        help="side in pixels of the images the backbone reads, where not its own; must be the inversion model's",
    )
    parser.add_argument("--layer", default=LAST, help="layer of the backbone; relevance is known for the last one only")
    parser.add_argument(
        "--resize-mode", choices=RESIZE_MODES, default="crop", help="how an image comes to the backbone's input size"
    )
    parser.add_argument("--method", choices=METHODS, default="mcd", help="how concepts are found (default: mcd)")
    parser.add_argument(
        "--directions",
        type=Path,
        help="safetensors file of your own directions or sparse autoencoder, instead of a method",
    )
    parser.add_argument(
        "--count", type=int, default=20_000, help="most feature vectors to use, taken evenly from the images"
    )
    parser.add_argument(
        "--concepts",
        default="8",
        help="clusters, directions or atoms to look for; auto: clusters until they are complete (mcd)",
    )
    parser.add_argument(
        "--active", type=int, help="sae: atoms active in each vector (default: an eighth of all, 16 at most)"
    )
    parser.add_argument(
        "--centred", action="store_true", help="mcd: bases by PCA about each cluster's mean, as published"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/concepts.safetensors"), help="the concept file")
    add_device(parser)
    return parser


def read(backbone: Backbone, args: argparse.Namespace) -> Collected:
    """The feature vectors, and the pictures that concepts are evaluated on, with progress. Prints what was read
    and what could not be read."""
    if drawing_world(args.data):
        pictures = Pictures(draw(args.seed, torch.arange(SCENES)).image, backbone, name="scene")
    elif Path(args.data).is_dir():
        pictures = Folder(Path(args.data), backbone, args.resize_mode, args.count, args.seed)
    else:
        raise FeatInvError(f"data {args.data!r} is neither 'drawn' nor a folder")
    with tqdm(total=len(pictures), desc="features", unit="image") as bar:
        collected = collect(
            pictures, lambda x: backbone.extract(x.to(args.device), args.layer), args.count, args.seed, advance(bar)
        )
    print("\n".join(filter(None, [pictures.skipped(), f"read {collected.describe()}"])))
    return collected


def find(backbone: Backbone, args: argparse.Namespace, collected: Collected, number: int) -> Concepts:
    """The concepts by the chosen method, with progress. number: 0 for as many as completeness needs."""
    vectors, maps = collected.vectors, collected.maps
    weights = None if number else top_weights(backbone, maps)
    with tqdm(total=len(vectors), desc=args.method, unit="step") as bar:
        return discover(
            vectors, maps.source, args.method, number, args.seed, args.centred, advance(bar), weights, args.active
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    require_positive(args, "count")
    require_device(args.device)
    if not 0 <= args.seed < 2**32:
        raise FeatInvError(f"--seed {args.seed}: expected 0 to {2**32 - 1}")
    if args.concepts != AUTO and not (args.concepts.isdigit() and int(args.concepts)):
        raise FeatInvError(f"--concepts {args.concepts}: expected a number from 1, or {AUTO}")
    require_weights_name(args.out)
    make_folder(args.out.parent)
    backbone = open_backbone(args.backbone, args.backbone_weights, args.input_size, run_code=True).to(args.device)
    concepts = load_directions(args.directions, backbone.source(args.layer)) if args.directions else None
    collected = read(backbone, args)
    backbone = backbone.cpu()
    if concepts is None:
        concepts = find(backbone, args, collected, 0 if args.concepts == AUTO else int(args.concepts))
    stats = concept_statistics(backbone, concepts, collected.maps)
    about = {"data": Path(args.data).name, "read": collected.read, "classes": collected.classes}
    save_concepts(args.out, with_statistics(concepts, stats, **about))
    write_text(args.out.with_suffix(".html"), page(concepts, collected, stats))
    print(table(concepts, stats))
    print(*remarks(concepts, stats), sep="\n")
    print(
        f"wrote {len(concepts)} concepts of {concepts.source.describe()} to {args.out}; look at"
        f" {args.out.with_suffix('.html')}"
    )


def advance(bar: tqdm) -> Callable[[int, int], None]:
    """A progress function that moves a bar."""

    def move(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return move


if __name__ == "__main__":
    run(main)
