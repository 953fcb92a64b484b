"""Options for starting from a feature decoder's image, with noise, instead of from noise alone."""

from __future__ import annotations

import argparse

import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.sampling import PartWay
from featinv_nodes.feature_decoders import decoder_of

from .models.pipeline import InversionPipeline
from .models.sampling import latents_of
from .models.untrained import UntrainedPipeline

START_SHARE = 0.5


def add_start(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--start-from",
        metavar="DECODER",
        help=(
            "begin from a feature decoder's image of the map: the decoder's folder or name, or \"decoder\" for the"
            " embedded one of these maps; also with --untrained"
        ),
    )
    parser.add_argument(
        "--start-share",
        type=float,
        help=f"with it, the share of the steps that are taken from there on (default {START_SHARE:g})",
    )


def part_way_of(
    pipeline: InversionPipeline | UntrainedPipeline, args: argparse.Namespace, target: FeatureMap
) -> PartWay | None:
    """The latents of a feature decoder's pictures of the target maps, where the arguments name a decoder."""
    if args.start_from is None:
        return None
    name = None if args.start_from == "decoder" else args.start_from
    decoder = decoder_of(pipeline.source, pipeline.backbone, name, args.other_weights)
    if decoder is None:
        raise FeatInvError(
            f"--start-from decoder: no feature decoder of {pipeline.source.describe()} is embedded; name the folder of"
            " one"
        )
    decoder.to(pipeline.base.unet.device)
    pictures = decoder.decode(target, args.batch)
    latents = torch.cat([latents_of(pipeline.base, part) for part in pictures.split(args.batch)])
    return PartWay(latents, args.start_share)


def require_start(args: argparse.Namespace) -> None:
    """Fills in --start-share. Raises FeatInvError where it, or --start-from, means nothing."""
    if args.start_from and args.decoder:
        raise FeatInvError(
            "--start-from begins from a decoder's image, --decoder gives no other; leave one of them out"
        )
    if args.start_share is not None and not args.start_from:
        raise FeatInvError("--start-share goes with --start-from, which says from what; add it, or leave both out")
    if args.start_share is None:
        args.start_share = START_SHARE
