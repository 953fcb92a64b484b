"""Options for a feature decoder instead of an inversion model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_decoder import FeatureDecoder
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.feature_decoders import find_decoder, open_feature_decoder
from featinv_nodes.worlds import DECODERS, World, open_backbone

from .cli import SAMPLING, require_device, require_positive
from .cli_untrained import OWN
from .models.pipeline import PRECISIONS, UNKNOWN, FeaturePipeline

#: options that say nothing to a decoder, beside the settings of sampling
OTHER = ("base", "layer", "prompt", "pooled", "untrained", "precision")


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """Adds the option to a model parser."""
    parser.add_argument(
        "--decoder",
        metavar="NAME",
        help=(
            "use no inversion model, but a feature decoder: an AutoencoderRAE folder, with --backbone, or an embedded"
            f" one{': ' + ', '.join(DECODERS) if DECODERS else ''}"
        ),
    )


@dataclass
class DecoderPipeline(FeaturePipeline):
    """A decoder and the backbone whose maps it reads. allowed: other weights, where the user allows them."""

    name: str
    decoder: FeatureDecoder
    backbone: Backbone
    allowed: list[str] = field(default_factory=list)

    @property
    def world(self) -> World | None:
        """The embedded world that the decoder belongs to, if any."""
        return DECODERS.get(self.name)

    @property
    def source(self) -> FeatureSource:
        return self.decoder.source

    @property
    def digests(self) -> dict[str, str]:
        """Of the weights that are open."""
        return {"backbone": self.backbone.weights or UNKNOWN}


def decoder_from(args: argparse.Namespace) -> DecoderPipeline:
    """The decoder and the backbone that the arguments name. Raises FeatInvError for options that mean nothing here."""
    given = [name for name in (*SAMPLING, *OWN, *OTHER) if getattr(args, name) not in (None, False, PRECISIONS[0])]
    if given or args.samples != 1:
        option = given[0].replace("_", "-") if given else "samples"
        raise FeatInvError(
            f"--{option} means nothing with --decoder, which decodes each map once, in one pass, without a base model;"
            " leave it out"
        )
    require_positive(args, "batch")
    require_device(args.device)
    files = find_decoder(args.decoder)
    embedded = files.config.featinv_source and files.backbone
    name, backbone = args.backbone or embedded, None
    if name:
        side = files.config.encoder_input_size
        backbone = open_backbone(name, args.backbone_weights, None, bool(args.backbone))
        if backbone.input_size != (side, side):
            backbone = open_backbone(name, args.backbone_weights, side, bool(args.backbone))
    decoder = open_feature_decoder(files, backbone, args.other_weights).to(args.device)
    allowed = ["Other weights of the backbone than the decoder's are allowed."] if args.other_weights else []
    return DecoderPipeline(args.decoder, decoder, backbone.to(args.device), allowed)


def with_decoder(
    pipeline: DecoderPipeline, _: None, args: argparse.Namespace, target: FeatureMap
) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, h, w] of the target maps [B, ...], and attempt 0 for each [B]."""
    with tqdm(total=len(target), desc="drawing", unit="image") as bar:
        drawn = pipeline.decoder.decode(target, args.batch, lambda done, _: bar.update(done - bar.n))
    return drawn.cpu(), torch.zeros(len(target), dtype=torch.int64)
