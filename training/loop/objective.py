"""What an inversion model is trained on: the base model's own objective, and optionally the features it should have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.guidance import feature_distance
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder

from ..config import TrainConfig
from ..models.base_model import BaseModel, in_own_precision
from ..models.pipeline import predicted_clean


def lighten(config: TrainConfig, base: BaseModel, backbone: Backbone) -> None:
    """Frozen weights in bf16 where training is: rounded once, not at each step, and half as large."""
    if config.precision == "bf16":
        for part in (base.unet, base.vae, backbone):
            part.bfloat16()


def at_stage(config: TrainConfig, seen: int) -> TrainConfig:
    """What counts in the step after `seen` images: the configuration, before cycle_after without cycle consistency."""
    return replace(config, cycle=0.0, cycle_after=0) if seen < config.cycle_after else config


class Chance(NamedTuple):
    """The random part of a step, a row per image: noise [B, C, H, W], timesteps t [B], dropped [B] samples without
    features and text, and the noise [B, C, H, W] that the latents are drawn from their moments with."""

    noise: Tensor
    t: Tensor
    dropped: Tensor
    latent: Tensor

    def rows(self, first: int, count: int) -> Chance:
        return Chance(*(part[first : first + count] for part in self))


def draw_chance(batch: int, moments: Tensor, base: BaseModel, config: TrainConfig) -> Chance:
    """Chance for a global batch, whatever share of it `moments` [*, 2 C, H, W] belong to: processes that draw with the
    same seed and take their own rows train as one process would."""
    device, shape = moments.device, (batch, moments.shape[1] // 2, *moments.shape[2:])
    noise = torch.randn(shape, device=device)
    t = torch.randint(base.scheduler.config.num_train_timesteps, (batch,), device=device)
    dropped = torch.rand(batch, device=device) < config.dropout
    return Chance(noise, t, dropped, torch.randn(shape, device=device))


@torch.no_grad()
def moments_of(base: BaseModel, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] in 0..1 -> [B, 2 C, H, W] float32: mean and log-variance of the autoencoder's posterior in
    scaled latents. The embedded autoencoder has no variance, and its logarithm is -inf."""
    if isinstance(base.vae, PatchAutoencoder):
        mean = base.encode(pictures).float()
        return torch.cat([mean, torch.full_like(mean, -math.inf)], 1)
    with in_own_precision(base.vae) as own:
        posterior, factor = base.vae.encode(own(pictures * 2 - 1)).latent_dist, base.vae.config.scaling_factor
    return torch.cat([posterior.mean.float() * factor, posterior.logvar.float() + 2 * math.log(factor)], 1)


def latents_from(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, H, W] drawn from their posterior, as the paper's code and REPA (Yu et al. 2025) do."""
    mean, log_variance = moments.float().chunk(2, 1)
    return mean + (log_variance / 2).exp() * noise


@torch.no_grad()
def observed_moments(base: BaseModel, seen: dict[str, Tensor]) -> Tensor:
    """The first of what observe gives."""
    if "moments" in seen:
        return seen["moments"].float()
    target = seen["target"] if "target" in seen else seen["pictures"]
    return moments_of(base, target.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def observed_features(backbone: Backbone, seen: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """The second of what observe gives."""
    if "features" in seen:
        return seen["features"].float()
    return backbone.values(backbone.frame(seen["pictures"], "stretch"), config.layer, config.pooled).float()


def observe(base: BaseModel, backbone: Backbone, seen: dict[str, Tensor], config: TrainConfig) -> tuple[Tensor, Tensor]:
    """What the autoencoder and the backbone make of the same crops: moments [B, 2 C, H, W] and feature values
    [B, C_f, h, w], float32.

    seen: "moments" and "features" where they are cached; else "pictures" [B, 3, h, w] in 0..1 for the backbone, and
    "target", the same crops at the base model's resolution, where that is another.
    """
    return observed_moments(base, seen), observed_features(backbone, seen, config)


def training_loss(
    base: BaseModel, backbone: Backbone, model: torch.nn.Module, latents: Tensor, features: Tensor, config: TrainConfig, chance: Chance | None = None
) -> Tensor:
    """The base model's own objective (paper Sec. 2; Ho et al. 2020): predict the noise, or the velocity where the
    base model does so, of latents [B, C, H, W] at random timesteps, given features [B, C_f, h, w].

    A share `dropout` of the samples sees neither features (zeros) nor text (the empty prompt). With config.min_snr the
    timesteps are weighted, with config.cycle the others add that much of cycle_distance. chance: drawn here if None.
    """
    batch, scheduler = len(latents), base.scheduler
    noise, t, dropped, _ = chance or draw_chance(batch, torch.cat([latents, latents], 1), base, config)
    context = torch.where(dropped[:, None, None], base.text[""], base.text[config.prompt])
    shown = features.masked_fill(dropped[:, None, None, None], 0.0)
    noisy = scheduler.add_noise(latents, noise, t)
    velocity = scheduler.config.prediction_type == "v_prediction"
    wanted = scheduler.get_velocity(latents, noise, t) if velocity else noise
    found = model(base.unet, noisy, t, context, shown).float()
    if config.min_snr:
        weight = min_snr_weight(scheduler.alphas_cumprod.to(t.device)[t], config.min_snr, velocity)
        loss = (weight * F.mse_loss(found, wanted.float(), reduction="none").mean((1, 2, 3))).mean()
    else:
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


def min_snr_weight(kept: Tensor, gamma: float, velocity: bool) -> Tensor:
    """Weights [B] of the squared error at alphas_cumprod `kept` [B]: min(SNR, gamma) / SNR for noise prediction,
    min(SNR, gamma) / (SNR + 1) for velocity (Hang et al. 2023, Sec. 3.4), SNR = kept / (1 - kept)."""
    ratio = kept / (1 - kept)
    return ratio.clamp(max=gamma) / (ratio + 1) if velocity else (gamma / ratio).clamp(max=1)


def cycle_distance(base: BaseModel, backbone: Backbone, clean: Tensor, features: Tensor, config: TrainConfig) -> Tensor:
    """[B] means over locations of 1 - cos(F(D(x0_hat)), f), D the decoder and F the backbone: the cycle
    consistency of ControlNet++ (Li et al. 2024) with features as the condition. Gradients reach `clean`."""
    return feature_distance(base.decode(clean), backbone, features, config.layer, config.pooled)
