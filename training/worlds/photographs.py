"""Folders of photographs in memory, and random crops of them for the stages of a world of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import as_seen
from training.data.listing import KEPT_BACK, Listing, open_listing

MARGIN = 1.05  # pictures are kept so much larger than the crops
FEWEST = 200


class Photographs:
    """Square photographs as bytes, on the device.

    pictures: uint8 [N, 3, side, side]. crop: side of the crops in pixels, what the backbone reads. kept_back: uint8 of
    those that no stage sees.
    """

    def __init__(self, pictures: Tensor, kept_back: Tensor, crop: int) -> None:
        self.pictures, self.kept_back, self.crop = pictures, kept_back, crop

    @property
    def margin(self) -> int:
        """How many pixels a crop can move."""
        return self.pictures.shape[2] - self.crop

    def random(self, count: int) -> Tensor:
        """[count, 3, crop, crop] in 0..1: random crops of random pictures, half of them mirrored."""
        device = self.pictures.device
        rows = torch.randint(len(self.pictures), (count,), device=device)
        top, left = (torch.randint(self.margin + 1, (count,), device=device) for _ in range(2))
        return self.crops(rows, top, left, torch.rand(count, device=device) < 0.5)

    def crops(self, rows: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        """[B, 3, crop, crop] in 0..1: of the pictures `rows` [B], from the pixel (top, left) on, mirrored where
        `mirrored` says so."""
        along = torch.arange(self.crop, device=rows.device)
        y = (top[:, None] + along)[:, None, :, None]
        x = left[:, None] + torch.where(mirrored[:, None], along.flip(0), along)
        channel = torch.arange(3, device=rows.device)[None, :, None, None]
        return self.pictures[rows[:, None, None, None], channel, y, x[:, None, None, :]].float() / 255

    def held_out(self, count: int) -> Tensor:
        """[count, 3, crop, crop] in 0..1: the centres of pictures that were kept back, evenly spread."""
        chosen = self.kept_back[torch.linspace(0, len(self.kept_back) - 1, min(count, len(self.kept_back))).long()]
        first = self.margin // 2
        return chosen[:, :, first : first + self.crop, first : first + self.crop].float() / 255


def scaled(pictures: Tensor, side: int) -> Tensor:
    """Square pictures [B, 3, h, h] at another side, antialiased."""
    return (
        pictures
        if pictures.shape[2] == side
        else F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
    )


def read_photographs(folders: Sequence[str], crop: int, device: str = "cpu") -> Photographs:
    """Every picture of folders of pictures or tar shards, its centre square scaled to MARGIN times the crop.

    Those that cannot be read are left out, counted and named. Raises FeatInvError for folders with too few.
    """
    side, rows, back, wrong = round(crop * MARGIN), [], [], []
    for folder in folders:
        listing = open_listing(folder, None)

        def read(index: int, listing: Listing = listing) -> np.ndarray | str:
            """The square picture, or what was wrong with it."""
            try:
                with listing.open(index) as opened:
                    return np.asarray(ImageOps.fit(as_seen(opened), (side, side), Image.Resampling.BICUBIC))
            except Exception as error:  # decoders raise whatever they stumble over
                return f"{listing.names[index]} ({type(error).__name__})"

        indices = range(len(listing.names))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # decoders let other threads run
            for index, read_one in tqdm(
                zip(indices, pool.map(read, indices)), f"reading {folder}", len(indices), unit="img", mininterval=5
            ):
                if isinstance(read_one, str):
                    wrong.append(read_one)
                else:
                    rows.append(read_one)
                    back.append(index % KEPT_BACK == 0)  # by its index in the folder, as evaluate.py --kept-back counts
    if wrong:
        print(
            f"left out {len(wrong)} that cannot be read:"
            f" {', '.join(wrong[:5])}{' and others' if len(wrong) > 5 else ''}"
        )
    if len(rows) < FEWEST:
        raise FeatInvError(
            f"{', '.join(folders)}: {len(rows)} photographs that can be read; a world needs at least {FEWEST}, a good"
            " one tens of thousands"
        )
    pictures = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    kept = torch.tensor(back)
    print(
        f"{len(pictures):,} photographs from {len(folders)} folder{'s' * (len(folders) != 1)}; {kept.sum():,} are kept"
        " back from training"
    )
    return Photographs(pictures[~kept].to(device), pictures[kept].to(device), crop)
