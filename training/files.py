"""Folders and files for results, each file written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import written_whole


def make_folder(folder: Path) -> None:
    """Creates the results' folder. Raises FeatInvError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FeatInvError(f"cannot write to the folder {folder}: {error}") from error


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with written_whole(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path, values: dict) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(file, json.dumps(values, indent=2) + "\n")
