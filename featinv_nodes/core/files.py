"""safetensors files with a JSON text about themselves in their metadata: weights, concepts, feature maps."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .feature_map import FeatInvError


def write_safetensors(file: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(save(tensors, metadata))  # save_file would make a file that only its owner can read
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def read_about(file: str | Path, key: str, kind: str) -> dict:
    """The JSON under `key` in a file's metadata, without its tensors. kind: what such a file is called in messages.

    Raises FeatInvError for a missing, truncated or foreign file.
    """
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(key)
    except FileNotFoundError as error:
        raise FeatInvError(f"{kind} {file} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error
    if text is None:
        raise FeatInvError(f"{file} is no {kind}: its metadata has no entry {key!r}")
    return json.loads(text)


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a file that read_about accepted, on the CPU."""
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}
