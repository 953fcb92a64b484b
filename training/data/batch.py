"""Batches of crops for a training step."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import as_seen

TRIES = 100  # pictures in a row that cannot be read before the data itself is in doubt
REMEDY = "check that --data is still there, and that its images open in a viewer"


class Batch(NamedTuple):
    """tensors: "pictures" [B, 3, side, side] in 0..1 and others alike, a row per image number. skipped: name and
    reason of pictures that could not be read and were replaced by the next in the order."""

    tensors: dict[str, Tensor]
    skipped: list[tuple[str, str]]


def leave_signals(_: int) -> None:
    """In a loader's worker: Ctrl-C and SIGTERM reach every process of a terminal or a job, and are for the training
    loop, which still needs its workers to end well. They end with it, see plainly."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def plainly(loader: DataLoader) -> Generator:
    """The loader's batches; errors of a worker are raised as if they had happened in this process. Close it:
    workers that ignore signals would keep the process from ending."""
    batches = iter(loader)
    try:
        yield from batches
    except FeatInvError as error:
        raise FeatInvError(str(error).rstrip().rpartition("FeatInvError: ")[2]) from error
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # what its __del__ does, too late where a traceback holds it


class Unreadable(Exception):
    """A picture that cannot be read, and why."""

    @classmethod
    def because(cls, error: Exception) -> Unreadable:
        """From whatever a decoder raised. Pillow names the object that it was given, whose address says nothing."""
        if isinstance(error, UnidentifiedImageError):
            return cls("UnidentifiedImageError: empty, cut off at its start, or no image of a kind that Pillow knows")
        return cls(f"{type(error).__name__}: {error}")


def crops(
    opened: Callable[[], Image.Image], sides: dict[str, int], flips: str, rng: random.Random
) -> dict[str, Tensor]:
    """The same random resized crop and flips (paper Sec. 2), scaled from the original to each of `sides`: name ->
    pixels a side gives name -> [3, side, side] in 0..1. flips: as in TrainConfig. Raises Unreadable where `opened`
    raises."""
    try:
        with opened() as picture:
            image = as_seen(picture)
    except Exception as error:  # decoders raise whatever they stumble over
        raise Unreadable.because(error) from error
    box = _crop(*image.size, rng)
    across, down = flips != "none" and rng.random() < 0.5, flips == "both" and rng.random() < 0.5
    tensors = {}
    for name, side in sides.items():
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box), np.float32) / 255
        tensors[name] = torch.from_numpy(pixels[:: -1 if down else 1, :: -1 if across else 1].copy()).permute(2, 0, 1)
    return tensors


def _crop(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """torchvision's random resized crop: 8 to 100 % of the area, aspect 3/4 to 4/3, ten tries, else the centre."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(0.08, 1), 2 ** rng.uniform(-0.415, 0.415)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
