"""Guidance by the gradient of the features in the host's sampling: the clean latents moved after each step's
prediction."""

from __future__ import annotations

import comfy.model_management as management
import comfy.sd
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..core.feature_map import FeatInvError, FeatureMap
from ..core.guidance import leave_inference, toward_features
from .models import ManagedBackbone
from .notices import executing_node, tell_counts

KEY = "featinv_guidance"
GRAPH = (
    4  # memory of a decoding whose gradient is taken, in units of one without: SD's decoder keeps 2.6 for the way back
)


def guided(
    model: ModelPatcher, vae: comfy.sd.VAE, backbone: ManagedBackbone, target: FeatureMap, step: float, last: float
) -> ModelPatcher:
    """A clone of the model whose predicted clean latents move towards `target`, by `step` of their own length at each
    of the last steps; last: which share of all. Whatever guider draws with it, what it has guided is moved.

    One map serves any batch, fewer maps than latents are repeated in turn, and the node that calls this says so. The
    autoencoder and the backbone are loaded with the model, so that none pushes another out between steps. Raises
    FeatInvError if the map is not the backbone's or the autoencoder not the model's.
    """
    check(model.model.latent_format.latent_channels, vae, backbone, target)
    decoder, node = whole(vae.patcher), executing_node()

    def predict(executor, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None) -> Tensor:  # noqa: ANN001
        clean, sigmas = executor(x, sigma, model_options, seed), model_options["transformer_options"]["sample_sigmas"]
        if float(sigma.max()) >= float(sigmas[0]) * (1 - 1e-4):  # the first step
            tell_counts(node, len(clean), [(len(target), "feature map")])
        if not among_last(sigma, sigmas, last):
            return clean
        return moved(clean, executor.class_obj.inner_model, vae, decoder, backbone, target, step)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    clone.set_additional_models(KEY, [*clone.get_additional_models_with_key(KEY), decoder, backbone.patcher])
    return clone


def check(channels: int, vae: comfy.sd.VAE, backbone: ManagedBackbone, target: FeatureMap) -> None:
    """Raises FeatInvError if the map is not the backbone's, or the autoencoder not one of that many channels."""
    target.source.require(
        backbone.backbone.source(target.source.layer, target.source.pooled), "the feature map", "the backbone"
    )
    if vae.latent_channels != channels:
        raise FeatInvError(
            f"the autoencoder has {vae.latent_channels} latent channels, the model {channels}; connect the VAE that"
            " belongs to the model"
        )


def moved(
    clean: Tensor,
    model: BaseModel,
    vae: comfy.sd.VAE,
    decoder: ModelPatcher,
    backbone: ManagedBackbone,
    target: FeatureMap,
    step: float,
    distance: str = "cosine",
) -> Tensor:
    """toward_features for the host's clean latents [B, C, H, W], as many rows at a time as memory has room for.
    decoder: the autoencoder's patcher, loaded whole. Maps are repeated in turn."""
    leave_inference(decoder.model)

    def picture_of(latents: Tensor) -> Tensor:
        unscaled = model.process_latent_out(latents)
        decoded = decoder.model.decode(unscaled.to(vae.device, vae.vae_dtype))  # which may be another device
        return vae.process_output(decoded.float()).to(latents.device)

    maps = target.in_turn(len(clean))
    need = GRAPH * vae.memory_used_decode((1, *clean.shape[1:]), vae.vae_dtype)
    rows = max(1, int(management.get_free_memory(clean.device) / need))
    parts = (slice(i, i + rows) for i in range(0, len(clean), rows))
    return torch.cat(
        [toward_features(clean[i], picture_of, backbone.backbone, maps.select(i), step, distance) for i in parts]
    )


def whole(patcher: ModelPatcher) -> ModelPatcher:
    """The patcher, or where the host would load its weights piece by piece as they are used, one that loads them all:
    such pieces know no gradients."""
    dynamic = getattr(patcher, "is_dynamic", None)  # hosts before 0.30 have none
    return patcher.get_non_dynamic_delegate() if dynamic and dynamic() else patcher


def among_last(sigma: Tensor, sigmas: Tensor, share: float) -> bool:
    """Whether a noise level belongs to the last `share` of a schedule [steps + 1], which falls to zero."""
    steps = len(sigmas) - 1
    number = int((sigmas[:-1] > sigma.max() * (1 + 1e-4)).sum())  # levels between two steps count to the later one
    return number >= round((1 - share) * steps)
