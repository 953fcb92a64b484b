"""The paper's tables and figures for any inversion model, beside the unconditional baseline and the autoencoder's round
trip.

    python training/evaluate.py                                     the embedded model, 500 held-out scenes
    accelerate launch training/evaluate.py --model FILE --data SOURCE --suite NAME --out DIR
    python training/evaluate.py --data IMAGENET/val --per-class 10 --model FILE ...

Suites: quality (Tables 1, 3), layers (Figs. 4, 13, 14), cross-model (Table 2, Fig. 3), sweep (Figs. 9 to 11),
variability (Fig. 12), mixing (Figs. 7, 8), baseline (Table 3), rcdm (Table 4), corruptions (Appendix C),
natural-adversarial and ood (Sec. 4.2). Not in the paper: guidances (separate scales for features and text), cost
(solvers, steps, the gradient) and methods (the trained model, guidance alone, a feature decoder, and its image as the
start, with their costs).

SOURCE: "drawn", a folder of images or of tar shards, one .tar file, or "hf:" and a Hugging Face data set. Images
are sorted by name, and an image's number is its seed. Unconditional: images that the base model generates
without features. Round trip: originals, encoded and decoded by the autoencoder. The same command continues a stopped
evaluation. Writes results.json, report.md, index.html and their images.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.cli import run
from training.evaluation.run import arguments, run_suite


def main(argv: list[str] | None = None) -> None:
    run_suite(arguments(__doc__).parse_args(argv))


if __name__ == "__main__":
    run(main)
