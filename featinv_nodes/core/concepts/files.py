"""The concept file: safetensors with `basis.i` per concept, `mean` and `encoder.*` where there are such, and the
source."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..feature_map import FeatInvError, FeatureSource
from ..files import read_about, read_tensors, write_safetensors
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
    """Reads a concept file. Raises FeatInvError for a missing, truncated or foreign one, or another format version."""
    about = read_about(file, KEY, "concept file")
    if about.get("format") != FORMAT:
        raise FeatInvError(f"{file} has format version {about.get('format')}; this release reads version {FORMAT}")
    tensors = read_tensors(file)
    bases = [tensors[f"basis.{i}"] for i in range(len(about["labels"]))]
    encoder = None
    if "encoder.weight" in tensors:
        encoder = SparseEncoder(tensors["encoder.weight"], tensors["encoder.bias"], int(tensors["encoder.active"]))
    return Concepts(
        bases,
        about["labels"],
        FeatureSource.from_dict(about["source"]),
        tensors.get("mean"),
        about["method"],
        about["settings"],
        encoder,
    )
