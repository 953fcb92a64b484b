"""Fits the scope statistics of a weights file: what held-out feature maps are like, by which a manipulated one is judged.

    python training/fit_scope.py --model FILE --data FOLDER                    in place
    python training/fit_scope.py --model FILE --data FOLDER --count 10000 --out FILE

FOLDER holds pictures that training did not see; "drawn" stands for held-out scenes of the drawn world. Half of the
pictures make the statistics, the other half their quantiles; the first of all are drawn for the quantiles of the cycle
cosine. Everything else in the file stays as it is.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, concatenate
from featinv_nodes.core.images import find_images, read_image
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.scope import Scope, fit_scope, quantiles_of
from featinv_nodes.core.weights import save_scope
from featinv_nodes.worlds import drawing_world, model_file
from training.cli import make_folder, model_parser, open_from, require_weights_name, run
from training.config import TrainConfig
from training.models.inversion import Opened, open_model

FIRST = 100_000  # the first held-out scene for the fit; reports use those from 0 on
TINY_CENTRES, CENTRES = 512, 2048  # directions in the bank, 2 bytes x channels each
DRAWN = 256  # reconstructions for the cycle cosine


def pictures(opened: Opened, data: str, count: int, batch: int, first: int = FIRST) -> Iterator[Tensor]:
    """Batches of framed pictures: held-out scenes from number `first` on, or `count` of a folder in a random order that
    is always the same, those that cannot be read left out and named. Raises FeatInvError for a folder with fewer."""
    if world := drawing_world(data):
        for numbers in torch.arange(first, first + count).split(batch):
            yield opened.backbone.frame(world.draw(numbers))
        return
    files, read, some = find_images(data), 0, []
    random.Random(0).shuffle(files)
    for file in files:
        try:
            some.append(opened.backbone.frame(read_image(file)))
        except FeatInvError as error:
            tqdm.write(f"left out: {error}")
            continue
        read += 1
        if len(some) == batch or read == count:
            yield torch.cat(some)
            some = []
        if read == count:
            return
    raise FeatInvError(f"{data} holds {read} readable images; asked for {count}. Give a folder with more, or a smaller --count")


def fit(opened: Opened, how: Sampling, data: str, count: int, drawn: int, centres: int, batch: int = 32) -> Scope:
    """The statistics of `count` pictures and the quantiles of `drawn` reconstructions' cycle cosines (0: none). how: without
    guidance by the gradient, which raises the cosine of whatever map it is given."""
    some: list[FeatureMap] = []

    def maps() -> Iterator[FeatureMap]:
        with tqdm(total=count, desc="reading", unit="picture") as bar:
            for framed in pictures(opened, data, count, batch):
                features = opened.features(framed).to("cpu")
                if sum(len(m) for m in some) < drawn:
                    some.append(features)
                bar.update(len(features))
                yield features

    scope = fit_scope(maps(), centres=centres)
    if not drawn:
        return scope
    wanted = concatenate(some).select(slice(0, drawn))
    with tqdm(total=len(wanted), desc="drawing", unit="picture") as bar:
        redrawn = opened.draw(wanted, how, opened.noise(range(len(wanted))), batch, bar.update)
    return replace(scope, quantiles=scope.quantiles | {"cycle": quantiles_of(cosine(wanted, opened.see(redrawn).to("cpu")))})


def ship_scope(name: str) -> None:
    """The statistics of a model of the drawn world, written into its file."""
    opened = open_model(name)
    save_scope(model_file(name), fit(opened, opened.recommended(gradient=0.0), "drawn", 4000, 1000, TINY_CENTRES))


def check_scope_data(config: TrainConfig) -> None:
    """Raises FeatInvError if the pictures for end_with_scope are not there, or too few; before a long training."""
    if config.scope and config.scope_data and not drawing_world(config.scope_data) and (there := len(find_images(config.scope_data))) < config.scope:
        raise FeatInvError(f"scope_data {config.scope_data} holds {there} images; asked for {config.scope}: give a folder with more, or a smaller --scope")


def end_with_scope(file: Path, config: TrainConfig, device: torch.device | str) -> None:
    """What train.py ends with: the statistics that a configuration asks for, written into its weights file."""
    data = config.scope_data or config.data
    opened = open_model(str(file), config.base, config.backbone_weights, config.backbone, str(device))
    save_scope(file, fit(opened, opened.recommended(gradient=0.0), data, config.scope, min(DRAWN, config.scope), centres_for(data)))


def centres_for(data: str) -> int:
    return TINY_CENTRES if drawing_world(data) else CENTRES


def arguments() -> argparse.ArgumentParser:
    parser = model_parser(__doc__, gradient=0.0)
    parser.add_argument("--data", required=True, help='folder of images that training did not see, or "drawn" for held-out scenes')
    parser.add_argument("--count", type=int, default=4000, help="how many pictures, spread over the folder; at least 2,000 for the outer quantiles to mean something")
    parser.add_argument("--drawn", type=int, default=DRAWN, help="how many of them are reconstructed for the cycle cosine's quantiles, 0 for none")
    parser.add_argument("--centres", type=int, help=f"directions in the bank (default {CENTRES:,}, in the drawn world {TINY_CENTRES})")
    parser.add_argument("--out", type=Path, help="weights file to write, where not the same one again")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    if not 0 <= args.drawn <= args.count:
        raise FeatInvError(f"--drawn {args.drawn}: expected 0 to --count {args.count}")
    if args.out:
        require_weights_name(args.out)
        make_folder(args.out.parent)
    opened, how = open_from(args)
    scope = fit(opened, how, args.data, args.count, args.drawn, args.centres or centres_for(args.data), args.batch)
    out = args.out or model_file(args.model)
    save_scope(model_file(args.model), scope, out)
    print(f"wrote the scope of {scope.source.describe()}, from {scope.maps:,} pictures, {sum(t.nbytes for t in scope.tensors().values()):,} bytes, to {out}")


if __name__ == "__main__":
    run(main)
