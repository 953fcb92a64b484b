"""Shows the method on an embedded world: inverts its images and yours, mixes two, and names the network's classes.

    python training/demo.py [--image FILE ...] [--out DIR]     photographs, at four depths of an ImageNet network
    python training/demo.py --world drawn [--image FILE ...]   drawn scenes, with figures of held-out ones

Writes panel.png, index.html (opens without a server) and results.json.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

print("loading PyTorch and diffusers ...", flush=True)
import diffusers
import timm
import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import read_image
from featinv_nodes.worlds.drawn import DRAWN
from training.cli import run
from training.files import make_folder, write_json, write_text
from training.report import page, save_image
from training.worlds import demo_drawn, demo_photo

ROOT = Path(__file__).resolve().parents[1]
WORLD = "photo"
WORLDS = {"photo": demo_photo, "drawn": demo_drawn}
MODEL, COUNT = DRAWN.models[0], 64


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="*", default=[], metavar="FILE", help="images of yours to invert as well")
    parser.add_argument("--world", default=WORLD, choices=WORLDS, help="what is inverted (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the models' own)")
    parser.add_argument("--model", choices=DRAWN.models, help=f"drawn: the inversion model (default: {MODEL})")
    parser.add_argument("--count", type=int, help=f"drawn: held-out images to measure on (default: {COUNT})")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "demo", help="folder for the results (default: out/demo)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    began = time.perf_counter()
    make_folder(args.out)
    own = [(Path(file).name, read_image(file)) for file in args.image]
    if args.world == "drawn":
        sheet, paragraphs, results = demo_drawn.show(
            own, say, args.steps, args.model or MODEL, COUNT if args.count is None else args.count
        )
    elif args.model is not None or args.count is not None:
        raise FeatInvError("--model and --count belong to the drawn scenes; give --world drawn as well")
    else:
        sheet, paragraphs, results = demo_photo.show(own, say, args.steps)
    save_image(sheet, args.out / "panel.png")
    write_text(args.out / "index.html", page("FeatInv: what the model sees", sheet, paragraphs))
    seconds = time.perf_counter() - began
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "timm": timm.__version__,
    }
    write_json(
        args.out / "results.json", {"world": args.world, **results, "seconds": round(seconds, 1), "versions": versions}
    )
    for paragraph in paragraphs:
        say(paragraph)
    say(f"done in {seconds:.0f} s: see {args.out / 'panel.png'} and {args.out / 'index.html'}")


if __name__ == "__main__":
    run(main)
