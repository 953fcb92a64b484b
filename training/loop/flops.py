"""The arithmetic that a training step cannot avoid, counted on tensors without storage."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from featinv_nodes.core.backbones import Backbone

from ..config import TrainConfig
from ..models.base_model import BaseModel
from ..models.controlnet import FeatureControlNet
from ..models.flops import gmac_of
from .objective import training_loss


def step_gmac(base: BaseModel, backbone: Backbone, model: FeatureControlNet, config: TrainConfig) -> float:
    """Multiply-accumulates (10^9) per image of a step, forward and backward, with latents and features there already
    and the base model frozen, by torch's counter: 262 for Stable Diffusion 1.x and ConvNeXt-Base's last layer."""
    on_meta = base_without_storage(base, "meta", torch.float32)
    frozen, trained = (without_storage(part, "meta", torch.float32) for part in (backbone, model))
    if hasattr(on_meta.unet, "disable_gradient_checkpointing"):
        on_meta.unet.disable_gradient_checkpointing()
        trained.controlnet.disable_gradient_checkpointing()
    batch, side, source = 8, base.latent_size, model.source
    latents = torch.empty(batch, base.unet.config.in_channels, side, side, device="meta")
    features = torch.empty(batch, source.channels, *((1, 1) if source.pooled else source.grid), device="meta")
    return gmac_of(lambda: training_loss(on_meta, frozen, trained, latents, features, config).backward()) / batch


def base_without_storage(base: BaseModel, device: str, dtype: torch.dtype | None = None) -> BaseModel:
    """A copy of the base model of such parts, see without_storage."""
    unet, vae = (without_storage(part, device, dtype) for part in (base.unet, base.vae))
    text = {prompt: torch.empty(value.shape, device=device) for prompt, value in base.text.items()}
    scheduler = type(base.scheduler).from_config(base.scheduler.config)  # adding noise moves its tensors to the device
    return BaseModel(base.name, unet, vae, scheduler, text)


def without_storage(module: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose tensors are empty ones, on the meta device or in a FakeTensorMode; dtype: of the floating-point
    ones."""
    known = {}
    for tensor in (*module.parameters(), *module.buffers()):
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        on_meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
        known[id(tensor)] = nn.Parameter(on_meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else on_meta
    return deepcopy(module, known)
