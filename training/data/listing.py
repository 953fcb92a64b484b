"""Where the pictures for training are: each is addressed by its index in a list, and read when it is asked for."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from PIL import Image

from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.images import SUFFIXES

from ..config import STREAM
from ..files import write_json

HUGGING_FACE = "hf:"
#: every 25th picture is left aside where a world of photographs is made: settings are chosen on these
KEPT_BACK = 25


class Listing(Protocol):
    """Pictures in a fixed order. names: one per picture; open reads the one at an index, or raises whatever the
    decoder raises."""

    names: Sequence[str]

    def open(self, index: int) -> Image.Image: ...


class Folder:
    """All pictures below a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.folder / self.names[index])


class TarShards:
    """All pictures in the tar files of a folder (webdataset's layout), shard by shard.

    Each shard is walked once; where its pictures begin is kept beside it in NAME.tar.index.json, if the folder can be
    written, so that any picture can be read alone. Compressed tar files cannot be read so.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.names: list[str] = []
        self._where: list[tuple[Path, int, int]] = []
        for shard in shards:
            for name, offset, size in _index(shard):
                self.names.append(f"{shard.name}/{name}")
                self._where.append((shard, offset, size))

    def open(self, index: int) -> Image.Image:
        shard, offset, size = self._where[index]
        with open(shard, "rb") as opened:
            opened.seek(offset)
            return Image.open(io.BytesIO(opened.read(size)))


def _index(shard: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each picture in a tar file."""
    index_file, size = shard.with_name(shard.name + ".index.json"), shard.stat().st_size
    try:
        known = json.loads(index_file.read_text())
        if known["size"] == size:
            return known["pictures"]
    except (OSError, ValueError, KeyError):
        pass  # not there, or cut off: made again
    try:
        with tarfile.open(shard, "r:") as opened:
            pictures = [
                (m.name, m.offset_data, m.size)
                for m in opened
                if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES
            ]
    except tarfile.TarError as error:
        raise FeatInvError(
            f"{shard} is not a plain tar file ({error}); unpack it, or pack it without compression"
        ) from error
    try:
        write_json(index_file, {"size": size, "pictures": pictures})
    except OSError:
        pass  # a folder that cannot be written: walked again next time
    return pictures


def hugging_face(data: str, streaming: bool = False) -> tuple[ModuleType, Any, str]:
    """(the `datasets` library, the set that `data` names after its prefix, its column of pictures).

    After the prefix: a folder of save_to_disk, not for streaming, or what load_dataset takes, with the split after a
    colon (default train). Raises FeatInvError if there is no such set, or it has no pictures.
    """
    try:
        import datasets
    except ImportError as error:
        raise FeatInvError(f"data {data} needs the package datasets: pip install datasets") from error
    name = data.partition(":")[2]
    saved = Path(name).is_dir() and any((Path(name) / f).exists() for f in ("state.json", "dataset_dict.json"))
    if saved and streaming:
        raise FeatInvError(
            f"data {data} was saved by save_to_disk and is on this computer already: write {HUGGING_FACE}{name}"
        )
    try:
        if saved:
            dataset = datasets.load_from_disk(name)
            dataset = dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset
        else:
            name, _, split = name.partition(":")
            dataset = datasets.load_dataset(name, split=split or "train", streaming=streaming)
    except (OSError, ValueError, KeyError) as error:
        raise FeatInvError(f"data {data} cannot be opened: {error}") from error
    features = dataset.features or {}  # unknown in some streams
    columns = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise FeatInvError(
            f"data {data} has no column of pictures; it has {', '.join(features) or 'columns of unknown kinds'}"
        )
    return datasets, dataset, columns[0]


class HuggingFace:
    """A data set of the `datasets` library that is on this computer, with a column of pictures. classes: the name of
    each one's label, None where it has none; None altogether for a data set without a column of labels."""

    def __init__(self, data: str) -> None:
        """data: as hugging_face takes it."""
        library, dataset, self._column = hugging_face(data)
        self._set = dataset.select_columns([self._column])
        self.names = [f"{data.removeprefix(HUGGING_FACE)}[{index}]" for index in range(len(dataset))]
        labels = [column for column, kind in dataset.features.items() if isinstance(kind, library.ClassLabel)]
        known = dataset.features[labels[0]].names if labels else []
        self.classes = [known[k] if k is not None and k >= 0 else None for k in dataset[labels[0]]] if labels else None

    def open(self, index: int) -> Image.Image:
        return self._set[index][self._column]


def open_listing(data: str, images: int | None) -> Listing:
    """A folder of pictures or of tar files, or "hf:" and a Hugging Face data set; images: only so many of them, evenly
    spread. Raises FeatInvError where there are none, or fewer."""
    if data.startswith(HUGGING_FACE):
        listing: Listing = HuggingFace(data)
    elif data.startswith(STREAM):
        raise FeatInvError(
            f"data {data}: a stream can be trained on, not evaluated or listed; download the set, and write"
            f" {HUGGING_FACE}"
        )
    elif Path(data).is_dir():
        shards = sorted(Path(data).glob("*.tar"))
        listing = TarShards(shards) if shards else Folder(Path(data))
    else:
        raise FeatInvError(
            f"data {data!r} is neither 'drawn' nor a folder, nor '{HUGGING_FACE}' and the name of a Hugging Face"
            " data set"
        )
    if not listing.names:
        raise FeatInvError(f"no images ({', '.join(sorted(SUFFIXES))}) below {data}")
    return listing if images is None else Part(listing, images)


class Chosen:
    """Some of a listing's pictures, by their indices in it."""

    def __init__(self, whole: Listing, indices: list[int]) -> None:
        self._whole, self.indices = whole, indices
        self.names = [whole.names[index] for index in indices]

    def open(self, index: int) -> Image.Image:
        return self._whole.open(self.indices[index])


def kept_back(whole: Listing) -> Chosen:
    """The pictures that making a world of photographs from this listing leaves aside."""
    return Chosen(whole, list(range(0, len(whole.names), KEPT_BACK)))


class Part(Chosen):
    """`count` of a listing's pictures, evenly spread over it."""

    def __init__(self, whole: Listing, count: int) -> None:
        if not 0 < count <= len(whole.names):
            raise FeatInvError(f"images {count}: expected 1 to {len(whole.names)}, as many as there are")
        super().__init__(whole, [k * len(whole.names) // count for k in range(count)])


def fingerprint(names: Sequence[str]) -> str:
    """A digest of names in their order: the same pictures at the same indices, as far as names tell."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
