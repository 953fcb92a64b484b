"""The images that something is fitted to, and others on which it is measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError

from ..data.batch import Unreadable
from ..evaluation.sources import Source, open_source

EVERY = 4  # without pictures of their own, every fourth is held out


@dataclass
class Part:
    """Some of a source's pictures. unreadable: name and reason of those that could not be read so far."""

    source: Source
    numbers: Sequence[int]
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, what: str, size: int = 16) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Names and pictures [3, h, w] in 0..1, `size` at a time, with progress. what: is done with them. Raises
        FeatInvError if none can be read."""
        names: list[str] = []
        pictures: list[Tensor] = []
        read = 0
        for number in tqdm(self.numbers, desc=what, unit="image"):
            name = self.source.names[number]
            try:
                pictures.append(self.source.read(number)[0])
                names.append(name)
                read += 1
            except Unreadable as error:
                self.unreadable.append(f"left out: {name} ({error})")
            if len(pictures) == size:
                yield names, pictures
                names, pictures = [], []
        if pictures:
            yield names, pictures
        if not read:
            raise FeatInvError(f"none of the {len(self)} images can be read; the first: {self.unreadable[0]}")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what `split` takes."""
    parser.add_argument("--data", default="drawn", help="folder of images or tar shards, a .tar file, or drawn")
    parser.add_argument("--count", type=int, help="how many of them, evenly spread (default: all; 500 drawn scenes)")
    parser.add_argument(
        "--held-out", help=f"other images to measure on (default: every {EVERY}th of the data, left out of the fit)"
    )
    parser.add_argument("--held-out-count", type=int, help="how many of these, evenly spread (default: all)")


def split(data: str, count: int | None, held_out: str | None, held_out_count: int | None) -> tuple[Part, Part]:
    """(pictures to fit to, others to measure on). data, held_out: as open_source takes them, with so many pictures of
    each, None for all; without held_out, every fourth of the first is measured on. Raises FeatInvError for fewer than
    eight pictures and for the same source twice."""
    source = open_source(data, count)
    numbers = range(len(source.names))
    if len(numbers) < 2 * EVERY:
        raise FeatInvError(f"{data} holds {len(numbers)} images; expected at least {2 * EVERY}")
    if held_out is None:
        return tuple(
            Part(source, [n for n in numbers if wanted((n + 1) % EVERY == 0)]) for wanted in (lambda x: not x, bool)
        )
    if held_out == data:
        raise FeatInvError(f"--held-out {held_out} is the data itself; leave it out to hold out every {EVERY}th image")
    other = open_source(held_out, held_out_count)
    return Part(source, numbers), Part(other, range(len(other.names)))
