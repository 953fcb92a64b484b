"""The list of images for training. Each is addressed by its index and read when needed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import no_images
from featinv_nodes.core.picture_files import Found, look_below

from ..config import STREAM
from .hugging_face import FORM, HUGGING_FACE, HuggingFace
from .identity import Stamp, stamp_of
from .shards import TarShards

#: every 25th picture is left aside where a world of photographs is made: settings are chosen on these
KEPT_BACK = 25


class Listing(Protocol):
    """Pictures in a fixed order. names: one per picture; open reads the one at an index, or raises whatever the
    decoder raises; stamp and encoded as in identity.Stamped; describe: how many there are, where, and what was left
    out and why."""

    names: Sequence[str]

    def open(self, index: int) -> Image.Image: ...

    def stamp(self, index: int) -> Stamp: ...

    def encoded(self, index: int) -> bytes: ...

    def describe(self) -> str: ...


class Folder:
    """All pictures below a folder, by name. Links are followed."""

    def __init__(self, folder: Path, found: Found | None = None) -> None:
        """found: what lies below it, where that is known already."""
        self.folder, self._found = folder, found or look_below(folder)
        self.names = self._found.pictures

    def open(self, index: int) -> Image.Image:
        return Image.open(self.folder / self.names[index])

    def stamp(self, index: int) -> Stamp:
        return stamp_of(self.folder / self.names[index])

    def encoded(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()

    def describe(self) -> str:
        folders, links = self._found.folders, self._found.links
        through = f", {links:,} reached through a link" if links else ""
        return f"{len(self.names):,} in {folders:,} folder{'s' * (folders != 1)}{through}{self._found.left_out.told()}"


class Joined:
    """Several listings one after another."""

    def __init__(self, parts: list[Listing]) -> None:
        self._parts = parts
        self.names = [name for part in parts for name in part.names]
        self._ends = list(accumulate(len(part.names) for part in parts))

    def _at(self, index: int) -> tuple[Listing, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)

    def open(self, index: int) -> Image.Image:
        part, own = self._at(index)
        return part.open(own)

    def stamp(self, index: int) -> Stamp:
        part, own = self._at(index)
        return part.stamp(own)

    def encoded(self, index: int) -> bytes:
        part, own = self._at(index)
        return part.encoded(own)

    def describe(self) -> str:
        return ", and ".join(part.describe() for part in self._parts)


def open_listing(data: str, images: int | None, write: bool = True) -> Listing:
    """A folder of pictures, of tar files, or of both (the tar files' come first), or "hf:" and a Hugging Face data set;
    images: only so many of them, evenly spread; write: as in TarShards. Raises FeatInvError where there are none, or
    fewer."""
    if data.startswith(HUGGING_FACE):
        listing: Listing = HuggingFace(data)
    elif data.startswith(STREAM):
        raise FeatInvError(
            f"data {data}: a stream can be trained on, not evaluated or listed; download the set, and write"
            f" {HUGGING_FACE}"
        )
    elif data and Path(data).is_dir():
        listing = _in_folder(Path(data), write)
    else:
        raise FeatInvError(
            f"data {data!r} is neither 'drawn' nor a folder, nor '{HUGGING_FACE}' and a Hugging Face data set"
            f" ({HUGGING_FACE}{FORM})"
        )
    if not listing.names:
        raise FeatInvError(f"{no_images(data)}: {listing.describe()}")
    return listing if images is None else Part(listing, images)


def _in_folder(folder: Path, write: bool) -> Listing:
    found = look_below(folder)
    if not found.tars:
        return Folder(folder, found)
    shards = TarShards([folder / name for name in found.tars], folder, write)
    loose = Folder(folder, found)
    return Joined([shards, loose]) if found.pictures or found.left_out.counts else shards


class Chosen:
    """Some of a listing's pictures, by their indices in it."""

    def __init__(self, whole: Listing, indices: list[int]) -> None:
        self._whole, self.indices = whole, indices
        self.names = [whole.names[index] for index in indices]

    def open(self, index: int) -> Image.Image:
        return self._whole.open(self.indices[index])

    def stamp(self, index: int) -> Stamp:
        return self._whole.stamp(self.indices[index])

    def encoded(self, index: int) -> bytes:
        return self._whole.encoded(self.indices[index])

    def describe(self) -> str:
        return f"{len(self.names):,} of {self._whole.describe()}"


def kept_back(whole: Listing) -> Chosen:
    """The pictures that making a world of photographs from this listing leaves aside."""
    return Chosen(whole, list(range(0, len(whole.names), KEPT_BACK)))


class Part(Chosen):
    """`count` of a listing's pictures, evenly spread over it."""

    def __init__(self, whole: Listing, count: int) -> None:
        if not 0 < count <= len(whole.names):
            raise FeatInvError(f"images {count}: expected 1 to {len(whole.names)}, as many as there are")
        super().__init__(whole, [k * len(whole.names) // count for k in range(count)])
