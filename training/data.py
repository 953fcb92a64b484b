"""Pictures for training: batches addressed by the count of images seen, so that a resumed run goes on exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.tiny_world.scenes import draw

AT_ONCE = 4096  # scenes drawn together on a GPU, where a batch takes no longer than a few
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class TinyWorld(Dataset):
    """Training scenes drawn on the fly, on the device; image number n is scene n."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)
        self._part: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitems__(self, numbers: list[int]) -> Tensor:
        wanted = torch.tensor(numbers, device=self.device)
        if self.device.type == "cpu" or numbers[0] // AT_ONCE != numbers[-1] // AT_ONCE:
            return draw(self.seed, wanted).image
        part = numbers[0] // AT_ONCE
        if self._part[0] != part:
            self._part = part, draw(self.seed, torch.arange(part * AT_ONCE, (part + 1) * AT_ONCE, device=self.device)).image
        return self._part[1][wanted - part * AT_ONCE]


class ImageFolder(Dataset):
    """All images below a folder, a new order each epoch, cropped as in the paper: random resized crop and flips.

    Image number n, its crop and its flips are functions of (seed, n).
    """

    def __init__(self, folder: Path, size: int, flips: str, seed: int) -> None:
        self.files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not self.files:
            raise FeatInvError(f"no images ({', '.join(sorted(SUFFIXES))}) below {folder}")
        self.size, self.flips, self.seed = size, flips, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitems__(self, numbers: list[int]) -> Tensor:
        return torch.stack([self._load(n) for n in numbers])

    def _load(self, number: int) -> Tensor:
        epoch, place = divmod(number, len(self.files))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.files)))
        chance = random.Random(f"{self.seed}/{number}")
        with Image.open(self.files[self._order[1][place]]) as opened:
            image = self._crop(opened.convert("RGB"), chance)
        x = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
        if self.flips != "none" and chance.random() < 0.5:
            x = x.flip(2)
        if self.flips == "both" and chance.random() < 0.5:
            x = x.flip(1)
        return x.contiguous()

    def _crop(self, image: Image.Image, chance: random.Random) -> Image.Image:
        """torchvision's random resized crop: 8 to 100 % of the area, aspect 3/4 to 4/3, ten tries, else the centre."""
        width, height = image.size
        for _ in range(10):
            area, aspect = width * height * chance.uniform(0.08, 1), 2 ** chance.uniform(-0.415, 0.415)
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = chance.randint(0, width - w), chance.randint(0, height - h)
                break
        else:
            w = h = min(width, height)
            left, top = (width - w) // 2, (height - h) // 2
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + w, top + h))


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


def open_source(name: str, size: int, flips: str, seed: int, device: torch.device | str = "cpu") -> Dataset:
    """"tiny" or a folder of images, each batch [B, 3, size, size] in 0..1."""
    if name == "tiny":
        return TinyWorld(seed, device)
    if not Path(name).is_dir():
        raise FeatInvError(f"data {name!r} is neither 'tiny' nor a folder")
    return ImageFolder(Path(name), size, flips, seed)


def loader(source: Dataset, start: int, batch: int, rank: int, processes: int, workers: int) -> Iterator[Tensor]:
    """Batches from image number `start` on, per process `batch` images."""
    numbers = Batches(start, batch, rank, processes)
    return iter(DataLoader(source, batch_sampler=numbers, num_workers=workers, collate_fn=lambda x: x, persistent_workers=workers > 0))
