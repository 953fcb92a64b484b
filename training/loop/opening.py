"""The lines that a run prints before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.prediction import in_own_precision

from ..config import TrainConfig
from ..models.base_model import BaseModel
from . import memory
from .folder import room
from .log import peak_memory
from .objective import observe

if TYPE_CHECKING:
    from .run import Run

KINDS = {"epsilon": "noise", "v_prediction": "velocity"}  # prediction types of base models that can be trained on
TRIED = 4  # pictures that the frozen parts are tried on
#: standard deviations of latents that a right scaling factor gives: about 1 (Rombach et al. 2022, App. D.1)
SPREAD = (0.2, 5.0)


def opening(run: Run) -> list[str]:
    """What a run says of its pictures, models, memory and disk once everything is open. Raises FeatInvError as tried
    does."""
    config, required = run.config, memory.needed(*run.memory_parts[1:])
    checkpoints, free = room(run.output, run.checkpoint_bytes, config.keep)
    return [
        f"images: {run.pictures.describe()}",
        *tried(run.base, run.backbone, run.images, config),
        f"memory: weights and optimizer take {required:.2f} GB, and the images of a batch come on top;"
        f" {run.device} has {memory.available(run.device):.1f} GB",
        f"disk: checkpoints need {checkpoints / 1e9:.2f} GB more; {run.output} has {free / 1e9:.1f} GB left",
    ]


@torch.no_grad()
def tried(base: BaseModel, backbone: Backbone, batch: dict[str, Tensor], config: TrainConfig) -> list[str]:
    """What to say of the base model, its scheduler and the backbone after a look at a few pictures. batch: as observe
    takes it. Takes none of the run's random numbers. Raises FeatInvError where one of them cannot be right."""
    scheduler, kind = base.scheduler, base.scheduler.config.prediction_type
    left = scheduler.alphas_cumprod.double().cpu()
    if kind not in KINDS or not 0 <= left.min() <= left.max() <= 1 or (left.diff() >= 0).any():
        raise FeatInvError(
            f"base model {base.name}: its scheduler predicts {kind!r} over alphas_cumprod from {left[0]:.3g} to"
            f" {left[-1]:.3g}; expected 'epsilon' or 'v_prediction', falling within 0 and 1"
        )
    moments, features = observe(base, backbone, {name: rows[:TRIED] for name, rows in batch.items()}, config)
    latents, source = moments.chunk(2, 1)[0], backbone.source(config.layer, config.pooled)
    for values, what in ((latents, f"latents of {base.name}"), (features, f"features of {backbone.name}")):
        if not values.isfinite().all():
            raise FeatInvError(f"the {what} of the first images are not finite; --precision fp32 may help")
    losses, spread = own_losses(base, latents, config.prompt), latents.std().item()
    doubt = "" if SPREAD[0] < spread < SPREAD[1] else ", which should be about 1: its scaling factor may be wrong"
    said, other = KINDS[kind], next(name for name in losses if name != KINDS[kind])
    better = (
        f"; but what it predicts fits {other} prediction better, {losses[other]:.3f}: is the base model's type right?"
    )
    same = len(features) > 1 and not features.flatten(1).std(0).any()
    return [
        f"base model: {base.name}; the first images' latents have standard deviation {spread:.2f}{doubt}",
        f"scheduler: {said} prediction over {len(left)} timesteps; at half of them the base model's own loss is"
        f" {losses[said]:.3f} (1 is a guess){better if losses[other] < losses[said] else ''}",
        f"backbone: {source.describe()}{'; but the first images all have the same features' if same else ''}",
    ]


def own_losses(base: BaseModel, latents: Tensor, prompt: str) -> dict[str, float]:
    """The base model's mean squared error for latents [B, C, H, W] at half of the timesteps, without a ControlNet, as
    a prediction of the noise and of the velocity, each in units of its mean square: 1 for predicting nothing."""
    scheduler = base.scheduler
    t = torch.full((len(latents),), len(scheduler.alphas_cumprod) // 2, device=latents.device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    noisy, velocity = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
    with in_own_precision(base.unet) as own:
        pred = base.unet(own(noisy), t, own(base.text[prompt].expand(len(latents), -1, -1))).sample.float()
    return {
        name: (F.mse_loss(pred, target) / target.square().mean()).item()
        for name, target in (("noise", noise), ("velocity", velocity))
    }


def duration(images: int, rate: float) -> str:
    """How long `images` take at `rate` images per second, such as "2 h 05 min"."""
    minutes = images / rate / 60
    return f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else _hours(minutes)


def _hours(minutes: float) -> str:
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02d} min"


def time_left(run: Run, rate: float) -> str:
    """What to say of the time that a run will take at `rate` images per second."""
    rest = max(run.config.max_images - run.images_seen, 0)
    return (
        f"time: a step of {run.per_step} images takes {run.per_step / rate:.3g} s, the {rest:,} images left"
        f" {duration(rest, rate)}, without panels and checkpoints; {peak_memory():.2f} GB of memory at most so far"
    )
