"""How a run begins: frozen parts, another model's weights, the standard deviation of its features."""

from __future__ import annotations

import torch
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.worlds import open_backbone

from ..config import TrainConfig
from ..models.base_model import BaseModel, load_base
from ..models.controlnet import FeatureControlNet
from .objective import observed_features


def open_frozen(config: TrainConfig, device: torch.device) -> tuple[BaseModel, Backbone]:
    """The base model and the backbone, in float32."""
    base = load_base(config.base, config.prompt).to(device)
    backbone = open_backbone(config.backbone, config.backbone_weights, config.input_size, run_code=True)
    return base, backbone.to(device, memory_format=torch.channels_last)


def start_from(model: FeatureControlNet, file: str, base: BaseModel) -> int | None:
    """Copies the ControlNet of a weights file, and its encoder if it inverts the same features; returns the images
    that such a model has seen, None for other features."""
    other, info = FeatureControlNet.load(file, base)
    model.controlnet.load_state_dict(other.controlnet.state_dict())
    if info.source != model.source or other.encoder.settings != model.encoder.settings:
        return None
    model.encoder.load_state_dict(other.encoder.state_dict())
    return info.images_seen


def standardise(
    model: FeatureControlNet, batch: dict[str, Tensor], backbone: Backbone, config: TrainConfig, device: torch.device
) -> None:
    """Sets the encoder's mean and standard deviation to those of the features it will read; batch: as observe takes it,
    any number of rows, of which config.batch are observed at once."""
    parts = zip(*(rows.split(config.batch) for rows in batch.values()))
    features = [
        observed_features(backbone, {name: rows.to(device) for name, rows in zip(batch, part)}, config)
        for part in parts
    ]
    model.encoder.standardise(torch.cat(features))
