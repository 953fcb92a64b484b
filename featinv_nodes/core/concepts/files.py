"""The concept file: safetensors with `basis.i` per concept, `mean` and `encoder.*` if the method has them, and the
source."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..errors import FeatInvError
from ..files import as_float, read_about, read_tensors, write_safetensors
from .decomposition import Concepts
from .sparse import SparseEncoder

KEY, FORMAT = "featinv_concepts", 1


def save_concepts(file: str | Path, concepts: Concepts) -> None:
    """Writes a concept file whole or not at all."""
    tensors = {f"basis.{i}": basis.cpu().contiguous() for i, basis in enumerate(concepts.bases)}
    if concepts.mean is not None:
        tensors["mean"] = concepts.mean.cpu().contiguous()
    if concepts.encoder is not None:
        tensors |= {
            f"encoder.{key}": torch.as_tensor(value).cpu().contiguous() for key, value in vars(concepts.encoder).items()
        }
    about = {
        "format": FORMAT,
        "labels": list(concepts.labels),
        "source": concepts.source.to_dict(),
        "method": concepts.method,
        "settings": dict(concepts.settings),
    }
    write_safetensors(file, tensors, {KEY: json.dumps(about)})


def load_concepts(file: str | Path) -> Concepts:
    """Reads a concept file. Raises FeatInvError for a missing, truncated or foreign one, a later format version, wrong
    fields, and tensors that are missing, misshapen or no finite floating-point numbers."""
    from ..metadata import ConceptFile  # pydantic takes tenths of a second

    about = read_about(file, KEY, ConceptFile, "concept file")
    tensors, source = read_tensors(file), about.source.made()

    def read(name: str) -> torch.Tensor:
        if name not in tensors:
            raise FeatInvError(
                f"{file}: the tensor {name!r} is missing; it has {len(about.labels)} labels and the tensors"
                f" {', '.join(sorted(tensors)[:8]) or 'none'}"
            )
        return as_float(tensors[name], name, file)

    try:
        return Concepts(
            [read(f"basis.{i}") for i in range(len(about.labels))],
            about.labels,
            source,
            read("mean") if "mean" in tensors else None,
            about.method,
            about.settings,
            SparseEncoder(read("encoder.weight"), read("encoder.bias"), _number(tensors, "encoder.active"))
            if "encoder.weight" in tensors
            else None,
        )
    except FeatInvError as error:
        raise error if str(file) in str(error) else FeatInvError(f"{file}: {error}") from error


def _number(tensors: dict[str, torch.Tensor], name: str) -> int:
    value = tensors.get(name)
    if value is None or value.numel() != 1 or value.is_floating_point() or value.is_complex() or value.item() < 1:
        raise FeatInvError(f"the tensor {name!r} is missing or no whole number of at least 1")
    return int(value.item())
