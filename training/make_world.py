"""Trains a world from scratch, stage by stage: autoencoder, base model, inversion models; or a feature decoder.

    python training/make_world.py photo --data FOLDER [FOLDER ...] --minutes 300    from folders of photographs
    python training/make_world.py photo --data FOLDER --backbone resnet18.a1_in1k --backbone-weights FILE --out DIR
    python training/make_world.py drawn                                             from scenes that the code draws
    python training/make_world.py photo --data FOLDER --stage base                  one stage alone
    python training/make_world.py decoder --data FOLDER --layer blocks.4 --minutes 60        a decoder of feature maps

Each stage writes its result at least every minute and when it ends. The same command continues a stopped one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from featinv_nodes.core.errors import FeatInvError
from training.cli import add_device, require_device, require_positive, run
from training.worlds import make_decoder, make_drawn, make_photo

KINDS = {"photo": make_photo, "drawn": make_drawn, "decoder": make_decoder}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    worlds = parser.add_subparsers(dest="world", required=True, metavar="WORLD")
    for name, kind in KINDS.items():
        summary = kind.__doc__.splitlines()[0]
        own = worlds.add_parser(
            name, help=summary, description=kind.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_device(own)
        own.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores to use")
        kind.add_arguments(own)
    args = parser.parse_args(argv)
    require_device(args.device)
    require_positive(args, "minutes", "images", "batch", "lr", "threads", "width", "layers", "heads")
    if (views := getattr(args, "views", None)) is not None and views < 0:
        raise FeatInvError(f"--views {views}: expected at least 0")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # shapes are the same in every step
    KINDS[args.world].make(args)


if __name__ == "__main__":
    run(main)
