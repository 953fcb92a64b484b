"""Feature maps on disk: safetensors with the values, the prefix tokens and the source."""

from __future__ import annotations

import json
from pathlib import Path

from .feature_map import FeatInvError, FeatureMap, FeatureSource
from .files import read_about, read_tensors, write_safetensors

KEY = "featinv_features"


def save_features(file: str | Path, features: FeatureMap) -> None:
    """Writes a feature map, float32, whole or not at all."""
    tensors = {"values": features.values.cpu().contiguous()}
    if features.prefix is not None:
        tensors["prefix"] = features.prefix.cpu().contiguous()
    write_safetensors(file, tensors, {KEY: json.dumps(features.source.to_dict())})


def load_features(file: str | Path) -> FeatureMap:
    """Reads what save_features wrote. Raises FeatInvError for a missing, truncated or foreign file."""
    about = read_about(file, KEY, "feature map")
    tensors = read_tensors(file)
    if "values" not in tensors:
        raise FeatInvError(f"{file} holds no feature map: its tensors are {', '.join(tensors) or 'none'}")
    return FeatureMap(tensors["values"], FeatureSource.from_dict(about), tensors.get("prefix"))
