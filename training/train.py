"""Trains an inversion model: a ControlNet and its conditional encoder on a frozen diffusion model.

    accelerate launch training/train.py                                    the drawn world's CNN
    accelerate launch training/train.py --config FILE --lr 1e-4 --output DIR

Stopped at any moment, the same command goes on where it was; SIGTERM and Ctrl-C save first and end with status 143 or
130. --help lists every field of the configuration, training/README.md tells the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.cli import run
from training.config import parse_arguments
from training.loop.training import train

if __name__ == "__main__":
    run(lambda: train(*parse_arguments(__doc__)))
