"""Counts the images that an inversion model needs from scratch, and from another model's weights file.

    python training/experiments/transfer.py                     tiny_vit_last, from the shipped tiny_cnn_last
    python training/experiments/transfer.py --config FILE --from FILE --images 25600 --every 3200 \\
        --encoder-first 1600 --out DIR

Trains the configuration twice at a constant rate, and measures the cosine similarity of 64 held-out scenes after every
--every images. Writes transfer.json: both curves, and the images after which each reaches 95 % of the final cosine from
scratch (interpolated linearly). The same command continues a stopped run. Without torch.compile, since a run starts
again after each measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn.scenes import draw
from training.cli import run
from training.config import CONFIGS, TrainConfig, read_config
from training.files import make_folder, write_json
from training.loop.training import train
from training.models.pipeline import load_pipeline

SCENES = 64
SHARE = 0.95


def held_out_cosine(file: Path) -> float:
    """Mean cosine similarity of the features of held-out scenes and of their reconstructions, at the file's
    settings without guidance by the gradient: what the weights have learned."""
    pipeline = load_pipeline(str(file))
    features = pipeline.features(pipeline.backbone.preprocess(draw(0, torch.arange(SCENES), "held-out").image))
    return (
        pipeline.score(
            features, pipeline.draw(features, pipeline.recommended(gradient=0.0), pipeline.noise(range(SCENES)))
        )
        .mean()
        .item()
    )


def curve(config: TrainConfig, folder: Path, images: int, every: int) -> list[tuple[int, float]]:
    """(images, cosine) of a run, which is stopped for each measurement and continues exactly. The measurements
    are kept beside it. Raises FeatInvError if they belong to another configuration."""
    make_folder(folder)
    points_file, about = folder / "points.json", json.loads(json.dumps(asdict(config) | {"max_images": None}))
    saved = {"config": about, "points": []}
    if points_file.is_file():
        saved = json.loads(points_file.read_text(encoding="utf-8"))
    other = [name for name in about if saved["config"].get(name) != about[name]]
    if other:
        raise FeatInvError(
            f"{points_file} holds what was measured of another run ({', '.join(other)} differ); give another --out, or"
            " delete it"
        )
    points = [tuple(point) for point in saved["points"]]
    for count in range(every, images + 1, every):
        if count > (points[-1][0] if points else 0):
            config.max_images = count
            points.append((count, held_out_cosine(train(config, folder))))
            write_json(points_file, {"config": about, "points": points})
            print(f"{folder.name}: {count} images, cosine {points[-1][1]:.3f}", flush=True)
    return [point for point in points if point[0] <= images]


def images_to_reach(points: list[tuple[int, float]], value: float) -> float | None:
    """Where the curve first reaches the value, linear between points; None if it does not."""
    for (n, a), (m, b) in zip([(0, 0.0), *points], points):
        if b >= value:
            return m if a >= b or n == 0 else n + (m - n) * (value - a) / (b - a)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "tiny_vit_last.yaml")
    parser.add_argument(
        "--from", dest="source", default="tiny_cnn_last", help="weights file, or a shipped model's name"
    )
    parser.add_argument("--images", type=int, default=25_600)
    parser.add_argument("--every", type=int, default=3_200)
    parser.add_argument("--encoder-first", type=int, default=1_600)
    parser.add_argument("--out", type=Path, default=Path("out/transfer"))
    args = parser.parse_args()
    if not 0 < args.every <= args.images:
        raise FeatInvError(f"--every {args.every}: expected 1 to --images, {args.images}")
    make_folder(args.out)
    runs = {
        "scratch": {},
        "transfer": {"init_from": str(model_file(args.source)), "encoder_first": str(args.encoder_first)},
    }
    curves = {}
    for name, changes in runs.items():
        fixed = {"schedule": "constant", "panel_every": "1000000000", "save_every": "1000000000"}
        curves[name] = curve(read_config(args.config, fixed | changes), args.out / name, args.images, args.every)
    final = curves["scratch"][-1][1]
    needed = {name: images_to_reach(points, SHARE * final) for name, points in curves.items()}
    write_json(
        args.out / "transfer.json",
        {
            "config": args.config.stem,
            "from": args.source,
            "scenes": SCENES,
            "share": SHARE,
            "final": final,
            "images_needed": needed,
            "curves": curves,
        },
    )
    print(
        f"images to {SHARE:.0%} of cosine {final:.3f}, from scratch and by transfer: {needed}; see"
        f" {args.out / 'transfer.json'}"
    )


if __name__ == "__main__":
    run(main)
