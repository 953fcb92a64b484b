"""What a diffusion model predicts, with and without control (paper Sec. 2; ControlNet: Zhang et al. 2023).

A U-Net and a ControlNet are callables as diffusers calls them:

    controlnet(noisy, t, context, hint, conditioning_scale=..., return_dict=False) -> (down residuals, mid residual)
    unet(noisy, t, context, down_block_additional_residuals=..., mid_block_additional_residual=...).sample -> prediction

A scheduler is any object with `alphas_cumprod` [T], `config.prediction_type` ("epsilon" or "v_prediction") and
`config.num_train_timesteps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import FeatInvError

#: what a base model may predict, by diffusers' prediction_type: the noise or the velocity
PREDICTIONS = ("epsilon", "v_prediction")


class Frozen(Protocol):
    """A module that knows the precision and the device of its parameters, as diffusers' do."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class UNet(Frozen, Protocol):
    """A base model's U-Net, called as above."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def without_autocast(device: str) -> AbstractContextManager:
    """Turns autocast off where it exists: not on the meta device, for one. A compiler cannot look that up, nor needs
    to."""
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


@contextmanager
def in_own_precision(frozen: Frozen) -> Iterator[Callable[[Tensor], Tensor]]:
    """Runs a frozen module in the precision that it was cast to.

    CUDA's autocast would take each normalisation, and the activations around it, to float32. Yields a function that
    casts a tensor to that precision; does nothing for a module in float32.
    """
    if frozen.dtype == torch.float32:
        yield lambda x: x
        return
    with without_autocast(frozen.device.type):
        yield lambda x: x.to(frozen.dtype)


def prediction(unet: UNet, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """What the base model alone predicts [B, C, H, W]: e(x_t, t, text). Arguments as controlled_prediction's."""
    with in_own_precision(unet) as own:
        return unet(own(noisy), t, own(context)).sample


def controlled_prediction(
    unet: UNet,
    controlnet: Callable[..., Any],
    noisy: Tensor,
    t: Tensor,
    context: Tensor,
    hint: Tensor,
    strength: float = 1.0,
) -> Tensor:
    """The frozen base model's prediction, steered by features: e(x_t, t, text, f), paper Sec. 2.

    noisy: latents x_t [B, C, H, W]. t: timesteps [B], or one for all. context: text embeddings [B, T, D]. hint: the
    encoded feature maps [B, C_d, H, W]. strength: factor on the residuals of the ControlNet (App. A.2).
    Returns [B, C, H, W] in the precision of the U-Net.
    """
    down, mid = controlnet(noisy, t, context, hint, conditioning_scale=strength, return_dict=False)
    with in_own_precision(unet) as own:
        down, mid = [own(x) for x in down], own(mid)
        return unet(
            own(noisy), t, own(context), down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample


def predicted_clean(scheduler: Any, noisy: Tensor, pred: Tensor, t: Tensor) -> Tensor:
    """The clean latents x0_hat [B, C, H, W] that a prediction amounts to.

    With a = alphas_cumprod[t]: (x_t - sqrt(1 - a) e) / sqrt(a) for a prediction e of the noise (Ho et al. 2020, Eq.
    15), sqrt(a) x_t - sqrt(1 - a) v for a velocity v (Salimans & Ho 2022, App. D). t: a timestep for all rows, or [B].
    """
    signal, spread = _scales(scheduler, noisy, t)
    return signal * noisy - spread * pred if predicts_velocity(scheduler) else (noisy - spread * pred) / signal


def prediction_of(scheduler: Any, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The prediction at timestep t that amounts to the clean latents: the inverse of predicted_clean."""
    signal, spread = _scales(scheduler, noisy, t)
    return (signal * noisy - clean) / spread if predicts_velocity(scheduler) else (noisy - signal * clean) / spread


def noised(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Clean latents [B, C, H, W] with as much noise as they have at timestep t (Ho et al. 2020, Eq. 4):
    sqrt(a) x_0 + sqrt(1 - a) noise."""
    signal, spread = _scales(scheduler, clean, t)
    return signal * clean + spread * noise


def predicts_velocity(scheduler: Any) -> bool:
    """Whether the base model predicts the velocity; else it predicts the noise. Raises FeatInvError if neither."""
    if (kind := scheduler.config.prediction_type) not in PREDICTIONS:
        raise FeatInvError(f"the base model has prediction_type {kind!r}; expected {' or '.join(PREDICTIONS)}")
    return kind == "v_prediction"


def _scales(scheduler: Any, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = scheduler.alphas_cumprod.to(noisy.device)[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
