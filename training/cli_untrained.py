"""The options of sampling without an inversion model."""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.guidance import DISTANCES
from featinv_nodes.core.universal_guidance import COSTS, NotFinite
from featinv_nodes.worlds import WORLDS

from .cli import SAMPLING, require_device, require_positive
from .cli_start import part_way_of
from .models.pipeline import set_precision
from .models.untrained import UntrainedPipeline, UntrainedSampling, load_untrained
from .report import save_image, to_image

#: options of the model parser that universal guidance has too
SHARED = ("steps", "guidance")
OWN = ("moves", "step", "recurrence", "start", "end", "distance")


def add_untrained(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a model parser."""
    default = {field.name: field.default for field in fields(UntrainedSampling)}
    costs = ", ".join(f"{name} {gradients}" for name, gradients in COSTS.items())
    group = parser.add_argument_group(
        "without a trained model",
        f"with --base (an embedded {' or '.join(WORLDS)}, default drawn, or a folder), --backbone, --steps (default"
        f" {default['steps']}) and --guidance (of the text, default {default['guidance']:g})",
    )
    group.add_argument("--untrained", action="store_true", help="use no inversion model, but universal guidance")
    group.add_argument("--layer", help="the backbone's layer that is inverted (default last)")
    group.add_argument("--pooled", action="store_true", help="invert the mean of the map over its locations")
    group.add_argument("--prompt", help="text for the base model (default an embedded world's own, else none)")
    group.add_argument(
        "--cost",
        choices=list(COSTS),
        help=f"gradients per image: {costs} (default quick); --moves to --distance replace its settings",
    )
    group.add_argument("--moves", type=int, help=f"moves in each step (default {default['moves']})")
    group.add_argument(
        "--step", type=float, help=f"length of a move, in units of the latents (default {default['step']:g})"
    )
    group.add_argument(
        "--recurrence", type=int, help="how often each step is taken, 1 for once (default as --cost allows)"
    )
    group.add_argument("--start", type=float, help="share of the steps before guidance begins (default 0)")
    group.add_argument("--end", type=float, help="share of the steps after which guidance ends (default 1)")
    group.add_argument("--distance", choices=list(DISTANCES), help="what a move lowers (default cosine)")
    group.add_argument(
        "--small-decoder",
        metavar="FOLDER",
        help="diffusers folder of an AutoencoderTiny, such as TAESD, to decode with while guiding: faster, less memory",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute the decoder's blocks again for the gradient instead of keeping them: less memory, more time",
    )
    parser.set_defaults(model=None)  # tells one that is named from the default


def untrained_from(args: argparse.Namespace) -> tuple[UntrainedPipeline, UntrainedSampling]:
    """The parts and the settings that the arguments name. Raises FeatInvError for options of an inversion model."""
    other = [name for name in SAMPLING if name not in SHARED and getattr(args, name) is not None]
    if other:
        raise FeatInvError(
            f"--{other[0].replace('_', '-')} is a setting of an inversion model and means nothing with --untrained;"
            f" leave it out. Settings here: {', '.join('--' + name for name in (*SHARED, *OWN))}"
        )
    if args.model is not None:
        raise FeatInvError(f"--model {args.model}: --untrained uses no inversion model; leave one of the two out")
    if args.other_weights:
        raise FeatInvError("--other-weights allows what a weights file refuses; --untrained opens none: leave it out")
    require_positive(args, "batch")
    require_device(args.device)
    given = {name: getattr(args, name) for name in (*SHARED, *OWN) if getattr(args, name) is not None}
    sampling = UntrainedSampling.at_cost(args.cost or "quick", **given)
    chosen = {"layer": args.layer} if args.layer else {}
    pipeline = load_untrained(
        args.base,
        args.backbone,
        args.backbone_weights,
        pooled=args.pooled,
        prompt=args.prompt,
        device=args.device,
        small_decoder=args.small_decoder,
        checkpointing=args.checkpointing,
        **chosen,
    )
    set_precision(args.precision, pipeline.base)
    return pipeline, sampling


def require_trained(args: argparse.Namespace) -> None:
    """Raises FeatInvError for an option that means something with --untrained only."""
    for name in (*OWN, "cost", "layer", "prompt", "small_decoder", "pooled", "checkpointing"):
        if getattr(args, name) not in (None, False):
            option = name.replace("_", "-")
            raise FeatInvError(f"--{option} is a setting of --untrained; leave it out, or add --untrained")


def without_training(
    pipeline: UntrainedPipeline, sampling: UntrainedSampling, args: argparse.Namespace, target: FeatureMap
) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, h, w] of the target maps [B, ...], and attempt 0 for each [B]. Where latents become not finite,
    the last finite pictures are written before it raises."""
    part_way = part_way_of(pipeline, args, target)
    try:
        with tqdm(total=len(target), desc="drawing", unit="image") as bar:
            drawn = pipeline.draw(target, sampling, args.seed, args.samples, args.batch, bar.update, part_way)
    except NotFinite as error:
        if error.latents is None:
            raise
        with torch.inference_mode():
            for number, latents in enumerate(error.latents.split(1)):
                save_image(to_image(pipeline.base.decode(latents)[0].cpu()), args.out / f"last_finite_{number}.png")
        raise FeatInvError(f"{error}. The last finite images are in {args.out} as last_finite_N.png") from error
    return drawn, torch.zeros(len(target), dtype=torch.int64)
