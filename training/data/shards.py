"""Images in tar files, each read alone: where they begin is kept in an index beside each file."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.picture_files import INDEX, LeftOut, why_left_out

from ..files import write_json
from .identity import Stamp, sampled, stamp_of


class TarShards:
    """All pictures in tar files (webdataset's layout), shard by shard.

    Each shard is walked once; where its pictures begin is kept beside it in NAME.tar.index.json, if the folder can be
    written, so that any picture can be read alone. The index holds for a shard of the same size, modification time and
    sampled contents. Compressed tar files cannot be read so.
    """

    def __init__(self, shards: list[Path], below: Path | None = None, write: bool = True) -> None:
        """below: the folder from which shards are named; None for the one that each lies in. write: whether an index
        is left beside a shard. Raises FeatInvError for what is no plain tar file."""
        self.names: list[str] = []
        self.left_out = LeftOut()
        self.shards = shards
        self._where: list[tuple[Path, int, int]] = []
        self._modified: dict[Path, int] = {}
        for shard in shards:
            index = _index(shard, write)
            shown = shard.relative_to(below).as_posix() if below else shard.name
            for name, offset, size in index["pictures"]:
                self.names.append(f"{shown}/{name}")
                self._where.append((shard, offset, size))
            for reason, (count, example) in index["left_out"].items():
                self.left_out.add(reason, f"{shown}/{example}", count)
            self._modified[shard] = index["modified"]

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded(index)))

    def encoded(self, index: int) -> bytes:
        shard, offset, size = self._where[index]
        with open(shard, "rb") as opened:
            opened.seek(offset)
            return opened.read(size)

    def stamp(self, index: int) -> Stamp:
        shard, _, size = self._where[index]
        return size, self._modified[shard]

    def describe(self) -> str:
        return (
            f"{len(self.names):,} in {len(self.shards):,} tar file{'s' * (len(self.shards) != 1)}{self.left_out.told()}"
        )


def _index(shard: Path, write: bool) -> dict:
    """pictures: (name, offset, size) of each in a tar file; left_out: reason -> (count, first name); and the size,
    modification time and sampled contents that the shard had."""
    index_file, (size, modified) = shard.with_name(shard.stem + INDEX), stamp_of(shard)
    current = {"size": size, "modified": modified, "contents": sampled(shard)}
    try:
        known = json.loads(index_file.read_text(encoding="utf-8"))
        if current == {key: known[key] for key in current}:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, cut off, or of another form: made again
    pictures, left_out = [], LeftOut()
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                if member.isfile() and (why := why_left_out(member.name)) is None:
                    pictures.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    left_out.add(why if member.isfile() else "as no plain file within a tar file", member.name)
    except (tarfile.TarError, OSError) as error:
        raise FeatInvError(
            f"{shard} is not a plain tar file ({error}); unpack it, or pack it without compression"
        ) from error
    reasons = {reason: (count, left_out.examples[reason]) for reason, count in left_out.counts.items()}
    current |= {"pictures": pictures, "left_out": reasons}
    if write:
        try:
            write_json(index_file, current)
        except OSError:
            pass  # a folder that cannot be written: walked again next time
    return current
