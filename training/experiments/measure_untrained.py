"""Prints the tables of docs/without-training.md: cost against cosine, without a trained model.

OMP_NUM_THREADS=1 python training/experiments/measure_untrained.py --first 16
OMP_NUM_THREADS=1 python training/experiments/measure_untrained.py --world photo --scenes 12
OMP_NUM_THREADS=1 python training/experiments/measure_untrained.py --rows 4,4,0.1,4 8,2,0.2,6,0,0.8,squared
python training/experiments/measure_untrained.py --memory

--first chooses other scenes and other noise, so that settings are not chosen on the reported scenes. The photographs
are crops of scikit-learn's two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.metrics import cosine
from featinv_nodes.worlds import WORLDS, World, open_backbone
from training.cli import run
from training.models.pipeline import load_pipeline
from training.models.stable_diffusion import VAE
from training.models.untrained import UntrainedSampling, load_untrained
from training.report import digests_text
from training.speed.step_memory import Peak
from training.worlds.demo_photo import sample_photographs

#: steps, moves, length of a move, recurrence; then, where not all and cosine: start, end, distance
ROWS = ("4,0,0,1", "4,4,0.1,4", "4,4,0.1,12", "4,4,0.1,37")
#: the inversion models that the settings are compared with
TRAINED = {"drawn": "tiny_cnn_last", "photo": "photo_lite0_blocks4"}
PARTS = (2, 3)  # of a photograph, down and across


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, help="settings as STEPS,MOVES,STEP,RECURRENCE[,START,END[,DISTANCE]]"
    )
    parser.add_argument("--world", choices=WORLDS, default="drawn")
    parser.add_argument("--scenes", type=int, default=16, help="held-out scenes")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them, and of the noise's seed")
    parser.add_argument(
        "--memory", action="store_true", help="count what a gradient through the decoder takes, no more"
    )
    args = parser.parse_args(argv)
    if args.memory:
        print_memory()
        return
    world, trained = WORLDS[args.world], load_pipeline(TRAINED[args.world])
    pipeline = load_untrained(world.base, layer=trained.source.layer)
    pictures = pictures_of(world, args.first, args.scenes)
    features = pipeline.features(pipeline.backbone.preprocess(pictures))
    other = open_backbone(world.independent[pipeline.source.backbone])
    expected = other.extract(other.preprocess(pictures))

    def row(what: str, gradients: int, evaluations: int, drawn: Tensor, features: FeatureMap = features) -> None:
        by_other = cosine(expected, other.extract(other.preprocess(drawn, "stretch"))).mean()
        own = pipeline.score(features, drawn).mean()
        print(f"| {what} | {gradients} | {evaluations} | {own:.3f} | {by_other:.3f} |", flush=True)

    print("| sampling | gradients | predictions | cosine | by the independent backbone |\n|---|---|---|---|---|")
    for sampling in map(sampling_of, args.rows):
        drawn = pipeline.draw(features, sampling, args.first)
        row(told(sampling), sampling.gradients(sampling.steps), sampling.evaluations(sampling.steps), drawn)
    plain = trained.recommended(gradient=0.0, best_of=1, steps=10)
    drawn = trained.draw(features, plain, trained.noise(range(args.first, args.first + len(pictures))))
    row("trained ControlNet, 10 steps, no gradient", 0, plain.evaluations, drawn)
    print(f"\n{digests_text(trained.digests)}")


def print_memory() -> None:
    """GB that the gradient of one picture takes at its peak in Stable Diffusion's decoder and in TAESD's, in float32
    and beside the weights; counted on tensors without storage."""
    print("| | 512 x 512 | 1024 x 1024 |\n|---|---|---|")
    for name, make in (
        ("all kept for the way back", lambda: AutoencoderKL(**VAE)),
        ("`--checkpointing`", lambda: AutoencoderKL(**VAE)),
        ("TAESD", AutoencoderTiny),
    ):
        print(f"| {name} |", *(f"{decoding_gigabytes(make, side, '--' in name):.2g} GB |" for side in (64, 128)))


def decoding_gigabytes(make: Callable[[], AutoencoderKL | AutoencoderTiny], side: int, checkpointing: bool) -> float:
    """GB at the peak of the gradient of latents [1, 4, side, side]. make: builds the autoencoder."""
    with FakeTensorMode():
        vae, latents = make().requires_grad_(False).eval(), torch.empty(1, 4, side, side)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        with (peak := Peak()):
            latents.requires_grad_(True)
            torch.autograd.grad((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).mean(), latents)
    return peak.peak / 1e9


def pictures_of(world: World, first: int, count: int) -> Tensor:
    """[count, 3, h, w] in 0..1 that no model has seen; of photographs as many as there are parts."""
    if world.draw:
        return world.draw(torch.arange(first, first + count))
    down, across = PARTS
    parts = [
        part[0]
        for _, photograph in sample_photographs()
        for row in photograph.tensor_split(down, 2)
        for part in row.tensor_split(across, 3)
    ]
    squares = torch.stack([F.interpolate(part[None], (224, 224), mode="bilinear", antialias=True)[0] for part in parts])
    return squares[first : first + count]


def sampling_of(text: str) -> UntrainedSampling:
    """A row's settings. Raises FeatInvError for a text that is none."""
    numbers, distance = text.split(","), "cosine"
    if len(numbers) == 7:
        *numbers, distance = numbers
    try:
        steps, moves, step, recurrence, start, end = map(float, [*numbers, *("0", "1")[len(numbers) - 4 :]][:6])
    except ValueError as error:
        raise FeatInvError(f"--rows {text}: expected STEPS,MOVES,STEP,RECURRENCE[,START,END[,DISTANCE]]") from error
    return UntrainedSampling(int(moves), step, int(recurrence), start, end, distance, steps=int(steps))


def told(sampling: UntrainedSampling) -> str:
    """The settings in words."""
    s = sampling
    share = f", from {s.start:g} to {s.end:g}" if (s.start, s.end) != (0, 1) else ""
    distance = f", {s.distance}" if s.distance != "cosine" else ""
    return f"{s.steps} steps, {s.moves} moves of {s.step:g}, recurrence {s.recurrence}{share}{distance}"


if __name__ == "__main__":
    run(main)
