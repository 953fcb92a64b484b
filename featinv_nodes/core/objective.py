"""The training objective: the base model's own loss, conditioned on features (paper Sec. 2).

A scheduler is what core.prediction takes, with diffusers' `add_noise(latents, noise, t)` and, for velocity,
`get_velocity(latents, noise, t)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .prediction import predicted_clean, predicts_velocity


class NoiseSample(NamedTuple):
    """The random part of a step, a row per image.

    noise: [B, C, H, W], added to the latents. t: timesteps [B]. dropped: [B] bool, samples without features and text.
    latent: [B, C, H, W], the noise with which latents are drawn from their posterior.
    """

    noise: Tensor
    t: Tensor
    dropped: Tensor
    latent: Tensor

    def rows(self, first: int, count: int) -> NoiseSample:
        """`count` rows from `first` on."""
        return NoiseSample(*(part[first : first + count] for part in self))


def sample_noise(shape: tuple[int, ...], timesteps: int, dropout: float, device: torch.device | str) -> NoiseSample:
    """Draws the noise of a global batch of latents, shape (B, C, H, W).

    Processes that draw with the same seed and take their own rows train as one process would. timesteps: how many the
    base model has. dropout: share of the samples that lose features and text together.
    """
    noise = torch.randn(shape, device=device)
    t = torch.randint(timesteps, shape[:1], device=device)
    dropped = torch.rand(shape[:1], device=device) < dropout
    return NoiseSample(noise, t, dropped, torch.randn(shape, device=device))


def latents_from(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, H, W] drawn from their posterior N(mean, exp(log-variance)), as the paper's code and REPA (Yu et
    al. 2025) do. moments: [B, 2 C, H, W], mean and log-variance. noise: standard normal [B, C, H, W]."""
    mean, log_variance = moments.float().chunk(2, 1)
    return mean + (log_variance / 2).exp() * noise


def drop_jointly(features: Tensor, text: Tensor, empty: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Joint dropout of both conditions, which classifier-free guidance needs (paper Sec. 2; Ho & Salimans 2022).

    features: [B, C_f, h, w], zeros where dropped. text, empty: embeddings [1, T, D] of the prompt and of the empty
    prompt, which stands in for it where dropped [B]. Returns (features, context [B, T, D]).
    """
    return features.masked_fill(dropped[:, None, None, None], 0.0), torch.where(dropped[:, None, None], empty, text)


def target_of(scheduler: Any, latents: Tensor, sample: NoiseSample) -> Tensor:
    """What the base model is to predict: the noise (Ho et al. 2020, Eq. 14), or the velocity sqrt(a) noise - sqrt(1 -
    a) latents, a = alphas_cumprod[t] (Salimans & Ho 2022, App. D). [B, C, H, W]."""
    return scheduler.get_velocity(latents, sample.noise, sample.t) if predicts_velocity(scheduler) else sample.noise


def min_snr_weight(alpha_bar: Tensor, gamma: float, velocity: bool) -> Tensor:
    """Weights [B] of the squared error at alphas_cumprod alpha_bar [B]: min(SNR, gamma) / SNR for noise prediction,
    min(SNR, gamma) / (SNR + 1) for velocity (Hang et al. 2023, Sec. 3.4), SNR = alpha_bar / (1 - alpha_bar)."""
    ratio = alpha_bar / (1 - alpha_bar)
    return ratio.clamp(max=gamma) / (ratio + 1) if velocity else (gamma / ratio).clamp(max=1)


class Cycle(NamedTuple):
    """Cycle consistency as in ControlNet++ (Li et al. 2024), with features as the condition.

    distance: (clean latents [N, C, H, W], feature values [N, C_f, h, w]) -> [N], differentiable; see
    core.guidance.feature_distance. weight: of its mean in the loss. below: timesteps under which it counts. share: of
    the rows that are not dropped, on average.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    weight: float
    below: int
    share: float


def cycle_loss(
    scheduler: Any, noisy: Tensor, pred: Tensor, features: Tensor, sample: NoiseSample, cycle: Cycle
) -> Tensor:
    """Mean distance between the features of the predicted picture, F(D(x0_hat)), and the given ones f.

    As many rows are decoded as count on average, so that memory and shapes stay the same from step to step.
    """
    chosen = ~sample.dropped & (sample.t < cycle.below)
    count = max(1, math.ceil(len(noisy) * cycle.share * cycle.below / scheduler.config.num_train_timesteps))
    rows = chosen.int().argsort(descending=True, stable=True)[:count]
    clean = predicted_clean(scheduler, noisy[rows], pred.index_select(0, rows), sample.t[rows])
    distance = cycle.distance(clean, features[rows])
    return (distance * chosen[rows]).sum() / chosen[rows].sum().clamp(min=1)


def training_loss(
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    scheduler: Any,
    latents: Tensor,
    features: Tensor,
    text: Tensor,
    empty: Tensor,
    sample: NoiseSample,
    min_snr: float = 0.0,
    cycle: Cycle | None = None,
) -> Tensor:
    """The loss of a batch (paper Sec. 2): || target - e(x_t, t, text, f) ||^2, mean over all elements.

    predict: (noisy [B, C, H, W], t [B], context [B, T, D], features [B, C_f, h, w]) -> prediction [B, C, H, W].
    latents: clean, [B, C, H, W]. text, empty: embeddings [1, T, D]. min_snr: gamma of min_snr_weight, 0 for none.
    cycle: adds its weight times cycle_loss. Returns a scalar.
    """
    cond, context = drop_jointly(features, text, empty, sample.dropped)
    noisy = scheduler.add_noise(latents, sample.noise, sample.t)
    pred, target = predict(noisy, sample.t, context, cond).float(), target_of(scheduler, latents, sample).float()
    if min_snr:
        weight = min_snr_weight(
            scheduler.alphas_cumprod.to(sample.t.device)[sample.t], min_snr, predicts_velocity(scheduler)
        )
        loss = (weight * F.mse_loss(pred, target, reduction="none").mean((1, 2, 3))).mean()
    else:
        loss = F.mse_loss(pred, target)
    return loss if cycle is None else loss + cycle.weight * cycle_loss(scheduler, noisy, pred, features, sample, cycle)
