"""Detects changed images by their names, sizes, modification times and sampled contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

Stamp = tuple[int, int]  # bytes, and nanoseconds of the last modification; both -1 for what is not there
SAMPLED = 64  # pictures of a listing whose contents are read
BLOCKS, BLOCK = 16, 4096  # parts of a file that are read, and their bytes


class Stamped(Protocol):
    """Pictures that can tell whether they have changed. stamp: of the one at an index; encoded: its bytes, or raises
    whatever reading them raises."""

    names: Sequence[str]

    def stamp(self, index: int) -> Stamp: ...

    def encoded(self, index: int) -> bytes: ...


def stamp_of(file: str | Path) -> Stamp:
    try:
        status = Path(file).stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def sampled(file: Path) -> str:
    """A digest of BLOCKS parts of a file, evenly spread from its beginning to its end; of all of a small one."""
    size, sha = stamp_of(file)[0], hashlib.sha256()
    with open(file, "rb") as opened:
        if size <= BLOCKS * BLOCK:
            sha.update(opened.read())
        else:
            for k in range(BLOCKS):
                opened.seek(k * (size - BLOCK) // (BLOCKS - 1))
                sha.update(opened.read(BLOCK))
    return sha.hexdigest()[:16]


def fingerprint(names: Iterable[str]) -> str:
    """A digest of names in their order: the same pictures at the same indices, as far as names tell."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def identity(listing: Stamped) -> dict[str, str]:
    """Digests of a listing's names, sizes and modification times, and of the contents of SAMPLED pictures, evenly
    spread. What is edited under its name has another size or time, or is among the sampled."""
    count = len(listing.names)
    stamps = np.array([listing.stamp(index) for index in range(count)], np.int64).reshape(count, 2)
    contents = hashlib.sha256()
    for k in range(min(SAMPLED, count)):
        try:
            contents.update(hashlib.sha256(listing.encoded(k * count // min(SAMPLED, count))).digest())
        except OSError:
            contents.update(b"cannot be read")
    return {
        "names": fingerprint(listing.names),
        "sizes": hashlib.sha256(stamps[:, 0].tobytes()).hexdigest()[:16],
        "modification times": hashlib.sha256(stamps[:, 1].tobytes()).hexdigest()[:16],
        "contents": contents.hexdigest()[:16],
    }


def what_changed(before: dict[str, str], now: dict[str, str]) -> str:
    """Which of identity's digests differ, and what to do where it is the times alone; empty where none does."""
    differing = [key for key in now if before.get(key) != now[key]]
    if differing == ["modification times"]:
        return "modification times: where the images were only copied, copy them with their times (rsync -a, cp -p)"
    return ", ".join(differing)
