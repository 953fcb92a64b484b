"""Writes the latents of a configuration's images to disk, and with --cache-features true also their features.

    python training/cache.py --config FILE --data FOLDER --base ... --cache DIR --views 1
    accelerate launch training/cache.py --config FILE ...                  on several devices

The options are those of train.py, which then reads the cache instead of running the autoencoder. A view of an image is
a crop with its flips. Seed, image and view number determine it, in the cache as in training. The same command
continues a stopped cache. It first reads back the files that exist, and makes damaged ones again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from training.checksum import is_whole
from training.cli import run
from training.config import TrainConfig, parse_arguments
from training.data.latent_cache import SHARD, Part, parts_of
from training.data.loader import Photographs, Scenes, as_it_is, open_source, sides
from training.loop.objective import cast_frozen, observed_features, observed_moments
from training.loop.setup import open_frozen, own_device, with_precision

Entry = tuple[int, int]  # index, view


class Entries(Dataset):
    """A source that is indexed by (index, view) instead of image numbers."""

    def __init__(self, source: Scenes | Photographs) -> None:
        self.source = source

    def __getitems__(self, entries: list[Entry]) -> tuple[list[Entry], dict[str, Tensor], dict[int, str]]:
        return entries, *self.source.render(entries)


def missing(parts: list[Part], view: int, first: int) -> list[Part]:
    """The parts whose shard has to be made; damaged ones are named and removed."""
    todo = []
    for part in parts:
        file = part.file(view, first)
        if file is not None and not is_whole(file):
            tqdm.write(f"{file} is damaged and made again")
            file.unlink()
        if part.file(view, first) is None:
            todo.append(part)
    return todo


def batches(shards: list[Entry], pictures: int, size: int) -> Iterator[list[Entry]]:
    """The entries of shards (view, first index), none across two of them."""
    for view, start in shards:
        end = min(start + SHARD, pictures)
        for first in range(start, end, size):
            yield [(index, view) for index in range(first, min(first + size, end))]


def fill(config: TrainConfig) -> None:
    """Makes the missing files of the configuration's cache. Raises FeatInvError if it names no cache, or the
    folder holds another one."""
    if not config.cache:
        raise FeatInvError("say where with --cache DIR")
    config, precision = with_precision(config, own_device())
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device, main = accelerator.device, accelerator.is_main_process
    base, backbone = open_frozen(config, device)
    cast_frozen(config, base, backbone)
    crop_sides = sides(base, backbone) if config.cache_features else {"target": base.resolution}
    source = open_source(config, crop_sides, device if config.workers == 0 else "cpu")
    if main:
        print(f"images: {source.describe()}\n{precision}")
    parts = parts_of(config, source, base, backbone)
    with accelerator.main_process_first():
        for part in parts:
            part.begin()
    own = parts[0].shards()[accelerator.process_index :: accelerator.num_processes]
    missed = {
        shard: todo
        for shard in tqdm(own, "reading back", unit="shard", disable=not main)
        if (todo := missing(parts, *shard))
    }
    loader = DataLoader(
        Entries(source),
        batch_sampler=list(batches(list(missed), len(source), config.batch)),
        num_workers=config.workers,
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda" and config.workers > 0,
    )
    rows: dict[str, list[Tensor]] = {part.name: [] for part in parts}
    failed: dict[int, str] = {}
    for entries, tensors, wrong in tqdm(loader, "caching", unit="batch", disable=not main):
        with accelerator.autocast():
            batch = {name: x.to(device) for name, x in tensors.items()}
            computed = {"moments": observed_moments(base, batch)} | (
                {"features": observed_features(backbone, batch, config)} if config.cache_features else {}
            )
        done = sum(map(len, rows[parts[0].name]))
        failed |= {done + row: reason for row, reason in wrong.items()}
        for name, values in computed.items():
            rows[name].append(values.half().cpu())
        (index, view), end = entries[-1], done + len(entries)
        if end == SHARD or index == len(source) - 1:
            for part in missed[view, index + 1 - end]:
                part.write(view, index + 1 - end, torch.cat(rows[part.name]), failed)
            rows, failed = {name: [] for name in rows}, {}
    accelerator.wait_for_everyone()
    if main:
        size = sum(file.stat().st_size for part in parts for file in part.folder.glob("*.safetensors")) / 1e9
        print(
            f"{len(source)} images, {parts[0].views} views, {size:.2f} GB in {config.cache}; {len(missed)} of this"
            f" process's {len(own)} shards were made now"
        )


if __name__ == "__main__":
    run(lambda: fill(parse_arguments(__doc__)[0]))
