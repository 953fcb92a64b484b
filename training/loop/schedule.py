"""What depends on the number of images seen: the learning rate, the random numbers, and what is due."""

from __future__ import annotations

import math

import numpy as np

from ..config import TrainConfig


def lr_at(images_seen: int, config: TrainConfig, per_step: int) -> float:
    """Learning rate of the step after `images_seen` images: linear warm-up, then constant or a half cosine to zero."""
    ramp = min(1.0, (images_seen + per_step) / max(config.warmup, 1))
    falling = 0.5 + 0.5 * math.cos(math.pi * images_seen / config.max_images) if config.schedule == "cosine" else 1.0
    return config.lr * ramp * falling


def step_seed(seed: int, images_seen: int) -> int:
    """64 bits for the step after `images_seen` of a run with this seed (>= 0), alike on every computer: numpy promises
    that a SeedSequence never changes."""
    return int(np.random.SeedSequence((seed, images_seen)).generate_state(1, np.uint64)[0])


def due(every: int, images_seen: int, per_step: int) -> bool:
    """Whether the step that ended at `images_seen` images went past a multiple of `every`."""
    return images_seen // every > (images_seen - per_step) // every
