"""The training objective (core.objective) with the models and settings of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from featinv_nodes.core import objective
from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.guidance import feature_distance
from featinv_nodes.core.objective import Cycle, NoiseSample
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.prediction import in_own_precision

from ..config import TrainConfig
from ..models.base_model import BaseModel


def cast_frozen(config: TrainConfig, base: BaseModel, backbone: Backbone) -> None:
    """Frozen weights in bf16 where training is: rounded once, not at each step, and half as large."""
    if config.precision == "bf16":
        for part in (base.unet, base.vae, backbone):
            part.bfloat16()


def at_stage(config: TrainConfig, images_seen: int) -> TrainConfig:
    """What counts in the step after `images_seen`: the configuration, before cycle_after without cycle consistency."""
    return replace(config, cycle=0.0, cycle_after=0) if images_seen < config.cycle_after else config


def sample_noise(batch: int, moments: Tensor, base: BaseModel, config: TrainConfig) -> NoiseSample:
    """core.objective.sample_noise for a global batch, whatever share of it `moments` [*, 2 C, H, W] belong to."""
    shape = batch, moments.shape[1] // 2, *moments.shape[2:]
    return objective.sample_noise(shape, base.scheduler.config.num_train_timesteps, config.dropout, moments.device)


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


@torch.no_grad()
def observed_moments(base: BaseModel, batch: dict[str, Tensor]) -> Tensor:
    """The first of what observe gives."""
    if "moments" in batch:
        return batch["moments"].float()
    target = batch["target"] if "target" in batch else batch["pictures"]
    return moments_of(base, target.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def observed_features(backbone: Backbone, batch: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """The second of what observe gives."""
    if "features" in batch:
        return batch["features"].float()
    return backbone.values(backbone.preprocess(batch["pictures"], "stretch"), config.layer, config.pooled).float()


def observe(
    base: BaseModel, backbone: Backbone, batch: dict[str, Tensor], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """What the autoencoder and the backbone make of the same crops: moments [B, 2 C, H, W] and feature values
    [B, C_f, h, w], float32.

    batch: "moments" and "features" where they are cached; else "pictures" [B, 3, h, w] in 0..1 for the backbone, and
    "target", the same crops at the base model's resolution, where that is another.
    """
    return observed_moments(base, batch), observed_features(backbone, batch, config)


def training_loss(
    base: BaseModel,
    backbone: Backbone,
    model: torch.nn.Module,
    latents: Tensor,
    features: Tensor,
    config: TrainConfig,
    noise: NoiseSample | None = None,
) -> Tensor:
    """core.objective.training_loss of latents [B, C, H, W] and features [B, C_f, h, w] with the run's settings.

    model: called with (unet, noisy, t, context, values) as FeatureControlNet is. noise: drawn here if None.
    """

    def predict(noisy: Tensor, t: Tensor, context: Tensor, values: Tensor) -> Tensor:
        return model(base.unet, noisy, t, context, values)

    def distance(clean: Tensor, values: Tensor) -> Tensor:
        return cycle_distance(base, backbone, clean, values, config)

    noise = noise or sample_noise(len(latents), torch.cat([latents, latents], 1), base, config)
    cycle = Cycle(distance, config.cycle, config.cycle_below, 1 - config.dropout) if config.cycle else None
    text, empty = base.text[config.prompt], base.text[""]
    return objective.training_loss(
        predict, base.scheduler, latents, features, text, empty, noise, config.min_snr, cycle
    )


def cycle_distance(base: BaseModel, backbone: Backbone, clean: Tensor, features: Tensor, config: TrainConfig) -> Tensor:
    """[B] means over locations of 1 - cos(F(D(x0_hat)), f), D the decoder and F the backbone. Gradients reach
    `clean`."""
    return feature_distance(base.decode(clean), backbone, features, config.layer, config.pooled)
