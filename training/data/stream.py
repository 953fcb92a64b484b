"""Streams images of a Hugging Face data set without downloading it first.

A set is a number of files (parquet, tar shards and others). Each belongs to one reader, a worker of a process, so that
nothing is read twice in an epoch. A reader takes its files in a new order each epoch and shuffles BLOCK images at a
time, still encoded. Where it stands is four numbers, from which a run goes on exactly.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import as_seen

from .batch import REMEDY, TRIES, Batch, Unreadable, crops, leave_signals, plainly
from .hugging_face import hugging_face, parsed
from .identity import fingerprint, stamp_of

BLOCK = 512  # encoded pictures that a reader holds and shuffles
AT_ONCE = 64  # rows asked of the library together


class Position(NamedTuple):
    """Where a reader stands. file: files of its epoch that are behind it; row: where its block begins in the next one;
    used: pictures of the block that are used up."""

    epoch: int = 0
    file: int = 0
    row: int = 0
    used: int = 0


class Stream:
    """A set, not yet read; sides, flips and seed as in Photographs. Raises FeatInvError if it cannot be opened."""

    def __init__(self, data: str, sides: dict[str, int], flips: str, seed: int) -> None:
        self.data, self.sides, self.flips, self.seed = data, sides, flips, seed
        library, dataset, self._column = hugging_face(data, streaming=True)
        self._set = dataset.select_columns([self._column]).cast_column(self._column, library.Image(decode=False))
        self.files = dataset.num_shards

    @cached_property
    def identity(self) -> dict[str, str]:
        """The stream's name and number of files; sizes and modification times where they lie in a folder."""
        folder, names = Path(parsed(self.data)[0]), {"stream": f"{self.data}, {self.files} files"}
        if not folder.is_dir():
            return names
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sizes, times = zip(*map(stamp_of, files))
        return names | {"sizes": fingerprint(map(str, sizes)), "modification times": fingerprint(map(str, times))}

    def describe(self) -> str:
        return f"as they come in {self.files:,} files of {self.data}, column {self._column}"

    def entry(self, number: int) -> tuple[int, int]:
        return number, 0

    def name(self, position: int) -> str:
        return f"{self.data}, image {position} of the run"

    def rows(self, file: int, first: int = 0) -> Iterator[dict]:
        """A file's encoded pictures from row `first` on, {"bytes", "path"}."""
        part = self._set.shard(self.files, file).skip(first)
        for rows in part.iter(AT_ONCE):  # iter(part) would deal its rows to the workers of a loader
            yield from rows[self._column]


def decode(encoded: dict) -> Image.Image:
    """Raises whatever the decoder, or the way to a path, raises."""
    if encoded["bytes"] is None:
        import fsspec

        with fsspec.open(encoded["path"]) as opened:
            return Image.open(io.BytesIO(opened.read()))
    return Image.open(io.BytesIO(encoded["bytes"]))


class Reader:
    """Reader `number` of several: the files number, number + readers, ... of a stream, without end, from a position
    on."""

    def __init__(self, stream: Stream, number: int, readers: int, position: Position) -> None:
        self.stream, self.number, self.readers, self.position = stream, number, readers, position

    def blocks(self) -> Iterator[tuple[Position, Position, list[tuple[str, dict]]]]:
        """(where a block begins, where the next one does, its pictures with their names). A block ends with its
        epoch."""
        begin = self.position._replace(used=0)
        while True:
            files = list(range(self.number, self.stream.files, self.readers))
            self._rng(begin.epoch).shuffle(files)
            block: list[tuple[str, dict]] = []
            for position in range(begin.file, len(files)):
                first = begin.row if position == begin.file else 0
                for row, encoded in enumerate(self.stream.rows(files[position], first), first):
                    block.append((f"file {files[position]}, row {row}", encoded))
                    if len(block) == BLOCK:
                        after = Position(begin.epoch, position, row + 1)
                        yield begin, after, block
                        begin, block = after, []
            after = Position(begin.epoch + 1)
            if block:
                yield begin, after, block
            elif begin == Position(begin.epoch):
                raise FeatInvError(
                    f"data {self.stream.data}: the files {', '.join(map(str, sorted(files)))} hold no images"
                )
            begin = after

    def pictures(self) -> Iterator[tuple[str, dict, Position]]:
        """(name, encoded picture, where the reader stands after it)."""
        used = self.position.used
        for begin, after, block in self.blocks():
            self._rng(*begin).shuffle(block)
            for count, (name, encoded) in enumerate(block[used:], used + 1):
                yield (
                    f"epoch {begin.epoch}, {name}",
                    encoded,
                    begin._replace(used=count) if count < len(block) else after,
                )
            used = 0

    def batches(self, size: int) -> Iterator[tuple[Position, Batch]]:
        """(where the reader stands after it, batch of `size` crops). Raises FeatInvError after TRIES pictures in a row
        that cannot be read."""
        stream, rows, skipped, failed = self.stream, [], [], 0
        for name, encoded, position in self.pictures():
            try:
                rng = random.Random(f"{stream.seed}/{name}")
                rows.append(crops(partial(decode, encoded), stream.sides, stream.flips, rng))
                failed = 0
            except Unreadable as error:
                skipped.append((f"{stream.data}, {name.partition(', ')[2]}", str(error)))
                failed += 1
                if failed == TRIES:
                    raise FeatInvError(
                        f"{TRIES} images in a row could not be read, {skipped[-1][0]} the last ({error}); {REMEDY}"
                    ) from error
            if len(rows) == size:
                yield (
                    position,
                    Batch({side: torch.stack([row[side] for row in rows]) for side in stream.sides}, skipped),
                )
                rows, skipped = [], []

    def _rng(self, *where: int) -> random.Random:
        return random.Random(f"{self.stream.seed}/{self.number}/{where}")


class Readers(IterableDataset):
    """The readers of one process, which deal batches in turn, each in a worker of a loader, or one without workers.

    turn: whose batch is the next; positions: where each stands.
    """

    def __init__(self, stream: Stream, batch: int, rank: int, processes: int, workers: int) -> None:
        self.stream, self.batch, self.rank, self.count = stream, batch, rank, max(workers, 1)
        self.all = processes * self.count
        if stream.files < self.all:
            raise FeatInvError(
                f"data {stream.data} has {stream.files} files, of which each of {self.all} readers ({processes}"
                f" processes with {self.count} workers) needs one of its own: give fewer --workers or processes, or"
                " download the data set and write hf: instead of stream:"
            )
        self.turn, self.positions = 0, [Position()] * self.count

    def __iter__(self) -> Iterator[tuple[int, Position, Batch]]:
        worker = get_worker_info()
        number = (self.turn + (worker.id if worker else 0)) % self.count  # a loader begins with its first worker
        reader = Reader(self.stream, self.rank * self.count + number, self.all, self.positions[number])
        for position, batch in reader.batches(self.batch):
            yield number, position, batch


class Reading(Iterator[Batch]):
    """The batches of one process. state: its own of what `states` gave, to go on from there; where there are other
    processes or workers now, the stream starts from its beginning and says so."""

    def __init__(
        self,
        stream: Stream,
        batch: int,
        rank: int,
        processes: int,
        workers: int,
        pin: bool = False,
        state: dict | None = None,
    ) -> None:
        self._readers = readers = Readers(stream, batch, rank, processes, workers)
        if state is not None and (state["all"], len(state["positions"])) == (readers.all, readers.count):
            readers.turn, readers.positions = state["turn"], [Position(*position) for position in state["positions"]]
        elif state is not None and rank == 0:
            tqdm.write(
                f"{stream.data} was read by {state['all']} readers, {len(state['positions'])} each process, and now by"
                f" {readers.all}: it starts from its beginning"
            )
        self._turn, self._positions = readers.turn, list(readers.positions)
        self._last: tuple[int, Position] | None = None
        self._batches = plainly(
            DataLoader(readers, batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=leave_signals)
        )

    def __next__(self) -> Batch:
        self._use_up()
        number, position, batch = next(self._batches)
        self._last = number, position
        return batch

    def close(self) -> None:
        self._batches.close()

    def _use_up(self) -> None:
        if self._last:
            number, position = self._last
            self._positions[number], self._turn, self._last = position, (number + 1) % self._readers.count, None

    def state(self, in_hand: bool) -> dict:
        """in_hand: the batch that was handed out last is still to be used, and comes again."""
        if not in_hand:
            self._use_up()
        return {
            "all": self._readers.all,
            "turn": self._turn,
            "positions": [tuple(position) for position in self._positions],
        }


def states(batches: Iterator[Batch], in_hand: bool) -> list[dict] | None:
    """Where a stream's readers stand, of all processes, for the checkpoint; None for batches of other sources. Every
    process calls this."""
    return gather_object([batches.state(in_hand)]) if isinstance(batches, Reading) else None


def first_pictures(data: str, count: int) -> list[Image.Image]:
    """The first pictures of a stream, those that cannot be read left out; for a panel."""
    stream, pictures = Stream(data, {}, "none", 0), []
    for encoded in (encoded for file in range(stream.files) for encoded in stream.rows(file)):
        try:
            pictures.append(as_seen(decode(encoded)))
        except Exception:  # decoders raise whatever they stumble over; training names the picture
            continue
        if len(pictures) == count:
            break
    return pictures
