"""Which images lie below a folder: links are followed, loops are not, and what is left out is counted by reason."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath

#: kinds of pictures that are read
SUFFIXES = {".avif", ".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
#: kinds that hold pictures in a form that cannot be read by place
PACKED = (".7z", ".bz2", ".gz", ".parquet", ".rar", ".tgz", ".xz", ".zip", ".zst")
INDEX = ".tar.index.json"  # how the index beside a tar file is named, which is no picture that anyone misses


class LeftOut:
    """What is left out: counts by reason, each with the first of its names as an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        self.counts[reason] += count
        self.examples[reason] = min(name, self.examples.get(reason, name))

    def told(self) -> str:
        """Such as "; left out: 3 of kind .gif (a.gif), 1 as a link that leads nowhere (b.png)", to append to a
        description; empty if nothing is left out."""
        parts = ", ".join(f"{n:,} {reason} ({self.examples[reason]})" for reason, n in sorted(self.counts.items()))
        return parts and f"; left out: {parts}"


@dataclass
class Found:
    """What lies below a folder. pictures, tars: paths from it, sorted; folders: how many hold pictures; links: folders
    that were reached through a link; left_out: the rest."""

    pictures: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    folders: int = 0
    links: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)


@lru_cache
def without_decoder() -> frozenset[str]:
    """Those of SUFFIXES that the installed Pillow cannot read."""
    from PIL import features

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know the name
        return frozenset(f".{kind}" for kind in ("avif", "webp") if not features.check(kind))


def why_left_out(name: str) -> str | None:
    """Why a file of this name is no picture; None if it is one."""
    if PurePath(name).name.startswith("._"):
        return "that macOS puts beside another file"
    suffix = PurePath(name).suffix.lower()
    if suffix in without_decoder():
        return f"of kind {suffix}, which the installed Pillow cannot read: pip install -U pillow"
    if suffix in SUFFIXES:
        return None
    if suffix in PACKED:
        return f"of kind {suffix}, which has to be unpacked first"
    return f"of kind {suffix}" if suffix else "without a suffix"


def look_below(folder: str | Path) -> Found:
    """Looks through a folder and all below it. A folder that cannot be opened is left out."""
    found = Found()
    todo: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(folder), "", frozenset())]
    while todo:
        path, inside, above = todo.pop()
        try:
            status = os.stat(path)
            with os.scandir(path) as opened:
                entries = list(opened)
        except OSError:
            found.left_out.add("as a folder that cannot be opened", inside or str(folder))
            continue
        if (here := (status.st_dev, status.st_ino)) in above:
            found.left_out.add("as a link back to a folder above", inside)
            continue
        before = len(found.pictures)
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if _is(entry.is_dir):
                found.links += entry.is_symlink()
                todo.append((entry.path, name, above | {here}))
            elif not _is(entry.is_file):
                found.left_out.add("as a link that leads nowhere" if entry.is_symlink() else "as no plain file", name)
            elif PurePath(name).suffix.lower() == ".tar":
                found.tars.append(name)
            elif (why := why_left_out(name)) is None:
                found.pictures.append(name)
            elif not entry.name.startswith(".") and not name.endswith(INDEX):
                found.left_out.add(why, name)
        found.folders += len(found.pictures) > before
    found.links -= found.left_out.counts["as a link back to a folder above"]
    found.pictures.sort()
    found.tars.sort()
    return found


def _is(kind: Callable[[], bool]) -> bool:
    """What a method of os.DirEntry says, False where it cannot."""
    try:
        return kind()
    except OSError:  # a link to itself
        return False
