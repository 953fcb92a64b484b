"""How a run begins: frozen parts, another model's weights, the standard deviation of its features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
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


def require_same_weights(before: dict[str, str], now: dict[str, str], folder: Path) -> None:
    """Raises FeatInvError if a run would go on with other frozen weights than it began with. before, now: digests by
    part; a checkpoint may not know them."""
    differing = [
        f"{part}: digest {before[part]} then, {value} now"
        for part, value in now.items()
        if before.get(part, value) != value
    ]
    if differing:
        raise FeatInvError(
            f"the run in {folder} began with other weights of the same name ({'; '.join(differing)}); give those that"
            " it began with, or begin anew with another --output"
        )


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has arithmetic for bf16, as GPUs since NVIDIA's Ampere and some processors have. Others round
    every result to it, which costs time and saves none."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def own_device() -> torch.device:
    """The device that accelerate gives this process. Joins the processes of a launcher, so the launcher's --cpu counts
    already."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def with_precision(config: TrainConfig, device: torch.device, began: str | None = None) -> tuple[TrainConfig, str]:
    """(the configuration with `auto` replaced for a device, a line about it). began: the precision of a continued
    run, which `auto` keeps."""
    native, asked = computes_in_bf16(device), config.precision
    if asked == "auto":
        precision = began if began in ("fp32", "bf16", "fp16") else "bf16" if native else "fp32"
        why = f"as the run began on, {device}" if began == precision else f"chosen for {device}"
        why += f", which {'computes' if native else 'does not compute'} in bf16"
    else:
        precision, why = asked, f"as asked for, on {device}"
    if precision == "bf16" and not native:
        why += "; it is slow on this device, where --precision fp32 is faster"
    if asked != "auto" and began not in (None, "auto", asked):
        why += f"; the run began with {began}"
    return replace(config, precision=precision), f"precision: {precision}, {why}"


def start_from(model: FeatureControlNet, file: str, base: BaseModel) -> int | None:
    """Copies the ControlNet of a weights file, and its encoder if it inverts the same features, of the same weights as
    far as they are known; returns the images that such a model has seen, None for other features."""
    other, info = FeatureControlNet.load(file, base)
    model.controlnet.load_state_dict(other.controlnet.state_dict())
    if not info.source.fits(model.source) or other.encoder.settings != model.encoder.settings:
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
