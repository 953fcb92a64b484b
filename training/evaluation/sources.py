"""Where the images come from that a model is evaluated on, and which of them are taken, in which order.

The order is by name, and by class where --per-class asks for as many of each. An image's number is its index in that
order; it is the seed of everything random that is done for the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError, some_of
from featinv_nodes.core.images import LARGEST, SMALLEST, as_seen, as_tensor
from featinv_nodes.worlds import drawing_world
from featinv_nodes.worlds.drawn.scenes import draw

from ..data.batch import Unreadable
from ..data.hugging_face import HUGGING_FACE
from ..data.identity import fingerprint
from ..data.listing import Chosen, Listing, Part, open_listing
from ..data.listing import kept_back as listing_kept_back
from ..data.shards import TarShards

SYNSET = re.compile(r"n\d{8}")


class Source(Protocol):
    """Pictures in a fixed order.

    names: one per picture. classes: the class folder of each, or a data set's label, None where there is none. labels:
    class folder -> words.
    notes: what a report should say of the source. fingerprint: the same for the same pictures in the same order.
    """

    names: Sequence[str]
    classes: Sequence[str | None]
    labels: dict[str, str]
    notes: list[str]
    fingerprint: str

    def read(self, number: int) -> tuple[Tensor, bool]:
        """(picture [3, h, w] in 0..1, whether the drawn world's label groups hold for it: one object). Raises
        Unreadable."""
        ...


class Scenes:
    """The first `count` held-out scenes of the drawn world."""

    def __init__(self, count: int) -> None:
        self.names = [f"scene {n}" for n in range(count)]
        self.classes, self.labels, self.notes = [None] * count, {}, []
        self.fingerprint = f"held-out scenes of seed 0, {count}"

    def read(self, number: int) -> tuple[Tensor, bool]:
        scene = draw(0, torch.tensor([number]), "held-out")
        return scene.image[0], bool(scene.count[0] == 1)


class Pictures:
    """A listing's pictures; ImageNet's layout, a folder per synset, is recognised and gives the classes their names."""

    def __init__(self, listing: Listing, classes: Sequence[str | None]) -> None:
        self._listing = listing
        self.names, self.classes = listing.names, classes
        self.labels, self.notes = imagenet_labels({c for c in classes if c})
        self.fingerprint = fingerprint(listing.names)

    def read(self, number: int) -> tuple[Tensor, bool]:
        try:
            with self._listing.open(number) as opened:
                image = as_seen(opened)
        except Exception as error:  # decoders raise whatever they stumble over
            raise Unreadable.because(error) from error
        if not (SMALLEST <= min(image.size) and max(image.size) <= LARGEST):
            raise Unreadable(f"{image.width} x {image.height} pixels; expected sides between {SMALLEST} and {LARGEST}")
        return as_tensor(image)[0], False


def imagenet_labels(classes: set[str]) -> tuple[dict[str, str], list[str]]:
    """(class folder -> words for those that are synsets of ImageNet-1k, notes on those that only look like synsets)."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = classes & set(info.label_names())
    foreign = sorted(c for c in classes - known if SYNSET.fullmatch(c))
    labels = {c: info.label_name_to_description(c, detailed=False) for c in sorted(known)}
    if not foreign:
        return labels, []
    return labels, [
        f"Class folders that are no synsets of ImageNet-1k, treated as plain folders: {some_of(foreign, 8)}."
    ]


def class_folder(name: str, shards: bool) -> str | None:
    """The folder that a picture lies in, in a shard without the shard's name; a synset anywhere in its path goes first,
    as in n01440764_10026.JPEG."""
    parts = Path(name).parts[shards:]
    for part in reversed(parts):
        if match := SYNSET.match(part):
            return match[0]
    return parts[-2] if len(parts) > 1 else None


def open_source(
    data: str,
    count: int | None = None,
    per_class: int | None = None,
    kept_back: bool = False,
    most: int | None = None,
) -> Source:
    """Pictures to evaluate a model on.

    data: "drawn", a folder of pictures or of tar shards, one .tar file, or "hf:" and a Hugging Face data set on disk.
    count: as many, evenly spread over the names (of the drawn world the first ones); None for all. per_class: the
    first as many by name of each class folder or label, class by class. kept_back: only those that making a world of
    photographs leaves aside. most: without count and per_class, no more than so many, evenly spread. Raises
    FeatInvError where there are none, or fewer than count or per_class.
    """
    if drawing_world(data):
        if per_class is not None:
            raise FeatInvError("--per-class: the drawn world has no class folders; use --count")
        if kept_back:
            raise FeatInvError(
                "--kept-back: the drawn world keeps nothing back, as it has enough held-out scenes; leave it out"
            )
        return Scenes(count or 500)
    file = Path(data)
    listing: Listing = TarShards([file]) if file.suffix == ".tar" and file.is_file() else open_listing(data, None)
    shards = isinstance(listing, TarShards)
    if kept_back:
        listing = listing_kept_back(listing)
    count_all = len(listing.names)
    if data.startswith(HUGGING_FACE):
        classes = getattr(listing, "classes", None) or [None] * count_all  # a data set's own labels
    else:
        classes = [class_folder(name, shards) for name in listing.names]
    if count is not None and count > count_all:
        raise FeatInvError(
            f"{data} holds {count_all} images; asked for {count}. Give a folder with more, or a smaller --count"
        )
    if per_class is not None:
        chosen = Chosen(listing, first_of_each(data, listing.names, classes, per_class))
    else:
        chosen = Part(listing, count or min(count_all, most or count_all))
    return Pictures(chosen, [classes[index] for index in chosen.indices])


def first_of_each(data: str, names: Sequence[str], classes: Sequence[str | None], count: int) -> list[int]:
    """Indices of the first `count` names of each class, the classes sorted. Raises FeatInvError where a class has
    fewer."""
    indices: dict[str, list[int]] = {}
    for index in sorted(range(len(names)), key=lambda p: names[p]):
        if classes[index]:
            indices.setdefault(classes[index], []).append(index)
    if not indices:
        raise FeatInvError(f"--per-class {count}: {data} has no class folders or labels; use --count")
    few = [f"{name} ({len(members)})" for name, members in sorted(indices.items()) if len(members) < count]
    if few or count < 1:
        raise FeatInvError(
            f"--per-class {count}: expected at least 1, and as many images in each class folder of {data}; fewer in"
            f" {some_of(few, 8)}"
        )
    return [index for name in sorted(indices) for index in indices[name][:count]]


@dataclass
class Originals:
    """Some pictures of a source, as they are read: numbers; pictures [3, h, w] of any size; classes as in Source;
    single: where the drawn world's label groups hold."""

    numbers: list[int]
    pictures: list[Tensor]
    classes: list[str | None]
    single: Tensor

    def preprocess(self, backbone: Backbone) -> Tensor:
        """[B, 3, *input_size] as the backbone's own evaluation cuts and scales them."""
        return torch.cat([backbone.preprocess(picture[None]) for picture in self.pictures])


def read(source: Source, numbers: Sequence[int]) -> tuple[Originals, dict[str, str]]:
    """(the pictures that can be read, name -> reason of those that cannot)."""
    readable, failed = [], {}
    for number in numbers:
        try:
            readable.append((number, *source.read(number)))
        except Unreadable as error:
            failed[source.names[number]] = str(error)
    read_numbers, pictures, single = ([entry[k] for entry in readable] for k in range(3))
    return (
        Originals(
            read_numbers, pictures, [source.classes[n] for n in read_numbers], torch.tensor(single, dtype=torch.bool)
        ),
        failed,
    )
