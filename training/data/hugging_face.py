"""Hugging Face data sets as images."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from featinv_nodes.core.errors import FeatInvError

from .identity import Stamp, stamp_of

HUGGING_FACE = "hf:"
FORM = "NAME[:SPLIT[:COLUMN]]"


def parsed(data: str) -> tuple[str, str, str]:
    """(name, split, column) of data after its prefix, the last two empty where they are not given. Raises FeatInvError
    where there is no name, or more than these."""
    prefix, _, rest = data.partition(":")
    if rest and Path(rest).is_dir():
        return rest, "", ""
    name, *more = re.split(r":(?![\\/])", rest)  # C:\pictures is one name
    if not name or len(more) > 2:
        raise FeatInvError(f"data {data!r} names no data set: expected {prefix}:{FORM}")
    return name, *[*more, "", ""][:2]


def hugging_face(data: str, streaming: bool = False) -> tuple[ModuleType, Any, str]:
    """(the `datasets` library, the set that `data` names after its prefix, its column of pictures).

    After the prefix: a folder of save_to_disk, not for streaming, or what load_dataset takes; then the split (default
    train) and the column, which can be left out where the set has one column of pictures. Raises FeatInvError if there
    is no such set, or it has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise FeatInvError(f"data {data} needs the package datasets: pip install datasets") from error
    name, split, column = parsed(data)
    saved = Path(name).is_dir() and any((Path(name) / f).exists() for f in ("state.json", "dataset_dict.json"))
    if saved and streaming:
        raise FeatInvError(
            f"data {data} was saved by save_to_disk and is on this computer already: write {HUGGING_FACE}{name}"
        )
    try:
        if saved:
            dataset = _split_of(datasets.load_from_disk(name), split, data, name)
        else:
            dataset = datasets.load_dataset(name, split=split or "train", streaming=streaming)
    except FeatInvError:
        raise
    except Exception as error:  # the library and those below it raise many kinds
        raise FeatInvError(f"data {data} cannot be opened: {' '.join(str(error).split())}") from error
    return datasets, dataset, _column(datasets, dataset, data, name, split, column)


def _split_of(dataset: Any, split: str, data: str, name: str) -> Any:
    """The wanted split of a set of the library, which may be missing, as save_to_disk wrote it."""
    if not isinstance(dataset, dict):  # one split
        if split and split != (there := str(dataset.split or "train")):
            raise FeatInvError(f"data {data}: {name} holds the split {there} alone; leave {split!r} out")
        return dataset
    if (split or "train") not in dataset:
        prefix, some = data.partition(":")[0], ", ".join(dataset)
        raise FeatInvError(
            f"data {data} has no split {split or 'train'!r}; it has {some}: write {prefix}:{name}:{next(iter(dataset))}"
        )
    return dataset[split or "train"]


def _column(library: ModuleType, dataset: Any, data: str, name: str, split: str, column: str) -> str:
    """The column of pictures."""
    features = dataset.features or {}  # unknown in some streams
    known = [key for key, kind in features.items() if isinstance(kind, library.Image)]
    if column and (column in known or not features):
        return column
    if column or not known:
        has = ", ".join(known if column and known else features) or "columns of unknown kinds"
        raise FeatInvError(f"data {data} has no column of images{column and f' {column!r}'}; it has {has}")
    if len(known) > 1:
        raise FeatInvError(
            f"data {data} has {len(known)} columns of images, {', '.join(known)}: say which, such as"
            f" {data.partition(':')[0]}:{name}:{split or 'train'}:{known[0]}"
        )
    return known[0]


class HuggingFace:
    """A data set of the `datasets` library that is on this computer, with a column of pictures. classes: the name of
    each one's label, None where it has none; None altogether for a data set without a column of labels."""

    def __init__(self, data: str) -> None:
        """data: as hugging_face takes it."""
        library, dataset, self._column = hugging_face(data)
        self._set = dataset.select_columns([self._column])
        self._others = [column for column in dataset.features if column != self._column]
        self.names = [f"{data.removeprefix(HUGGING_FACE)}[{index}]" for index in range(len(dataset))]
        labels = [column for column, kind in dataset.features.items() if isinstance(kind, library.ClassLabel)]
        known = dataset.features[labels[0]].names if labels else []
        self.classes = [known[k] if k is not None and k >= 0 else None for k in dataset[labels[0]]] if labels else None

    def open(self, index: int) -> Image.Image:
        return self._set[index][self._column]

    @cached_property
    def _encoded(self) -> Any:
        """The set with its pictures as {"bytes", "path"}."""
        from datasets import Image as ImageColumn

        return self._set.cast_column(self._column, ImageColumn(decode=False))

    def encoded(self, index: int) -> bytes:
        row = self._encoded[index][self._column] or {"bytes": b"", "path": None}
        return Path(row["path"]).read_bytes() if row["bytes"] is None else row["bytes"]

    def stamp(self, index: int) -> Stamp:
        return int(self._stamps[index, 0]), int(self._stamps[index, 1])

    @cached_property
    def _stamps(self) -> np.ndarray:
        """[n, 2]: of a picture within the set its bytes and the newest time of the set's files; of one beside it the
        file's own. Pictures are not read for it."""
        import pyarrow.compute as pc

        newest = max((stamp_of(file["filename"])[1] for file in self._set.cache_files), default=-1)
        stamps = []
        for part in self._set.with_format("arrow")[:].column(self._column).chunks:
            sizes = pc.binary_length(pc.struct_field(part, "bytes")).to_pylist()
            paths = pc.struct_field(part, "path").to_pylist() if None in sizes else [None] * len(sizes)
            for size, path in zip(sizes, paths):
                stamps.append((size, newest) if size is not None else stamp_of(path) if path else (-1, -1))
        return np.array(stamps, np.int64).reshape(-1, 2)

    def describe(self) -> str:
        others = ", ".join(self._others)
        return f"{len(self.names):,} in column {self._column}{others and f', beside {others}'}"
