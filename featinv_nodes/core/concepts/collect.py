"""Collects feature vectors of many images: evenly, at random locations, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..backbones import Backbone
from ..errors import FeatInvError
from ..feature_map import FeatureMap, concatenate
from ..images import find_images, read_image
from ..waiting import Progress, unchecked

EVALUATED, BATCH = 128, 16
Batch = tuple[list[str], Tensor]  # names and preprocessed pictures [b, 3, h, w] in 0..1


@dataclass(frozen=True)
class Collected:
    """vectors: [N, C]. maps: the whole maps of the pictures that concepts are evaluated on. pictures: these, [J, 3, h,
    w] in 0..255 (uint8). names: theirs, with the folder of their class. read: how many pictures in all. classes: how
    many folders below the one given these lie in."""

    vectors: Tensor
    maps: FeatureMap
    pictures: Tensor
    names: list[str]
    read: int
    classes: int

    def describe(self) -> str:
        classes = f" in {self.classes:,} class folder{'s' * (self.classes != 1)}" if self.classes else ""
        return f"{self.read:,} image{'s' * (self.read != 1)}{classes}: {len(self.vectors):,} feature vectors"


@dataclass
class Pictures:
    """Pictures [B, 3, h, w] in 0..1 that are there already, called NAME 0, NAME 1, ..."""

    images: Tensor
    backbone: Backbone
    resize_mode: str = "crop"
    name: str = "image"

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, progress: Progress = unchecked) -> Iterator[Batch]:
        """16 pictures at a time, preprocessed. progress: called for each."""
        for numbers in torch.arange(len(self.images)).split(BATCH):
            pixel_values = []
            for number in numbers.tolist():
                progress(number, len(self))
                pixel_values.append(self.backbone.preprocess(self.images[number : number + 1].cpu(), self.resize_mode))
            yield [f"{self.name} {n}" for n in numbers.tolist()], torch.cat(pixel_values)

    def skipped(self) -> str:
        return ""


@dataclass
class Folder:
    """The pictures below a folder in a random order, `most` of them at most; why files could not be read gathers in
    `unreadable`."""

    folder: Path
    backbone: Backbone
    resize_mode: str = "crop"
    most: int = 10**9
    seed: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = find_images(self.folder)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed))
        self.files = [files[i] for i in order[: self.most].tolist()]

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, progress: Progress = unchecked) -> Iterator[Batch]:
        """16 pictures at a time, preprocessed. progress: called for each file. Raises FeatInvError if none can be
        read."""
        for start in range(0, len(self.files), BATCH):
            names, pixel_values = [], []
            for number, file in enumerate(self.files[start : start + BATCH], start):
                progress(number, len(self))
                try:
                    pixel_values.append(self.backbone.preprocess(read_image(file), self.resize_mode))
                    names.append(file.relative_to(self.folder).as_posix())
                except FeatInvError as error:
                    self.unreadable.append(str(error))
            if pixel_values:
                yield names, torch.cat(pixel_values)
        if len(self.unreadable) == len(self.files):
            raise FeatInvError(
                f"none of the {len(self.files)} images below {self.folder} can be read; the first: {self.unreadable[0]}"
            )

    def skipped(self) -> str:
        """What was not read, or nothing."""
        if not self.unreadable:
            return ""
        return "\n  ".join([f"skipped {len(self.unreadable)} of {len(self.files)} images:", *self.unreadable])


def collect(
    pictures: Pictures | Folder,
    extract: Callable[[Tensor], FeatureMap],
    count: int,
    seed: int,
    progress: Progress = unchecked,
) -> Collected:
    """Up to `count` feature vectors of all pictures, as many from each, at locations drawn with the seed.

    extract: preprocessed pictures [b, 3, h, w] to their feature maps. progress: called with pictures done, of how many,
    for each picture; what it raises ends the collecting.
    The first 128 pictures and their maps are kept to evaluate the concepts on. Memory: 2 count C numbers, those maps
    and pictures (the latter as bytes), and what a batch of 16 takes.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors, maps, images, read = [], [], [], 0
    names: list[str] = []
    classes: set[str] = set()
    total = len(pictures)
    for labels, pixel_values in pictures.batches(progress):
        features = extract(pixel_values).to("cpu")
        for cells in rearrange(features.values, "b c h w -> b (h w) c"):
            share = (read + 1) * count // total - read * count // total
            vectors.append(cells[torch.randperm(len(cells), generator=generator)[:share]])
            read += 1
        classes |= {label.rpartition("/")[0] for label in labels if "/" in label}
        room = EVALUATED - len(names)
        if room > 0:
            maps.append(features.select(slice(0, room)))
            images.append((pixel_values[:room].cpu() * 255).round().byte())
            names += labels[:room]
    progress(total, total)
    return Collected(torch.cat(vectors), concatenate(maps), torch.cat(images), names, read, len(classes))
