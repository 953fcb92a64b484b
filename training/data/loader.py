"""Images for training: batches addressed by the count of images seen, so that a resumed run continues exactly."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import drawing_world
from featinv_nodes.worlds.drawn.scenes import draw

from ..config import STREAM, TrainConfig
from ..models.base_model import BaseModel
from .batch import REMEDY, TRIES, Batch, Unreadable, crops, leave_signals, plainly
from .identity import identity
from .listing import Listing, open_listing
from .stream import Reading, Stream

AT_ONCE = 4096  # scenes drawn together on a GPU, where a batch takes no longer than a few


class Scenes(Dataset):
    """Training scenes drawn on the fly, on the device; image number n is scene n, or n modulo `images`."""

    def __init__(self, seed: int, device: torch.device | str = "cpu", images: int | None = None) -> None:
        self.seed, self.device, self.images = seed, torch.device(device), images
        self._part: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        if self.images is None:
            raise FeatInvError("the drawn world has no end; say how many of its scenes with --images")
        return self.images

    @property
    def identity(self) -> dict[str, str]:
        return {"scenes": f"scenes of seed {self.seed}"}

    def describe(self) -> str:
        return f"scenes of the drawn world, drawn as needed{f', {self.images:,} of them' if self.images else ''}"

    def name(self, index: int) -> str:
        return f"scene {index}"

    def entry(self, number: int) -> tuple[int, int]:
        """(scene, view) of image `number`; scenes have one view."""
        return (number % self.images if self.images else number), 0

    def render(self, entries: list[tuple[int, int]]) -> tuple[dict[str, Tensor], dict[int, str]]:
        return {"pictures": self._draw([scene for scene, _ in entries])}, {}

    def __getitems__(self, numbers: list[int]) -> Batch:
        return Batch(self.render([self.entry(n) for n in numbers])[0], [])

    def _draw(self, scenes: list[int]) -> Tensor:
        numbers = torch.tensor(scenes, device=self.device)
        if self.device.type == "cpu" or scenes[0] // AT_ONCE != scenes[-1] // AT_ONCE or scenes[0] > scenes[-1]:
            return draw(self.seed, numbers).image
        part = scenes[0] // AT_ONCE
        if self._part[0] != part:
            self._part = (
                part,
                draw(self.seed, torch.arange(part * AT_ONCE, (part + 1) * AT_ONCE, device=self.device)).image,
            )
        return self._part[1][numbers - part * AT_ONCE]


class Photographs(Dataset):
    """A listing's pictures, a new order each epoch, cropped as in the paper: random resized crop and flips.

    A view is one crop and its flips, a function of (seed, index in the listing, view). Epoch e shows view e of every
    picture, or e modulo `views`. Each tensor named in `sides` holds the same crop, scaled from the original to that
    many pixels a side.
    """

    def __init__(self, listing: Listing, sides: dict[str, int], flips: str, seed: int, views: int = 0) -> None:
        self.listing, self.sides, self.flips, self.seed, self.views = listing, sides, flips, seed, views
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.listing.names)

    @cached_property
    def identity(self) -> dict[str, str]:
        """See identity.identity; computed when it is first needed."""
        return identity(self.listing)

    def describe(self) -> str:
        return self.listing.describe()

    def name(self, index: int) -> str:
        return self.listing.names[index]

    def entry(self, number: int) -> tuple[int, int]:
        """(index, view) of image `number`."""
        epoch, position = divmod(number, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self)))
        return int(self._order[1][position]), epoch % self.views if self.views else epoch

    def render(self, entries: list[tuple[int, int]]) -> tuple[dict[str, Tensor], dict[int, str]]:
        """Tensors of (index, view) entries, rows of zeros for pictures that cannot be read, and row -> reason of
        these."""
        rows = {name: torch.zeros(len(entries), 3, side, side) for name, side in self.sides.items()}
        failed = {}
        for row, (index, view) in enumerate(entries):
            try:
                for name, crop in self._crops(index, view).items():
                    rows[name][row] = crop
            except Unreadable as error:
                failed[row] = str(error)
        return rows, failed

    def __getitems__(self, numbers: list[int]) -> Batch:
        return fill(self, numbers)

    def _crops(self, index: int, view: int) -> dict[str, Tensor]:
        return crops(
            lambda: self.listing.open(index), self.sides, self.flips, random.Random(f"{self.seed}/{index}/{view}")
        )


def fill(source: Photographs, numbers: list[int]) -> Batch:
    """The batch of image numbers from a source's entry, render and name; a picture that cannot be read gives way to the
    next in its epoch's order, which is a function of the number too. Raises FeatInvError after TRIES of them in a
    row."""
    tensors, failed = source.render([source.entry(n) for n in numbers])
    skipped = []
    for row, reason in failed.items():
        for other in range(numbers[row], numbers[row] + TRIES):
            index, view = source.entry(other)
            if other > numbers[row]:
                again, wrong = source.render([(index, view)])
                if not wrong:
                    for name in tensors:
                        tensors[name][row] = again[name][0]
                    break
                reason = wrong[0]
            skipped.append((source.name(index), reason))
        else:
            raise FeatInvError(
                f"{TRIES} images in a row could not be read, {skipped[-1][0]} the last ({skipped[-1][1]}); {REMEDY}"
            )
    return Batch(tensors, skipped)


class Batches(Sampler):
    """Endless lists of image numbers for one process: the share of `rank` in each global batch, from `start` on."""

    def __init__(self, start: int, batch: int, rank: int, processes: int) -> None:
        self.start, self.batch, self.rank, self.processes = start, batch, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start
        while True:
            own = first + self.rank * self.batch
            yield list(range(own, own + self.batch))
            first += self.batch * self.processes


def sides(base: BaseModel, backbone: Backbone) -> dict[str, int]:
    """Sides of a step's crops in pixels: the backbone's input, and the base model's resolution if it differs."""
    side = max(backbone.input_size)
    return {"pictures": side} if side == base.resolution else {"pictures": side, "target": base.resolution}


def open_source(
    config: TrainConfig, crop_sides: dict[str, int], device: torch.device | str = "cpu", write: bool = True
) -> Scenes | Photographs | Stream:
    """The configuration's pictures, cropped to the `crop_sides` sides; write: as in TarShards. Raises FeatInvError
    where there are none."""
    if drawing_world(config.data):
        return Scenes(config.seed, device, config.images)
    if config.data.startswith(STREAM):
        return Stream(config.data, crop_sides, config.flips, config.seed)
    listing = open_listing(config.data, config.images, write)
    return Photographs(listing, crop_sides, config.flips, config.seed, config.views)


def as_it_is(batch: tuple) -> tuple:
    """What a loader makes of a batch that is one already."""
    return batch


def loader(
    source: Dataset | Stream,
    start: int,
    batch: int,
    rank: int,
    processes: int,
    workers: int,
    pin: bool = False,
    state: dict | None = None,
) -> Generator[Batch] | Reading:
    """Batches from image number `start` on, per process `batch` images; of a stream from where `state` says, see
    Reading. To be closed."""
    if isinstance(source, Stream):
        return Reading(source, batch, rank, processes, workers, pin, state)
    numbers = Batches(start, batch, rank, processes)
    batches = DataLoader(
        source,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=as_it_is,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=leave_signals,
    )
    return plainly(batches)
