"""Guidance by the gradient of the features: the clean latents that a sampler predicts, moved toward wanted features.

The condition is what ControlNet++ (Li et al. 2024) trains on, the cycle distance; used at sampling time on the predicted
clean latents as in universal guidance (Bansal et al. 2023, Sec. 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import Backbone
from .feature_map import FeatInvError, FeatureMap


def toward_features(clean: Tensor, picture_of: Callable[[Tensor], Tensor], backbone: Backbone, wanted: FeatureMap, step: float) -> Tensor:
    """x0_hat [B, C, H, W] -> x0_hat - step * rms(x0_hat) * g / rms(g), g the gradient of feature_distance at x0_hat.

    Both root mean squares are per sample, so that `step` is the length of the move in units of the latents' own, for any
    model and picture. picture_of: latents -> pictures [B, 3, h, w] in 0..1, differentiable, with parameters that ask for
    no gradients. wanted: a map per row, of a layer of `backbone`. Works inside no_grad and inference_mode, and keeps
    type and device of `clean`. Raises FeatInvError if the map is not the backbone's or the rows differ in number.
    """
    wanted.source.require(backbone.source(wanted.source.layer, wanted.source.pooled), "the wanted features", "the backbone")
    if len(wanted.values) != len(clean):
        raise FeatInvError(f"gradient guidance: {len(wanted.values)} feature maps for {len(clean)} latents; expected one each")
    leave_inference(backbone)
    with torch.inference_mode(False), torch.enable_grad():
        x = clean.detach().clone().requires_grad_(True)
        values = wanted.values.detach().clone()  # a tensor made inside inference_mode cannot be saved for backward
        distance = feature_distance(picture_of(x), backbone, values, wanted.source.layer, wanted.source.pooled)
        (gradient,) = torch.autograd.grad(distance.sum(), x)
    move = gradient.float() / rms(gradient).clamp(min=1e-20)  # a gradient of zero moves nothing
    return (clean.float() - step * rms(clean) * move).to(clean)


def feature_distance(pictures: Tensor, backbone: Backbone, values: Tensor, layer: str, pooled: bool) -> Tensor:
    """[B] mean over the locations of 1 - cos(F(picture), f), pictures [B, 3, h, w] in 0..1 scaled whole to the backbone's
    input, f the values [B, C_f, h', w'] of its layer. Gradients reach the pictures."""
    seen = backbone.values(backbone.frame(pictures, "stretch"), layer, pooled)
    return 1 - F.cosine_similarity(seen.float(), values.float().to(seen.device), dim=1).mean((1, 2))


def rms(values: Tensor) -> Tensor:
    """[B, 1, 1, 1] root mean square of each sample."""
    return values.float().square().mean((1, 2, 3), keepdim=True).sqrt()


def leave_inference(module: nn.Module) -> None:
    """Makes parameters and buffers that were created inside inference_mode ordinary tensors, in place: a model that was
    loaded inside it can be differentiated through then. A parameter becomes another object with the same values."""
    with torch.inference_mode(False):
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None and value.is_inference():
                    part._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
            for name, value in part._buffers.items():
                if value is not None and value.is_inference():
                    part._buffers[name] = value.clone()
