"""Records of an evaluation on disk: a file per condition and 64 images, whole or not at all, so that a run can go on.

A condition is one way of making images, a row or a cell of a report. A shard holds a row per image that could be
read, the first images themselves, and the names of those that could not be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import read_metadata, read_tensors

from ..checksum import is_whole, write_checksummed
from ..files import write_json
from .evaluator import Columns
from .sources import Originals, Source, read

SHARD = 64  # pictures
SHOWN = 8  # pictures of a condition that are kept for the report

#: makes pictures of originals and measures them: a row per original; the column "pictures" [B, 3, h, w] is kept for
#: SHOWN
Condition = Callable[[Originals], Columns]
Task = tuple[str, int]  # condition, number of the shard's first picture


@dataclass
class Table:
    """All records of a condition: a row per picture that could be read, in the order of their numbers."""

    numbers: list[int] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))
    skipped: dict[str, str] = field(default_factory=dict)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Turns a full disk, and whatever else keeps files from being written, into bad input that says how to go on."""
    try:
        yield
    except OSError as error:
        raise FeatInvError(
            f"cannot write to {folder}: {error}. What is done is kept; make room, and the same command goes on"
        ) from error


def _leaves(values: dict, prefix: str = "") -> dict:
    """Nested settings as one level, names joined by dots."""
    flat = {}
    for name, value in values.items():
        flat |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Store:
    """The folder of an evaluation's records."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def begin(self, settings: dict) -> None:
        """Notes what decides the figures. Raises FeatInvError if the folder holds the records of another evaluation."""
        file, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        if file.is_file():
            known, settings_now = _leaves(json.loads(file.read_text(encoding="utf-8"))), _leaves(settings)
            keys = [
                key for key in sorted(known.keys() | settings_now.keys()) if known.get(key) != settings_now.get(key)
            ]
            differing = [f"{key}: {known.get(key)!r} there, {settings_now.get(key)!r} now" for key in keys]
            if differing:
                raise FeatInvError(
                    f"{self.folder} holds the records of another evaluation ({'; '.join(differing)[:600]}); give"
                    " another --out, or delete it"
                )
        with room(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)

    def shards(self) -> range:
        return range(0, self.count, SHARD)

    def missing(self, conditions: Sequence[str]) -> list[Task]:
        """What is still to be done, condition by condition; damaged files are named, removed and made again."""
        todo = []
        for condition in conditions:
            for first in self.shards():
                file = self._file(condition, first)
                if file is not None and not is_whole(file):
                    tqdm.write(f"{file} is damaged and made again")
                    file.unlink()
                if self._file(condition, first) is None:
                    todo.append((condition, first))
        return todo

    def write(self, condition: str, first: int, numbers: list[int], columns: Columns, skipped: dict[str, str]) -> None:
        """The shard of the pictures from `first` on, whole or not at all. numbers: of those that could be read, a row
        of each column; skipped: name -> reason of the others. Raises FeatInvError where there is no room."""
        tensors = {"column." + name: values.contiguous() for name, values in columns.items() if name != "pictures"}
        tensors["numbers"] = torch.tensor(numbers, dtype=torch.int64)
        if first == 0 and "pictures" in columns:
            tensors["pictures"] = (columns["pictures"][:SHOWN] * 255).round().byte().contiguous()
        data = save(tensors, {"skipped": json.dumps(skipped)})
        with room(self.folder):
            write_checksummed(self._of(condition), f"{first:08d}", ".safetensors", lambda opened: opened.write(data))

    def table(self, condition: str) -> Table:
        """Reads a condition's records. The first shard's pictures come back in 0..1."""
        result, parts = Table(), []
        for first in self.shards():
            file = self._file(condition, first)
            tensors = read_tensors(file)
            result.numbers += tensors.pop("numbers").tolist()
            if "pictures" in tensors:
                result.pictures = tensors.pop("pictures").float() / 255
            result.skipped |= json.loads(read_metadata(file)["skipped"])
            parts.append({name.removeprefix("column."): values for name, values in tensors.items()})
        parts = [part for part in parts if part]  # a shard without a readable picture has no columns
        result.columns = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
        return result

    def _of(self, condition: str) -> Path:
        return self.folder / "records" / quote(condition, safe=" =,()")

    def _file(self, condition: str, first: int) -> Path | None:
        return next(iter(sorted(self._of(condition).glob(f"{first:08d}-*.safetensors"))), None)


def aligned(tables: dict[str, Table]) -> dict[str, Table]:
    """The same pictures in every table: one that could be read for some conditions only, as when it was mended before
    the evaluation went on, is left out of all, and counts as skipped."""
    common = set.intersection(*(set(table.numbers) for table in tables.values()))
    skipped = {name: reason for table in tables.values() for name, reason in table.skipped.items()}
    for table in tables.values():
        rows, count = [row for row, number in enumerate(table.numbers) if number in common], len(table.numbers)
        table.skipped = skipped
        if len(rows) < count:
            table.columns = {
                name: values.unflatten(0, (count, -1))[rows].flatten(0, 1) for name, values in table.columns.items()
            }
            table.pictures = (
                None if table.pictures is None else table.pictures[[row for row in rows if row < len(table.pictures)]]
            )
            table.numbers = [table.numbers[row] for row in rows]
    return tables


def record(
    store: Store, source: Source, conditions: dict[str, Condition], batch: int, dist_state: PartialState
) -> None:
    """Fills in the conditions' missing shards, each by one process, whatever their number; returns when all are done.

    Memory is bounded by the batch and a shard's records. Batches do not reach across shards, so that the figures do not
    depend on the number of processes.
    """
    shared = [store.missing(list(conditions)) if dist_state.is_main_process else None]
    tasks = broadcast_object_list(shared)[0][dist_state.process_index :: dist_state.num_processes]
    spans = {task: range(task[1], min(task[1] + SHARD, store.count)) for task in tasks}
    with tqdm(
        total=sum(map(len, spans.values())), unit="image", disable=not dist_state.is_main_process or not tasks
    ) as bar:
        for (condition, first), numbers in spans.items():
            bar.set_description(condition)
            rows, parts, skipped = [], [], {}
            for start in range(0, len(numbers), batch):
                originals, failed = read(source, numbers[start : start + batch])
                skipped |= failed
                if originals.numbers:
                    rows += originals.numbers
                    parts.append(conditions[condition](originals))
                bar.update(len(originals.numbers) + len(failed))
            columns = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
            store.write(condition, first, rows, columns, skipped)
    dist_state.wait_for_everyone()
