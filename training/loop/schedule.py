"""What depends on the number of images seen: the learning rate, the random numbers, and what is due."""

from __future__ import annotations

import math

import numpy as np

from ..config import TrainConfig


def lr_at(seen: int, config: TrainConfig, per_step: int) -> float:
    """Learning rate of the step after `seen` images: linear warm-up, then constant or a half cosine to zero."""
    ramp = min(1.0, (seen + per_step) / max(config.warmup, 1))
    falling = 0.5 + 0.5 * math.cos(math.pi * seen / config.max_images) if config.schedule == "cosine" else 1.0
    return config.lr * ramp * falling


def step_seed(seed: int, seen: int) -> int:
    """64 bits for the step after `seen` images of a run with this seed (>= 0), alike on every computer: numpy promises
    that a SeedSequence never changes."""
    return int(np.random.SeedSequence((seed, seen)).generate_state(1, np.uint64)[0])


def due(every: int, seen: int, per_step: int) -> bool:
    """Whether the step that ended at `seen` images went past a multiple of `every`."""
    return seen // every > (seen - per_step) // every
