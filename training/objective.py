"""What an inversion model is trained on: the base model's own objective, and optionally the features it should have."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone

from .base_model import BaseModel
from .config import TrainConfig


@torch.no_grad()
def observe(base: BaseModel, backbone: Backbone, images: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """What the autoencoder and the backbone make of the same crops [B, 3, h, w] in 0..1: latents [B, C, H, W] and
    feature values [B, C_f, h, w], float32."""
    features = backbone.values(backbone.frame(images, "stretch"), config.layer, config.pooled).float()
    side = (base.resolution,) * 2
    target = images if images.shape[2:] == side else F.interpolate(images, side, mode="bilinear", antialias=True)
    return base.encode(target.contiguous(memory_format=torch.channels_last)).float(), features


def training_loss(base: BaseModel, backbone: Backbone, model: torch.nn.Module, latents: Tensor, features: Tensor, config: TrainConfig) -> Tensor:
    """The base model's own objective (paper Sec. 2; Ho et al. 2020): predict the noise, or the velocity where the
    base model does so, of latents [B, C, H, W] at random timesteps, given features [B, C_f, h, w].

    A share `dropout` of the samples sees neither features (zeros) nor text (the empty prompt). With config.cycle the
    others add that much of cycle_distance.
    """
    batch, scheduler = len(latents), base.scheduler
    noise = torch.randn_like(latents)
    t = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=latents.device)
    dropped = torch.rand(batch, device=latents.device) < config.dropout
    context = torch.where(dropped[:, None, None], base.text[""], base.text[config.prompt])
    shown = features.masked_fill(dropped[:, None, None, None], 0.0)
    noisy = scheduler.add_noise(latents, noise, t)
    velocity = scheduler.config.prediction_type == "v_prediction"
    wanted = scheduler.get_velocity(latents, noise, t) if velocity else noise
    found = model(base.unet, noisy, t, context, shown).float()
    loss = F.mse_loss(found, wanted.float())
    if config.cycle:
        chosen = ~dropped & (t < config.cycle_below)
        # as many rows as are chosen on average, so that memory and shapes stay the same from step to step
        count = math.ceil(batch * (1 - config.dropout) * config.cycle_below / scheduler.config.num_train_timesteps)
        rows = chosen.int().argsort(descending=True, stable=True)[:count]
        clean = predicted_clean(base, noisy[rows], found.index_select(0, rows), t[rows])
        distance = cycle_distance(base, backbone, clean, features[rows], config)
        loss = loss + config.cycle * (distance * chosen[rows]).sum() / chosen[rows].sum().clamp(min=1)
    return loss


def predicted_clean(base: BaseModel, noisy: Tensor, found: Tensor, t: Tensor) -> Tensor:
    """x0_hat: the clean latents [B, C, H, W] that a prediction `found` at timesteps t [B] amounts to."""
    kept = base.scheduler.alphas_cumprod.to(noisy.device)[t][:, None, None, None]
    if base.scheduler.config.prediction_type == "v_prediction":
        return kept.sqrt() * noisy - (1 - kept).sqrt() * found
    return (noisy - (1 - kept).sqrt() * found) / kept.sqrt()


def cycle_distance(base: BaseModel, backbone: Backbone, clean: Tensor, features: Tensor, config: TrainConfig) -> Tensor:
    """[B] means over locations of 1 - cos(F(D(x0_hat)), f), D the decoder and F the backbone: the cycle
    consistency of ControlNet++ (Li et al. 2024) with features as the condition. Gradients reach `clean`."""
    seen = backbone.values(backbone.frame(base.decode(clean), "stretch"), config.layer, config.pooled)
    return 1 - F.cosine_similarity(seen.float(), features.float(), dim=1).mean((1, 2))
