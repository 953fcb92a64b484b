"""Guidance while sampling: classifier-free (paper Sec. 2 and App. A.2), and by the gradient of the features.

Classifier-free guidance pushes the prediction away from one without the text, or without text and features. Guidance by
the gradient moves the clean latents that a sampler predicts toward given features. Its distance is the cycle
consistency that ControlNet++ (Li et al. 2024) trains on; it is used at sampling time as in universal guidance (Bansal
et al. 2023, Sec. 3.2). The latter is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import FeatInvError
from .feature_map import FeatureMap

if TYPE_CHECKING:
    from .backbones import Backbone  # timm takes seconds to import

#: What guidance pushes away from: the same features with empty text (the paper), or zero features with empty text,
#: the combination that training drops to.
NEGATIVES = ("text", "features")


def guidance_weights(
    guidance: float, negative: str, text_guidance: float | None = None, controlled: bool = True
) -> dict[tuple[bool, bool], float]:
    """(with features, with text) -> weight of that prediction in the guided one. The weights sum to 1; a prediction
    without a weight need not be evaluated.

    One scale (Ho & Salimans 2022, Eq. 6): e(away) + guidance (e(f, p) - e(away)), away being (f, "") for negative
    "text" and (0, "") for "features". Two scales, as InstructPix2Pix composes two conditions (Brooks et al. 2023, Eq.
    3): e(0, "") + guidance (e(f, "") - e(0, "")) + text_guidance (e(f, p) - e(f, "")). Not controlled: features make no
    difference and count as absent.
    """
    if text_guidance is not None:
        terms = [(True, True, text_guidance), (True, False, guidance - text_guidance), (False, False, 1 - guidance)]
    else:
        terms = [(True, True, guidance), (negative == "text", False, 1 - guidance)]
    weights: dict[tuple[bool, bool], float] = {}
    for cond, prompted, weight in terms:
        branch = cond and controlled, prompted
        weights[branch] = weights.get(branch, 0.0) + weight
    return {branch: weight for branch, weight in weights.items() if abs(weight) > 1e-9}  # of rounding


def toward_features(
    clean: Tensor,
    picture_of: Callable[[Tensor], Tensor],
    backbone: Backbone,
    target: FeatureMap,
    step: float,
    distance: str = "cosine",
) -> Tensor:
    """x0_hat [B, C, H, W] -> x0_hat - step * rms(x0_hat) * g / rms(g), g the gradient of the distance at x0_hat.

    Both root mean squares are per sample, so that `step` is the length of the move in units of the latents' own, for
    any model and picture. picture_of: latents -> pictures [B, 3, h, w] in 0..1, differentiable, with parameters that
    ask for no gradients. target: a map per row, of a layer of `backbone`. Works inside no_grad and inference_mode, and
    keeps type and device of `clean`. distance: one of DISTANCES. Raises FeatInvError if the map is not the backbone's
    or the rows differ in number.
    """
    target.source.require(
        backbone.source(target.source.layer, target.source.pooled), "the target features", "the backbone"
    )
    if len(target.values) != len(clean):
        raise FeatInvError(
            f"gradient guidance: {len(target.values)} feature maps for {len(clean)} latents; expected one each"
        )
    leave_inference(backbone)
    with torch.inference_mode(False), torch.enable_grad():
        x = clean.detach().clone().requires_grad_(True)
        values = target.values.detach().clone()  # a tensor made inside inference_mode cannot be saved for backward
        far = DISTANCES[distance](picture_of(x), backbone, values, target.source.layer, target.source.pooled)
        (gradient,) = torch.autograd.grad(far.sum(), x)
    move = gradient.float() / rms(gradient).clamp(min=1e-20)  # a gradient of zero moves nothing
    return (clean.float() - step * rms(clean) * move).to(clean)


def feature_distance(pictures: Tensor, backbone: Backbone, values: Tensor, layer: str, pooled: bool) -> Tensor:
    """[B] mean over the locations of 1 - cos(F(picture), f), pictures [B, 3, h, w] in 0..1 scaled whole to the
    backbone's input, f the values [B, C_f, h', w'] of its layer. Gradients reach the pictures."""
    features = backbone.values(backbone.preprocess(pictures, "stretch"), layer, pooled)
    return 1 - F.cosine_similarity(features.float(), values.float().to(features.device), dim=1).mean((1, 2))


def squared_distance(pictures: Tensor, backbone: Backbone, values: Tensor, layer: str, pooled: bool) -> Tensor:
    """[B] mean of (F(picture) - f)^2 over that of f^2, otherwise as feature_distance: the lengths of the vectors count
    too, and the longest most."""
    features = backbone.values(backbone.preprocess(pictures, "stretch"), layer, pooled).float()
    values = values.float().to(features.device)
    return (features - values).square().mean((1, 2, 3)) / values.square().mean((1, 2, 3)).clamp(min=1e-20)


#: how far the features of a picture are from those asked for
DISTANCES = {"cosine": feature_distance, "squared": squared_distance}


def kept_bytes(backbone: Backbone, layer: str) -> int:
    """Bytes that a backbone keeps of one picture until the gradient of a layer's map has come back through it, beside
    its weights: counted in a pass of a black picture."""
    leave_inference(backbone)
    weights = {value.untyped_storage().data_ptr() for value in (*backbone.parameters(), *backbone.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    device = next(backbone.buffers()).device
    with torch.inference_mode(False), torch.enable_grad():
        picture = torch.zeros(1, 3, *backbone.input_size, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            values = backbone.values(picture, layer)  # holds all that is kept, so that no two have one address
    del values
    return sum(kept.values())


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
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_inference():
                    part._buffers[name] = buffer.clone()
