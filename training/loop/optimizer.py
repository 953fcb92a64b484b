"""AdamW, and its step: clipped, and left out where the gradients are not finite."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from featinv_nodes.core.errors import FeatInvError

from ..config import TrainConfig
from ..models.controlnet import FeatureControlNet

LARGEST_NORM = 1.0


def build_optimizer(model: FeatureControlNet, config: TrainConfig) -> Optimizer:
    """The configuration's optimizer over two groups, the encoder and the ControlNet.

    Raises FeatInvError if bitsandbytes is wanted and missing.
    """
    groups = [{"params": list(model.encoder.parameters())}, {"params": list(model.controlnet.parameters())}]
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise FeatInvError(
            "optimizer 'adamw8bit' needs the package bitsandbytes: pip install bitsandbytes, or take 'adamw'"
        ) from error
    return AdamW8bit(groups, lr=config.lr, weight_decay=config.weight_decay)


def weights_layout(config: TrainConfig, device: torch.device | str) -> torch.memory_format:
    """channels_last, the faster one for convolutions; but contiguous for steps on a processor that are not compiled,
    where the fused AdamW copies weights of any other layout, which costs more."""
    plain = torch.device(device).type == "cpu" and not config.compile
    return torch.contiguous_format if plain else torch.channels_last


def clip_and_step(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> Tensor:
    """Clips the gradients' norm and steps; where it is not finite, weights and moments stay as they are. Returns
    whether it was finite: all processes see the same norm, so they agree. optimizer: as accelerator.prepare gave it.

    With fp16 loss scaling decides, and steps that it leaves out are part of its search.
    """
    inner = optimizer.optimizer
    if accelerator.scaler is None and accelerator.distributed_type != DistributedType.FSDP and isinstance(inner, AdamW):
        return fused_step(inner)
    norm = accelerator.clip_grad_norm_(model.parameters(), LARGEST_NORM)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # shared out by FSDP
    if accelerator.scaler is not None:
        optimizer.step()
        return torch.ones((), dtype=torch.bool, device=norm.device)
    finite = norm.isfinite()
    if finite:
        optimizer.step()
    return finite


def fused_step(optimizer: AdamW, largest_norm: float = LARGEST_NORM) -> Tensor:
    """clip_and_step with a fused AdamW: it scales the gradients as it reads them, and decides on the device, without
    waiting for it, whether to step; both through the arguments that it has for loss scaling."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    finite = norm.isfinite()
    optimizer.grad_scale = (norm / largest_norm).clamp(min=1)
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    return finite
