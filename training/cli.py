"""What the programs share: arguments, the model that they name, and errors as exit status 2."""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import require_name
from featinv_nodes.core.guidance import NEGATIVES
from featinv_nodes.core.sampling import SOLVERS, SPACINGS, Sampling
from featinv_nodes.worlds import MODELS

from .models.pipeline import PRECISIONS, InversionPipeline, load_pipeline

MODEL = "tiny_cnn_last"  # of every program, where none is named
#: the settings of Sampling that are options of every program; without one the weights file's own holds
SAMPLING = (
    "steps",
    "strength",
    "guidance",
    "negative",
    "solver",
    "text_guidance",
    "gradient",
    "gradient_steps",
    "best_of",
    "timestep_spacing",
)


def model_parser(description: str, **defaults: float) -> argparse.ArgumentParser:
    """A parser with the arguments that choose a model and how it draws. defaults: of settings of Sampling that a
    program does not take from the weights file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"weights file, or one of {', '.join(MODELS)}")
    other = "".join(f", but --{name} {value:g}" for name, value in defaults.items())
    parser.add_argument(
        "--steps",
        type=int,
        help=f"sampling steps (default for this and all up to --timestep-spacing: the weights file's own{other})",
    )
    parser.add_argument("--strength", type=float, help="control strength")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none")
    parser.add_argument(
        "--negative",
        choices=NEGATIVES,
        help="what guidance pushes away from: text (the empty text with the same features) or features (neither)",
    )
    parser.add_argument("--solver", choices=SOLVERS, help="solver that takes the steps")
    parser.add_argument(
        "--text-guidance",
        type=float,
        help="separate guidance scale of the text; --guidance is then the features' alone. Needs --negative features",
    )
    parser.add_argument(
        "--gradient",
        type=float,
        help="length of the move along the gradient of the features, in units of the latents; 0 for none",
    )
    parser.add_argument("--gradient-steps", type=int, help="number of last steps in which the gradient guides")
    parser.add_argument(
        "--best-of", type=int, help="sample this many images of each map and keep the one with the highest cosine"
    )
    parser.add_argument(
        "--timestep-spacing",
        choices=SPACINGS,
        help="timesteps of the solver: trailing (from the last one on) or leading (as in the paper's code)",
    )
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once")
    parser.add_argument("--base", help="base model folder (default: the one that the weights file names)")
    parser.add_argument(
        "--backbone", help="the backbone's timm-hub folder or name (default: the one that the weights file names)"
    )
    parser.add_argument("--backbone-weights", help="the backbone's .safetensors file")
    parser.add_argument(
        "--other-weights",
        action="store_true",
        help=(
            "allow a backbone or a base model with other weights than a file was made with, such as a fine-tune of the"
            " same name; the results say so"
        ),
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help=(
            "precision of the base model's U-Net and the ControlNet: fp32, or bf16, which is much faster on most GPUs;"
            " autoencoder, backbone and encoder stay in fp32 (default fp32)"
        ),
    )
    add_device(parser)
    parser.set_defaults(**defaults)
    return parser


def pipeline_from(args: argparse.Namespace, chooses: bool = False) -> tuple[InversionPipeline, Sampling]:
    """The model that the arguments name, and its sampling settings with theirs; says which other weights are allowed.
    chooses: the program keeps the best of several pictures; others refuse --best-of."""
    require_positive(args, "batch")
    if not chooses and args.best_of not in (None, 1):
        raise FeatInvError(
            f"--best-of {args.best_of}: this program samples each image once; reconstruct.py and evaluate.py choose"
            " among several"
        )
    require_device(args.device)
    pipeline = load_pipeline(
        args.model, args.base, args.backbone_weights, args.backbone, args.device, args.other_weights, args.precision
    )
    for difference in pipeline.allowed:
        print(difference, file=sys.stderr)
    return pipeline, pipeline.recommended(**{name: getattr(args, name) for name in SAMPLING})


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises FeatInvError unless these options are finite and at least 1, or above 0 if they are no whole numbers; None
    and options that the program does not have are left out."""
    for name in names:
        value = getattr(args, name, None)
        whole = not isinstance(value, float)
        if value is not None and not (value >= 1 if whole else 0 < value < math.inf):
            expected = "at least 1" if whole else "a finite number above 0"
            raise FeatInvError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="torch device (default: the GPU, if there is one)")


def require_device(name: str) -> None:
    """Raises FeatInvError for an unknown device, or one that this computer does not have."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise FeatInvError(f"--device {name}: {str(error).splitlines()[0]}") from error


def require_weights_name(file: Path) -> None:
    """Raises FeatInvError, before any work, for an output that cannot become a .safetensors file."""
    if file.suffix != ".safetensors" or file.is_dir():
        raise FeatInvError(f"--out {file}: expected the name of a .safetensors file")
    require_name(file)


def run(main: Callable[[], object]) -> None:
    """Runs a program; bad input and a full disk become one line on standard error and exit status 2, Ctrl-C status
    130."""
    try:
        main()
    except KeyboardInterrupt:
        _end("stopped", 128 + signal.SIGINT)
    except FeatInvError as error:
        _end(str(error), 2)
    except (OSError, SafetensorError) as error:
        full = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
        if getattr(error, "errno", None) not in full and not any(words in str(error) for words in full.values()):
            raise
        where = "there" if getattr(error, "filename", None) else "in the folder of the results"
        _end(f"{error}; make room {where}, and give the same command again", 2)


def _end(why: str, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    sys.exit(status)
