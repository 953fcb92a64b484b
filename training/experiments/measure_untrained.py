"""Prints the table of docs/without-training.md: cost against cosine, without a trained model, in the drawn world.

OMP_NUM_THREADS=1 python training/experiments/measure_untrained.py
OMP_NUM_THREADS=1 python training/experiments/measure_untrained.py --rows 4,4,0.1,4 8,2,0.2,6
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from featinv_nodes.core.feature_map import FeatInvError, FeatureMap
from featinv_nodes.core.metrics import cosine
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn import DRAWN
from training.cli import run
from training.models.pipeline import load_pipeline
from training.models.untrained import UntrainedSampling, load_untrained
from training.report import digests_text

#: steps, moves, length of a move, recurrence
ROWS = ("4,0,0,1", "4,4,0.1,4", "6,4,0.1,8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, help="settings as STEPS,MOVES,STEP,RECURRENCE")
    parser.add_argument("--scenes", type=int, default=16, help="held-out scenes")
    args = parser.parse_args(argv)
    pipeline, trained = load_untrained(), load_pipeline("tiny_cnn_last")
    pictures = DRAWN.draw(torch.arange(args.scenes))
    features = pipeline.features(pipeline.backbone.preprocess(pictures))
    other = open_backbone(DRAWN.independent[pipeline.source.backbone])
    expected = other.extract(other.preprocess(pictures))

    def row(what: str, gradients: int, evaluations: int, drawn: torch.Tensor, features: FeatureMap = features) -> None:
        by_other = cosine(expected, other.extract(other.preprocess(drawn, "stretch"))).mean()
        own = pipeline.score(features, drawn).mean()
        print(f"| {what} | {gradients} | {evaluations} | {own:.3f} | {by_other:.3f} |", flush=True)

    print("| sampling | gradients | predictions | cosine | by the independent backbone |\n|---|---|---|---|---|")
    for text in args.rows:
        try:
            steps, moves, step, recurrence = (float(part) for part in text.split(","))
        except ValueError as error:
            raise FeatInvError(f"--rows {text}: expected four numbers, STEPS,MOVES,STEP,RECURRENCE") from error
        sampling = UntrainedSampling(int(moves), step, int(recurrence), steps=int(steps))
        what = f"{steps:g} steps, {moves:g} moves of {step:g}, recurrence {recurrence:g}"
        drawn = pipeline.draw(features, sampling)
        row(what, sampling.gradients(sampling.steps), sampling.evaluations(sampling.steps), drawn)
    plain = trained.recommended(gradient=0.0, best_of=1, steps=10)
    drawn = trained.draw(features, plain, trained.noise(range(args.scenes)))
    row("trained ControlNet, 10 steps, no gradient", 0, plain.evaluations, drawn)
    print(f"\n{digests_text(trained.digests)}")


if __name__ == "__main__":
    run(main)
