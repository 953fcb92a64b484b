"""The folder of a run: one run at a time, complete files, and enough space for the checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from featinv_nodes.core.errors import FeatInvError

from ..files import make_folder


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it against other runs until the process ends; the processes of one run share the
    lock. Removes files that a killed run left unfinished. Raises FeatInvError if another run is at work there."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FeatInvError(
            f"another run is at work in {folder}: wait for it, stop it, or choose another --output"
        ) from error
    except NotImplementedError:  # some network disks know no locks
        pass
    try:
        for part in folder.glob("*.part"):
            part.unlink()
        yield
    finally:
        lock.release()


def room(folder: Path, checkpoint: int, keep: int) -> tuple[int, int]:
    """(bytes that `keep` checkpoints of so many bytes, and the one that is being written beside them, need besides what
    is there; bytes that are free). The folder need not be there yet."""
    there = sum(file.stat().st_size for file in folder.glob("checkpoint-*.pt"))
    first = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return max((keep + 1) * checkpoint - there, 0), shutil.disk_usage(first).free


def check_room(folder: Path, checkpoint: int, keep: int, say: Callable[[str], object]) -> None:
    """Says where the checkpoints, as room counts them, do not fit."""
    required, free = room(folder, checkpoint, keep)
    if required > free:
        say(
            f"{folder} has {free / 1e9:.1f} GB left and its checkpoints need {required / 1e9:.1f} ({keep} and the one"
            " being written): make room there, or lower --keep"
        )
