"""Feature maps on disk: safetensors with the values, the prefix tokens and the source."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .feature_map import FeatInvError, FeatureMap, FeatureSource
from .weights import write_safetensors

KEY = "featinv_features"


def save_features(file: str | Path, features: FeatureMap) -> None:
    """Writes a feature map, float32, whole or not at all."""
    tensors = {"values": features.values.cpu().contiguous()}
    if features.prefix is not None:
        tensors["prefix"] = features.prefix.cpu().contiguous()
    write_safetensors(file, tensors, {KEY: json.dumps(features.source.to_dict())})


def load_features(file: str | Path) -> FeatureMap:
    """Reads what save_features wrote. Raises FeatInvError for a missing, truncated or foreign file."""
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            if text is None:
                raise FeatInvError(f"{file} is no feature map: its metadata has no entry {KEY!r}; SaveFeatures writes such files")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except FileNotFoundError as error:
        raise FeatInvError(f"feature file {file} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is not a complete safetensors file ({error}); save or copy it again") from error
    return FeatureMap(tensors["values"], FeatureSource.from_dict(json.loads(text)), tensors.get("prefix"))
