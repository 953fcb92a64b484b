"""Latents and features that training/cache.py computed once, read by index and view.

A cache is a folder with one folder per part, "latents" and "features-BACKBONE-LAYER". A part has a manifest.json, which
says what its rows are of, and shards of SHARD images of one view, whose names end with the digest of what is inside.
One folder serves every backbone: the latents depend on the images, the crops and the autoencoder alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError

from ..checksum import is_whole, write_checksummed
from ..config import TrainConfig
from ..files import make_folder, write_json
from ..models.base_model import BaseModel
from .batch import Batch
from .identity import what_changed
from .loader import Photographs, Scenes, fill, open_source, sides
from .stream import Stream

SHARD = 4096
COMMAND = "python training/cache.py makes it, from the same configuration"


class Part:
    """One kind of rows: `name` of the tensor, "moments" or "features". manifest: what they are of, identity: that of
    the pictures."""

    def __init__(
        self, folder: Path, name: str, manifest: dict, identity: dict[str, str], pictures: int, views: int
    ) -> None:
        self.folder, self.name, self.manifest, self.identity = folder, name, manifest | identity, identity
        self.pictures, self.views = pictures, views

    def open(self) -> None:
        """Raises FeatInvError, naming the difference, if the folder holds rows of something else, or nothing."""
        try:
            there = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FeatInvError(f"there is no cache in {self.folder}; {COMMAND}") from error
        except ValueError as error:
            raise FeatInvError(f"{self.folder / 'manifest.json'} is damaged ({error}); remove the folder") from error
        wrong = [
            f"{key}: {there.get(key)} there, {value} wanted"
            for key, value in self.manifest.items()
            if there.get(key) != value and key not in self.identity
        ]
        if wrong:
            raise FeatInvError(
                f"{self.folder} is a cache of something else ({'; '.join(wrong)}); choose another --cache folder"
            )
        if changed := what_changed(there, self.identity):
            raise FeatInvError(
                f"{self.folder} was made from other images than those that are there now, by their {changed}; to make"
                " it again choose another --cache folder, or remove this one"
            )

    def begin(self) -> None:
        """Makes the folder, or raises as open does."""
        make_folder(self.folder)
        if not (self.folder / "manifest.json").exists():
            write_json(self.folder / "manifest.json", self.manifest)
        self.open()

    def shards(self) -> list[tuple[int, int]]:
        """(view, first index) of every shard there should be."""
        return [(view, first) for view in range(self.views) for first in range(0, self.pictures, SHARD)]

    def file(self, view: int, first: int) -> Path | None:
        """The shard's file, not looked into; None if it is not there."""
        return next(iter(sorted(self.folder.glob(f"view{view:04d}-{first:010d}-*.safetensors"))), None)

    def write(self, view: int, first: int, rows: Tensor, failed: dict[int, str]) -> Path:
        """rows [n, ...] of the indices from `first` on, kept in fp16; failed: row -> why its picture could not be
        read."""
        content = save({self.name: rows.half().contiguous()}, {"failed": json.dumps(failed)})
        return write_checksummed(
            self.folder, f"view{view:04d}-{first:010d}", ".safetensors", lambda file: file.write(content)
        )

    def check(self, rank: int = 0, processes: int = 1) -> None:
        """Reads every shard, one process its share. Raises FeatInvError naming those that are missing or damaged."""
        wrong = []
        for view, first in self.shards()[rank::processes]:
            file = self.file(view, first)
            if file is None or not is_whole(file):
                wrong.append(f"{file or f'view {view}, images from {first} on'} is {'damaged' if file else 'missing'}")
        if wrong:
            raise FeatInvError(f"the cache {self.folder} is not complete: {'; '.join(wrong[:5])}; {COMMAND} again")

    def read(self, index: int, view: int) -> tuple[Tensor, str | None]:
        """The row of a picture's view in fp16, and why it is empty where the picture could not be read."""
        first = index - index % SHARD
        rows, failed = _opened(self.folder, self.name, view, first)
        return rows[index - first], failed.get(str(index - first))


@lru_cache(maxsize=4096)
def _opened(folder: Path, name: str, view: int, first: int) -> tuple[object, dict[str, str]]:
    """A shard's rows, read when they are asked for, and its failures; opened once per process."""
    (file,) = folder.glob(f"view{view:04d}-{first:010d}-*.safetensors")
    opened = safe_open(file, "pt")
    return opened.get_slice(name), json.loads(opened.metadata()["failed"])


def parts_of(config: TrainConfig, source: Scenes | Photographs, base: BaseModel, backbone: Backbone) -> list[Part]:
    """The parts that the configuration asks for, with what their rows must be of."""
    views = config.views if isinstance(source, Photographs) else 1
    crops = {
        "pictures": len(source),
        "seed": config.seed,
        "flips": config.flips if isinstance(source, Photographs) else "none",
        "shard": SHARD,
    }
    latents = crops | {"resolution": base.resolution, "autoencoder": exact_digest(base.vae)}
    parts = [Part(Path(config.cache) / "latents", "moments", latents, source.identity, len(source), views)]
    if config.cache_features:
        features = crops | {
            "features": replace(backbone.source(config.layer, config.pooled), weights="").to_dict(),
            "backbone": exact_digest(backbone.model),
        }
        name = re.sub(r"[^\w.-]+", "_", f"features-{backbone.name}-{config.layer}{'-pooled' if config.pooled else ''}")
        features = json.loads(json.dumps(features))
        parts.append(Part(Path(config.cache) / name, "features", features, source.identity, len(source), views))
    return parts


def exact_digest(module: nn.Module) -> str:
    """Of all of a model's weights as they are now, in bf16, which training may keep them in: a cache is read by runs of
    either precision. core/digests.py tells models apart as they were opened."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.bfloat16().view(torch.int16) if values.is_floating_point() else values
        sha.update(name.encode() + values.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


class Cached(Dataset):
    """A source whose rows are in a cache. Other entries are rendered from the pictures."""

    def __init__(self, source: Scenes | Photographs, parts: list[Part]) -> None:
        self.source, self.parts = source, parts
        self.name, self.entry, self.identity, self.describe = (
            source.name,
            source.entry,
            source.identity,
            source.describe,
        )
        self._rest = len(parts) == 1  # the latents alone: features come from the pictures

    def render(self, entries: list[tuple[int, int]]) -> tuple[dict[str, Tensor], dict[int, str]]:
        tensors, failed = self.source.render(entries) if self._rest else ({}, {})
        for part in self.parts:
            rows, reasons = zip(*(part.read(index, view) for index, view in entries))
            tensors[part.name] = torch.stack(rows)
            failed |= {row: reason for row, reason in enumerate(reasons) if reason}
        return tensors, failed

    def __getitems__(self, numbers: list[int]) -> Batch:
        return fill(self, numbers)


def open_pictures(
    config: TrainConfig,
    base: BaseModel,
    backbone: Backbone,
    device: torch.device | str,
    rank: int,
    processes: int,
    write: bool = True,
) -> Scenes | Photographs | Stream | Cached:
    """The configuration's pictures, from its cache where it names one, every shard of which is read once by one of the
    processes; write: as in TarShards. Raises FeatInvError for a cache of something else, or an incomplete one."""
    crop_sides = sides(base, backbone)
    if not config.cache:
        return open_source(config, crop_sides, device, write)
    source = open_source(config, {"pictures": crop_sides["pictures"]}, device, write)
    parts = parts_of(config, source, base, backbone)
    for part in parts:
        part.open()
        part.check(rank, processes)
    return Cached(source, parts)
