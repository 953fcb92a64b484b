"""Sampling as the evaluation does it, beside a loop that draws one image at a time."""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor

from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.prediction import controlled_prediction
from featinv_nodes.core.sampling import Sampling, set_timesteps
from featinv_nodes.worlds.drawn.scenes import draw

from ..loop.log import peak_memory
from ..models.pipeline import InversionPipeline, load_pipeline
from ..models.sampling import control


@torch.inference_mode()
def one_by_one(pipeline: InversionPipeline, features: FeatureMap, settings: Sampling, start: Tensor) -> Tensor:
    """The pictures [B, 3, h, w] of InversionPipeline.draw, drawn as the paper's released script does: one at a time,
    the features encoded again at every step, with guidance in two passes."""
    base, model, prompt = pipeline.base, pipeline.model, pipeline.info.prompt
    controlnet = partial(control, model.controlnet)
    pictures = []
    for row in range(len(start)):
        x, own = start[row : row + 1].to(base.unet.device), features.select(row).values.to(base.unet.device)
        passes = [(prompt, own, settings.guidance)]
        if settings.guidance != 1:
            passes.append(
                ("", torch.zeros_like(own) if settings.negative == "features" else own, 1 - settings.guidance)
            )
        set_timesteps(base.scheduler, settings.steps)
        for t in base.scheduler.timesteps:
            out = sum(
                share
                * controlled_prediction(
                    base.unet, controlnet, x, t, base.text[text], model.hint(values, x.shape[2:]), settings.strength
                ).float()
                for text, values, share in passes
            )
            x = base.scheduler.step(out, t, x).prev_sample
        pictures.append(base.decode(x).cpu())
    return torch.cat(pictures)


def compare(pipeline: InversionPipeline, features: FeatureMap, settings: Sampling, batch: int) -> dict[str, float]:
    """Images per second of both ways over the same maps, after a picture each that is not counted, and the largest
    difference of their pixels in 0..1: {"loop", "batched", "times", "difference"}."""
    start = pipeline.noise(range(len(features)))
    ways = {
        "loop": lambda f, x: one_by_one(pipeline, f, settings, x),
        "batched": lambda f, x: pipeline.draw(f, settings, x, batch),
    }
    speeds, drawn = {}, {}
    for name, way in ways.items():
        way(features.select(slice(0, 1)), start[:1])
        began = time.perf_counter()
        drawn[name] = way(features, start)  # the pictures are on the CPU: nothing is still running
        speeds[name] = len(features) / (time.perf_counter() - began)
    return speeds | {
        "times": speeds["batched"] / speeds["loop"],
        "difference": (drawn["loop"] - drawn["batched"]).abs().max().item(),
    }


def sampling(args: argparse.Namespace, count: int = 32) -> None:
    """Prints both speeds of an embedded model; benchmark.py gpu has those of models at real size."""
    pipeline = load_pipeline("tiny_cnn_last")
    pixel_values = pipeline.backbone.preprocess(draw(0, torch.arange(count), "held-out").image)
    settings = pipeline.recommended(gradient=0.0)
    speeds = compare(pipeline, pipeline.features(pixel_values), settings, count)
    print(
        f"{count} images, {settings.steps} steps, guidance {settings.guidance}, {torch.get_num_threads()} threads:"
        f" one at a time {speeds['loop']:.3g} images/s, in one batch {speeds['batched']:.3g} images/s,"
        f" {speeds['times']:.2f} times"
    )
    print(f"largest difference of a pixel {speeds['difference']:.1e}; peak memory {peak_memory():.1f} GB")
