"""Generates images from a feature map: that of an image, a mixture of several, several composed by masks, or one that a
linear map changed.

    python training/reconstruct.py --model tiny_cnn_last --image photo.jpg --out DIR
    python training/reconstruct.py --image a.png b.png --mix 0 0.25 0.5 0.75 1 --out DIR
    python training/reconstruct.py --image a.png b.png c.png --weights 1 1 2 --out DIR
    python training/reconstruct.py --image inner.png outer.png --mask mask.png --out DIR
    python training/reconstruct.py --image top.png middle.png outer.png --mask top_mask.png middle_mask.png --out DIR
    python training/reconstruct.py --image a.png --linear-map FILE --map-strength 0 0.5 1 --out DIR
    python training/reconstruct.py --model tiny_vit_last --image a.png --start-from decoder --start-share 0.5 --out DIR
    python training/reconstruct.py --untrained --base photo --layer blocks.4 --image photo.jpg --out DIR
    python training/reconstruct.py --decoder FOLDER --backbone FOLDER --image photo.jpg --out DIR

Writes every image, panel.png with the cosine similarity under each, and results.json. With --best-of N each image
is the best of N by cosine. If the weights file has scope statistics, results.json says whether each map is in scope,
and the panel names those that are not. With --untrained, universal guidance moves the base model's predictions towards
the features, without an inversion model. With --decoder, a feature decoder decodes each map in one pass. With
--start-from, noise is added to a feature decoder's image, and sampling starts from there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.backbones import RESIZE_MODES
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, concatenate
from featinv_nodes.core.images import read_image
from featinv_nodes.core.linear_map_files import load_linear_map
from featinv_nodes.core.mixing import compose_regions, interpolate
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.scope import VERDICTS
from featinv_nodes.worlds import model_file
from training.cli import MODEL, model_parser, pipeline_from, run
from training.cli_decoder import DecoderPipeline, add_decoder, decoder_from, with_decoder
from training.cli_start import add_start, part_way_of, require_start
from training.cli_untrained import add_untrained, require_trained, untrained_from, without_training
from training.data.scope import scope_entries
from training.files import make_folder, write_json
from training.models.pipeline import ATTEMPT, InversionPipeline
from training.models.sampling import noise
from training.models.untrained import UntrainedPipeline, UntrainedSampling
from training.report import Cell, panel, save_image, to_image


def arguments() -> argparse.ArgumentParser:
    parser = model_parser(__doc__)
    parser.add_argument("--image", nargs="+", required=True, help="images in any format that Pillow reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--samples", type=int, default=1, help="reconstructions of each feature map")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the starting noise, the same for every feature map"
    )
    parser.add_argument(
        "--resize-mode", choices=RESIZE_MODES, default="crop", help="how an image comes to the backbone's input size"
    )
    mixing = parser.add_mutually_exclusive_group()
    mixing.add_argument(
        "--mix", type=float, nargs="+", metavar="W", help="mix two images; each W is the share of the second"
    )
    mixing.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one weighted mean of all images, a weight for each"
    )
    mixing.add_argument(
        "--mask",
        nargs="+",
        help=(
            "images whose bright part takes the features of the first image, the second, and so on; the last"
            " image, which has no mask, takes the rest. Where masks overlap, the earlier one lies on top"
        ),
    )
    mixing.add_argument("--linear-map", help="file of training/fit_linear_map.py that changes the feature maps")
    parser.add_argument(
        "--map-strength", type=float, nargs="+", default=[1.0], metavar="S", help="strengths of the linear map"
    )
    parser.add_argument("--soft", action="store_true", help="blend the maps in cells on a mask's edge")
    add_decoder(parser)
    add_start(parser)
    add_untrained(parser)
    return parser


def target_maps(
    pipeline: InversionPipeline | UntrainedPipeline | DecoderPipeline, args: argparse.Namespace, pixel_values: Tensor
) -> list[tuple[str, FeatureMap]]:
    """The feature maps to invert, each with a name: one per picture, share or strength, the mean or the composition."""
    features, count = pipeline.features(pixel_values), len(args.image)
    names = [Path(file).stem for file in args.image]
    single = [features.select(i) for i in range(count)]
    if args.linear_map is not None:
        linear = load_linear_map(args.linear_map)
        return [
            (f"{name}_{strength:.2f}", linear.apply(one, strength))
            for name, one in zip(names, single)
            for strength in args.map_strength
        ]
    if args.weights is not None:
        return [("mean", interpolate(single, args.weights))]
    if args.mask is not None:
        if count != len(args.mask) + 1:
            raise FeatInvError(
                f"--mask takes an image for each mask and one more for the rest; got {count} images and"
                f" {len(args.mask)} masks"
            )
        masks = [
            pipeline.backbone.preprocess(read_image(file).mean(1, keepdim=True), args.resize_mode)[:, 0]
            for file in args.mask
        ]
        return [("composed", compose_regions(single[-1], list(zip(single, masks))[::-1], args.soft))]
    if args.mix is None:
        return list(zip(names, single))
    if count != 2:
        raise FeatInvError(f"--mix takes exactly two images, got {count}; for more give --weights")
    if not all(0 <= w <= 1 for w in args.mix):
        raise FeatInvError(f"--mix {args.mix}: expected shares between 0 and 1")
    return [(f"mix_{w:.2f}", interpolate(single, [1 - w, w])) for w in args.mix]


def with_model(
    pipeline: InversionPipeline, sampling: Sampling, args: argparse.Namespace, target: FeatureMap
) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, h, w] of the target maps [B, ...] from the inversion model, and which attempt each is [B]."""

    def start_of(attempt: int) -> Tensor:
        return noise(pipeline.base, args.seed + ATTEMPT * attempt, args.samples).repeat(
            len(target) // args.samples, 1, 1, 1
        )

    part_way = part_way_of(pipeline, args, target)
    with tqdm(total=len(target) * sampling.best_of, desc="drawing", unit="image") as bar:
        return pipeline.best(target, sampling, start_of, args.batch, bar.update, part_way)


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    if args.samples < 1:
        raise FeatInvError(f"--samples {args.samples}: expected at least 1")
    trained = not (args.untrained or args.decoder)
    if trained:
        require_trained(args)
        args.model = args.model or MODEL
    require_start(args)
    make_folder(args.out)
    pictures = [read_image(file) for file in args.image]
    if args.decoder:
        pipeline, settings, draw = decoder_from(args), None, with_decoder
    elif args.untrained:
        (pipeline, settings), draw = untrained_from(args), without_training
    else:
        (pipeline, settings), draw = pipeline_from(args, chooses=True), with_model
    pixel_values = torch.cat([pipeline.backbone.preprocess(x, args.resize_mode) for x in pictures])
    maps = target_maps(pipeline, args, pixel_values)
    target = concatenate([m for _, m in maps]).repeat(args.samples)
    drawn, attempts = draw(pipeline, settings, args, target)
    scores = pipeline.score(target, drawn).tolist()
    scopes = scope_entries(model_file(args.model), target, scores, settings) if trained else [{}] * len(target)
    off = [
        f"{name}: {scopes[m * args.samples]['line']}"
        for m, (name, _) in enumerate(maps)
        if scopes[0] and scopes[m * args.samples]["verdict"] != VERDICTS[0]
    ]
    outside = [pipeline.world.outside] if pipeline.world and pipeline.world.outside else []
    note = "\n".join([*outside, *pipeline.allowed, *how_drawn(args, settings), *off])
    names = [name for name, _ in maps]
    rows, entries = save_images(args, names, drawn, attempts, scores, scopes)
    rows.insert(0, [(x, Path(f).name[:18]) for x, f in zip(pixel_values, args.image)])
    titles = ["original", *(name[:18] for name in names)]
    save_image(panel(rows, titles, pipeline.source.describe(), note), args.out / "panel.png")
    write_json(
        args.out / "results.json",
        {
            "model": args.model if trained else None,
            "decoder": args.decoder,
            "source": pipeline.source.to_dict(),
            "digests": pipeline.digests,
            "images": [str(f) for f in args.image],
            "sampling": asdict(settings) if settings else None,
            "start": {"from": args.start_from, "share": args.start_share} if args.start_from else None,
            "note": note,
            "pictures": entries,
        },
    )
    print(f"wrote {len(entries)} image{'s' * (len(entries) != 1)}, panel.png and results.json to {args.out}")


def how_drawn(args: argparse.Namespace, settings: Sampling | UntrainedSampling | None) -> list[str]:
    """What the panel says of the way that the images were made, where it is not the usual one."""
    lines = []
    if args.decoder:
        lines = [f"Decoded by the feature decoder {Path(args.decoder).name}."]
    elif args.untrained:
        lines = ["Sampled without a trained inversion model, by universal guidance."]
    elif settings.best_of > 1:
        lines = [f"Each image is the one of the highest cosine among {settings.best_of}."]
    if args.start_from:
        lines.append(f"Started from a feature decoder's image, with {args.start_share:g} of the steps.")
    return lines


def save_images(
    args: argparse.Namespace,
    names: list[str],
    drawn: Tensor,
    attempts: Tensor,
    scores: list[float],
    scopes: list[dict],
) -> tuple[list[list[Cell]], list[dict]]:
    """Writes the drawn images [maps * samples, 3, h, w], all samples of a map after each other; returns a row of the
    panel for each map, and an entry of results.json for each image."""
    rows, entries = [], []
    for m, name in enumerate(names):
        picks = range(m * args.samples, (m + 1) * args.samples)
        rows.append([(drawn[i], f"cos {scores[i]:.2f}") for i in picks])
        for s, i in enumerate(picks):
            file = args.out / f"{m:03d}_{name}_{s}.png"
            save_image(to_image(drawn[i]), file)
            entries.append(
                {
                    "file": file.name,
                    "map": name,
                    "sample": s,
                    "seed": args.seed,
                    "attempt": attempts[i].item(),
                    "cosine": scores[i],
                    "scope": scopes[i],
                }
            )
    return rows, entries


if __name__ == "__main__":
    run(main)
