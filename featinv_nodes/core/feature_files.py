"""Feature maps on disk: safetensors with the values, the prefix tokens and the source."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import FeatInvError
from .feature_map import FeatureMap
from .files import as_float, read_about, read_tensors, write_safetensors

KEY = "featinv_features"


def save_features(file: str | Path, features: FeatureMap) -> None:
    """Writes a feature map, float32, whole or not at all. Raises FeatInvError for a name that is too long."""
    tensors = {"values": features.values.cpu().contiguous()}
    if features.prefix is not None:
        tensors["prefix"] = features.prefix.cpu().contiguous()
    write_safetensors(file, tensors, {KEY: json.dumps(features.source.to_dict())})


def load_features(file: str | Path) -> FeatureMap:
    """Reads what save_features wrote, or another program in any floating-point numbers.

    Raises FeatInvError for a missing, truncated or foreign file, wrong fields, other numbers than floating-point ones,
    NaN, and tensors that do not fit the source.
    """
    from .metadata import Source  # pydantic takes tenths of a second

    source = read_about(file, KEY, Source, "feature map").made()
    tensors = read_tensors(file)
    if "values" not in tensors:
        raise FeatInvError(f"{file} holds no feature map: its tensors are {', '.join(tensors) or 'none'}")
    values = as_float(tensors["values"], "values", file)
    prefix = as_float(tensors["prefix"], "prefix", file) if "prefix" in tensors else None
    if values.numel() == 0:
        raise FeatInvError(f"{file} holds no feature map: its tensor 'values' has the shape {tuple(values.shape)}")
    if prefix is not None and (prefix.ndim != 3 or prefix.shape[::2] != (*values.shape[:1], source.channels)):
        raise FeatInvError(
            f"{file}: the tensor 'prefix' has the shape {tuple(prefix.shape)}; expected [batch, tokens,"
            f" {source.channels}], or none"
        )
    try:
        return FeatureMap(values, source, prefix)
    except FeatInvError as error:
        raise FeatInvError(f"{file}: {error}") from error
