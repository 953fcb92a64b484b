"""Files whose names end with the SHA-256 of their contents, which shows whether they are complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

DIGITS = 16  # of the digest, in the name


class _Digesting:
    """A binary file that digests what is written to it. failed: the first error in doing so, which libraries replace by
    ones of their own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.failed = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._try(lambda: self.file.write(data))

    def flush(self) -> None:
        self._try(self.file.flush)

    def _try(self, action: Callable[[], int | None]) -> int | None:
        try:
            return action()
        except OSError as error:
            self.failed = self.failed or error
            raise


def write_checksummed(folder: Path, stem: str, suffix: str, write: Callable[[BinaryIO], object]) -> Path:
    """Writes folder/STEM-DIGEST.SUFFIX by `write(file)`, whole or not at all, and reads it back.

    Raises OSError if it cannot be written, or if what is read back differs from what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{stem}{suffix}.part"
    try:
        with open(part, "wb") as opened:
            digesting = _Digesting(opened)
            try:
                write(digesting)
                digesting.flush()
            except RuntimeError as error:
                raise digesting.failed or error from error
            os.fsync(opened.fileno())
        expected = digesting.digest.hexdigest()[:DIGITS]
        if _digest(part) != expected:
            raise OSError(f"{part} does not hold what was written to it")
        whole = folder / f"{stem}-{expected}{suffix}"
        os.replace(part, whole)
        return whole
    finally:
        part.unlink(missing_ok=True)


def is_whole(file: Path) -> bool:
    """Whether a file of write_checksummed still holds what was written."""
    return _digest(file) == file.stem.rpartition("-")[2]


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:DIGITS]
