"""Guidance by the gradient of the features in the host's sampling: the clean latents moved after each step's
prediction."""

from __future__ import annotations

from functools import partial

import comfy.sd
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..core.feature_map import FeatureMap
from ..core.guidance import toward_features
from ..core.waiting import cancellable
from .decoding import Decoding, check_vae
from .models import ManagedBackbone, stop_if_cancelled
from .notices import executing_node, tell_counts

KEY = "featinv_guidance"


def guided(
    model: ModelPatcher, vae: comfy.sd.VAE, backbone: ManagedBackbone, target: FeatureMap, step: float, last: float
) -> ModelPatcher:
    """A clone of the model whose predicted clean latents move towards `target`, by `step` of their own length at each
    of the last steps; last: which share of all. Whatever guider draws with it, what it has guided is moved.

    One map serves any batch, fewer maps than latents are repeated in turn, and the node that calls this says so. The
    autoencoder and the backbone are loaded with the model, so that none pushes another out between steps. Raises
    FeatInvError if the map is not the backbone's or the autoencoder not the model's.
    """
    decoding, node = Decoding(vae), executing_node()
    require_fit(model.model, vae, backbone, target)

    def predict(executor, x: Tensor, sigma: Tensor, model_options: dict, seed: int | None) -> Tensor:  # noqa: ANN001
        base, sigmas = executor.class_obj.inner_model, model_options["transformer_options"]["sample_sigmas"]
        with cancellable(stop_if_cancelled, base):
            clean = executor(x, sigma, model_options, seed)
        if float(sigma.max()) >= float(sigmas[0]) * (1 - 1e-4):  # the first step
            tell_counts(node, len(clean), [(len(target), "feature map")])
        if not among_last(sigma, sigmas, last):
            return clean
        return moved(clean, base, decoding, backbone, target, step)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict)
    clone.set_additional_models(KEY, [*clone.get_additional_models_with_key(KEY), decoding.patcher, backbone.patcher])
    return clone


def require_fit(model: BaseModel, vae: comfy.sd.VAE, backbone: ManagedBackbone, target: FeatureMap) -> None:
    """Raises FeatInvError if the map is not the backbone's, or the autoencoder not the model's."""
    target.source.require(
        backbone.backbone.source(target.source.layer, target.source.pooled), "the feature map", "the backbone"
    )
    check_vae(model, vae)


def moved(
    clean: Tensor,
    model: BaseModel,
    decoding: Decoding,
    backbone: ManagedBackbone,
    target: FeatureMap,
    step: float,
    distance: str = "cosine",
) -> Tensor:
    """toward_features for the host's clean latents [B, C, H, W], as many rows at a time as memory has room for. Maps
    are repeated in turn. Raises FeatInvError where one row is too much for the device."""
    read = backbone.kept_bytes(target.source.layer)
    decoding.require_room(clean, backbone.patcher, read)
    maps, (rows, again) = target.in_turn(len(clean)), decoding.plan(clean, read)
    picture_of = partial(decoding.picture_of, process_out=model.process_latent_out)
    parts = (slice(i, i + rows) for i in range(0, len(clean), rows))
    with decoding.ready(again):
        return torch.cat(
            [toward_features(clean[i], picture_of, backbone.backbone, maps.select(i), step, distance) for i in parts]
        )


def among_last(sigma: Tensor, sigmas: Tensor, share: float) -> bool:
    """Whether a noise level belongs to the last `share` of a schedule [steps + 1], which falls to zero."""
    steps = len(sigmas) - 1
    number = int((sigmas[:-1] > sigma.max() * (1 + 1e-4)).sum())  # levels between two steps count to the later one
    return number >= round((1 - share) * steps)
