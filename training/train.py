"""Trains an inversion model: a ControlNet and its conditional encoder on a frozen diffusion model.

    accelerate launch training/train.py                                    the drawn world's CNN
    accelerate launch training/train.py --config FILE --lr 1e-4 --output DIR
    accelerate launch training/train.py --config FILE --check              test the set-up and estimate the time

The same command continues a stopped run. SIGTERM and Ctrl-C save first and end with status 143 or 130. --help lists
every field of the configuration; training/README.md is the guide.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.cli import run
from training.config import chosen, run_parser
from training.loop.training import check, train


def main() -> None:
    parser = run_parser(__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="open everything, take two steps, say what was found and how long the run will take, and write nothing",
    )
    args = parser.parse_args()
    (check if args.check else train)(*chosen(args))


if __name__ == "__main__":
    run(main)
