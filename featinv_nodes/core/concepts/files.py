"""The concept file: safetensors with `basis.i` per concept, `mean` where there is one, and the source."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..feature_map import FeatInvError, FeatureSource
from ..weights import write_safetensors
from .decomposition import Concepts

KEY, FORMAT = "featinv_concepts", 1


def save_concepts(file: str | Path, concepts: Concepts) -> None:
    """Writes a concept file whole or not at all."""
    tensors = {f"basis.{i}": basis.cpu().contiguous() for i, basis in enumerate(concepts.bases)}
    if concepts.mean is not None:
        tensors["mean"] = concepts.mean.cpu().contiguous()
    about = {
        "format": FORMAT, "labels": list(concepts.labels), "source": concepts.source.to_dict(),
        "method": concepts.method, "settings": dict(concepts.settings),
    }  # fmt: skip
    write_safetensors(file, tensors, {KEY: json.dumps(about)})


def load_concepts(file: str | Path) -> Concepts:
    """Reads a concept file. Raises FeatInvError for a missing, truncated or foreign one, or another format version."""
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()} if text else {}
    except FileNotFoundError as error:
        raise FeatInvError(f"concept file {file} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); download or copy it again") from error
    if text is None:
        raise FeatInvError(f"{file} is no concept file: its metadata has no entry {KEY!r}")
    about = json.loads(text)
    if about.get("format") != FORMAT:
        raise FeatInvError(f"{file} has format version {about.get('format')}; this release reads version {FORMAT}")
    bases = [tensors[f"basis.{i}"] for i in range(len(about["labels"]))]
    return Concepts(bases, about["labels"], FeatureSource.from_dict(about["source"]), tensors.get("mean"), about["method"], about["settings"])
