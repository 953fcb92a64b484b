"""Sampling with diffusers' solvers: core.sampling on a base model and an inversion model."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.guidance import leave_inference, toward_features
from featinv_nodes.core.prediction import in_own_precision
from featinv_nodes.core.sampling import SOLVERS, SPACINGS, PartWay, Sampling, sample_latents, starting_noise
from featinv_nodes.core.waiting import cancellable, unchecked

from .base_model import BaseModel
from .controlnet import FeatureControlNet

Solver = DDIMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler
#: sampling.SOLVERS in diffusers' classes
SOLVER_CLASSES = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp_2m": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"},
    ),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}),
}
#: core.sampling.SPACINGS in diffusers' settings. The official code takes timesteps from 1 on, and its last step ends at
#: the noise of timestep 0, not at none.
SPACING_SETTINGS = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
}
assert set(SOLVER_CLASSES) == set(SOLVERS) and set(SPACING_SETTINGS) == set(SPACINGS)


def noise(base: BaseModel, seed: int, samples: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """[samples, C, H, W] starting noise, the same numbers that ComfyUI draws for a batch with this seed."""
    return starting_noise((samples, base.unet.config.in_channels, *(size or (base.latent_size,) * 2)), seed)


@torch.inference_mode()
def sample(
    base: BaseModel,
    model: FeatureControlNet | None,
    features: FeatureMap | None,
    start_noise: Tensor,
    sampling: Sampling,
    prompt: str,
    backbone: Backbone | None = None,
    part_way: PartWay | None = None,
) -> Tensor:
    """Latents [B, C, H, W] drawn from starting noise, a feature map per row: core.sampling.sample_latents.

    Without a model the base model draws alone (the unconditional baseline of every table). backbone: where the features
    come from, for sampling.gradient. part_way: pictures' latents to begin from, see latents_of. Each call has a solver
    of its own. Raises FeatInvError if the features are not of the model's source, or the backbone that the gradient
    needs is missing.
    """
    x, text = start_noise.to(base.unet.device), {True: base.text[prompt], False: base.text[""]}
    if model is None:
        return sample_latents(base.unet, None, {}, solver_of(base, sampling), x, text, sampling, part_way=part_way)
    if sampling.gradient and backbone is None:
        raise FeatInvError(
            f"gradient {sampling.gradient:g}: guidance by the gradient needs the backbone of the features"
        )
    features.source.require(model.source, "the feature map", "the inversion model")
    features = features.to(x.device)
    given = {True: features.values, False: torch.zeros_like(features.values)}
    hints = {
        cond: model.hint(given[cond], x.shape[2:]) for cond in dict.fromkeys(cond for cond, _ in sampling.weights())
    }
    toward, differentiated = None, []
    if sampling.gradient:
        toward = partial(
            toward_features, picture_of=base.decode, backbone=backbone, target=features, step=sampling.gradient
        )
        differentiated = [base.vae, backbone]
        leave_inference(base.vae)
    with cancellable(unchecked, *differentiated):
        controlnet = partial(control, model.controlnet)
        return sample_latents(
            base.unet, controlnet, hints, solver_of(base, sampling), x, text, sampling, toward, part_way
        )


def control(
    controlnet: ControlNetModel, noisy: Tensor, t: Tensor, context: Tensor, hint: Tensor, **settings: object
) -> tuple[list[Tensor], Tensor]:
    """What a frozen ControlNet gives, in its own precision."""
    with in_own_precision(controlnet) as own:
        return controlnet(own(noisy), t, own(context), own(hint), **settings)


def solver_of(base: BaseModel, sampling: Sampling) -> Solver:
    """A new solver with the base model's noise schedule and prediction, and the sampling's spacing of timesteps;
    multistep ones remember earlier steps, so none is used twice."""
    kind, settings = SOLVER_CLASSES[sampling.solver]
    spacing = SPACING_SETTINGS[sampling.timestep_spacing]
    if kind is not DDIMScheduler:  # the only one that knows where the last step ends
        spacing = {name: value for name, value in spacing.items() if name != "set_alpha_to_one"}
    return kind.from_config(base.scheduler.config, **settings, **spacing)


@torch.inference_mode()
def round_trip(base: BaseModel, pictures: Tensor) -> Tensor:
    """The autoencoder's reconstruction at the base model's resolution: what every table sets beside the
    reconstructions."""
    return base.decode(latents_of(base, pictures))


@torch.inference_mode()
def latents_of(base: BaseModel, pictures: Tensor) -> Tensor:
    """Clean latents [B, C, H, W] of pictures [B, 3, h, w] in 0..1, scaled to the base model's resolution, on its
    device: what PartWay begins from."""
    side = (base.resolution,) * 2
    if tuple(pictures.shape[2:]) != side:
        pictures = F.interpolate(pictures, side, mode="bilinear", antialias=True)
    return base.encode(pictures.to(base.unet.device))
