"""The file of a linear map: safetensors with `matrix` and `shift` if the kind has them, the source and what was
measured."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from .errors import FeatInvError
from .files import as_float, read_about, read_tensors, write_safetensors
from .linear_maps import LinearMap

KEY, FORMAT = "featinv_linear_map", 1


def save_linear_map(file: str | Path, linear: LinearMap) -> None:
    """Writes a linear map whole or not at all. Raises FeatInvError for a name that is too long."""
    parts = {"matrix": linear.matrix, "shift": linear.shift}
    about = {
        "format": FORMAT,
        "kind": linear.kind,
        "source": linear.source.to_dict(),
        "low": linear.low,
        "settings": dict(linear.settings),
        "measured": dict(linear.measured),
    }
    tensors = {name: value.cpu().contiguous() for name, value in parts.items() if value is not None}
    write_safetensors(file, tensors, {KEY: json.dumps(about)})


def load_linear_map(file: str | Path) -> LinearMap:
    """Reads what save_linear_map wrote. Raises FeatInvError for a missing, truncated or foreign file, a later format
    version, wrong fields, and tensors that are missing, misshapen or no finite floating-point numbers."""
    from .metadata import LinearMapFile  # pydantic takes tenths of a second

    about, tensors = read_about(file, KEY, LinearMapFile, "linear map"), read_tensors(file)

    def read(name: str) -> Tensor | None:
        return as_float(tensors[name], name, file) if name in tensors else None

    matrix, shift = read("matrix"), read("shift")
    try:
        return LinearMap(about.kind, matrix, shift, about.source.made(), about.low, about.settings, about.figures())
    except FeatInvError as error:
        raise FeatInvError(f"{file}: {error}") from error
