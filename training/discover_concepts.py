"""Finds concepts in a backbone's feature maps of a folder of pictures and writes one concept file.

    python training/discover_concepts.py --data FOLDER --backbone resnet50.a1_in1k --backbone-weights FILE --out concepts.safetensors
    python training/discover_concepts.py                 (the embedded world: drawn scenes and its CNN)
    python training/discover_concepts.py --directions FILE      (your own directions instead of a method)

Prints for each concept its dimension, its share of the feature norm (shares of oblique parts sum to more than one), and
its relevance: the share of the top classes' logits, less the head's bias, that it contributes. Memory: --count vectors a
few times over, and the feature maps of 64 pictures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.backbones import FITS, LAST, Backbone
from featinv_nodes.core.concepts import METHODS, Concepts, discover, own_directions, save_concepts
from featinv_nodes.core.concepts.relevance import class_weights, completeness, relevance
from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, concatenate
from featinv_nodes.tiny_world import open_backbone
from featinv_nodes.tiny_world.scenes import draw
from training.cli import make_folder, run
from training.data import SUFFIXES
from training.images import read_image

SCENES, JUDGED, BATCH = 400, 64, 16


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="tiny", help=f"folder of pictures, or tiny for {SCENES} drawn scenes")
    parser.add_argument("--backbone", default="tiny-cnn", help="timm-hub folder or name, tiny-cnn or tiny-vit")
    parser.add_argument("--backbone-weights", help="the backbone's .safetensors file")
    parser.add_argument("--input-size", type=int, help="side of the pictures it reads, where not its own: that of the inversion model")
    parser.add_argument("--layer", default=LAST, help="layer of the backbone; relevance is known for the last one only")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how a picture is fitted to the backbone's input")
    parser.add_argument("--method", choices=METHODS, default="mcd")
    parser.add_argument("--directions", type=Path, help="safetensors file of your own directions, instead of a method")
    parser.add_argument("--count", type=int, default=20_000, help="feature vectors, at most, drawn evenly from the pictures")
    parser.add_argument("--concepts", type=int, default=8, help="clusters or directions to look for")
    parser.add_argument("--centred", action="store_true", help="mcd: bases by PCA about each cluster's mean, as published")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/concepts.safetensors"), help="the concept file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def find_files(data: str, count: int, seed: int) -> list[Path]:
    """Pictures below a folder, shuffled; no more of them than vectors are wanted."""
    if not Path(data).is_dir():
        raise FeatInvError(f"data {data!r} is neither 'tiny' nor a folder")
    files = sorted(f for f in Path(data).rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise FeatInvError(f"no images ({', '.join(sorted(SUFFIXES))}) below {data}")
    return [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist()]


def read(backbone: Backbone, files: list[Path], fit: str, unreadable: list[str]) -> Tensor:
    """[b, 3, *input_size] framed pictures; why others cannot be read goes to `unreadable`."""
    framed = [torch.empty(0, 3, *backbone.input_size)]
    for file in files:
        try:
            framed.append(backbone.frame(read_image(file), fit))
        except FeatInvError as error:
            unreadable.append(str(error))
    return torch.cat(framed)


def collect(backbone: Backbone, args: argparse.Namespace) -> tuple[Tensor, FeatureMap]:
    """(vectors [N, C], as many from each picture, at random places; the whole maps of the first 64 pictures or more)."""
    tiny = args.data == "tiny"
    files = list(range(SCENES)) if tiny else find_files(args.data, args.count, args.seed)
    each, unreadable = -(-args.count // len(files)), []
    generator = torch.Generator().manual_seed(args.seed)
    vectors, maps = [], []
    with tqdm(total=len(files), desc="features", unit="picture") as bar:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            framed = backbone.frame(draw(args.seed, torch.tensor(part)).image) if tiny else read(backbone, part, args.fit, unreadable)
            bar.update(len(part))
            if not len(framed):
                continue
            found = backbone.extract(framed.to(args.device), args.layer).to("cpu")
            cells = found.values.flatten(2).transpose(1, 2)  # [b, H * W, C]
            vectors += [c[torch.randperm(len(c), generator=generator)[:each]] for c in cells]
            if sum(map(len, maps)) < JUDGED:
                maps.append(found)
    if unreadable:
        print(f"skipped {len(unreadable)} of {len(files)} pictures:", *unreadable, sep="\n  ")
    if not vectors:
        raise FeatInvError(f"none of the {len(files)} pictures below {args.data} can be read")
    return torch.cat(vectors)[: args.count], concatenate(maps)


def statistics(backbone: Backbone, concepts: Concepts, maps: FeatureMap) -> tuple[dict[str, list[float]], str]:
    """Per concept and the rest: share of the feature norm, and, at the head's own layer, relevance and completeness;
    with a remark where these are missing."""
    lengths = concepts.parts(maps).norm(dim=2).sum((1, 2, 3))
    found = {"share": (lengths / maps.values.norm(dim=1).sum()).tolist()}
    try:
        contributions, bias = relevance(backbone, concepts, maps)
        weights = class_weights(backbone, maps)
    except FeatInvError as error:
        return found, f"no relevance: {error}"
    logits = contributions.sum(0) + bias
    tops = torch.stack([logits[:, part].argmax(1) + (part.start or 0) for part in backbone.groups.values()], 1)  # [B, groups]
    towards = contributions.gather(2, tops.expand(len(contributions), -1, -1)).sum((1, 2))
    found["relevance"] = (towards / towards.sum()).tolist()
    found["completeness"] = [completeness(concepts, weights)[tops].mean().item()]
    return found, f"completeness for the top classes: {found['completeness'][0]:.2f}"


def table(concepts: Concepts, found: dict[str, list[float]]) -> str:
    """Lines of: number, label, dimension, share of the norm, relevance."""
    dimensions = [len(b) for b in concepts.bases]
    dimensions.append(concepts.source.channels - sum(dimensions))
    relevant = [f"{r:9.1%}" for r in found.get("relevance", [])] or ["        -"] * len(dimensions)
    lines = [f"{'':3} {'concept':20} {'dimension':>9} {'norm':>7} {'relevance':>9}"]
    for i, (name, d, share, r) in enumerate(zip(concepts.names, dimensions, found["share"], relevant)):
        lines.append(f"{i:3} {name[:20]:20} {d:9} {share:7.1%} {r}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    if args.count < 1:
        raise FeatInvError(f"--count {args.count}: expected at least 1")
    make_folder(args.out.parent)
    backbone = open_backbone(args.backbone, args.backbone_weights, args.input_size).to(args.device)
    source = backbone.source(args.layer)
    concepts = own_directions(args.directions, source) if args.directions else None
    vectors, maps = collect(backbone, args)
    if concepts is None:
        with tqdm(total=len(vectors), desc=args.method, unit="vector") as bar:
            concepts = discover(vectors, source, args.method, args.concepts, args.seed, args.centred, lambda done, total: _advance(bar, done, total))
    found, remark = statistics(backbone.cpu(), concepts, maps)
    settings = {**concepts.settings, "data": Path(args.data).name, **found}
    save_concepts(args.out, replace(concepts, settings=settings))
    print(table(concepts, found))
    for line in (*concepts.settings.get("rejected", []), remark):
        print(line)
    print(f"wrote {len(concepts)} concepts of {source.describe()} to {args.out}")


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


if __name__ == "__main__":
    run(main)
