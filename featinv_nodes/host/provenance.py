"""Whether the sampler's model has the weights that an inversion model was trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import comfy.utils

from ..core.digests import digest, in_full_or_half
from ..core.errors import FeatInvError
from ..core.weights import InversionInfo

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from torch import nn

#: how to go on with other weights
WAY = "To go on all the same, switch on other_weights in Load FeatInv ControlNet"

_known: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # reading the weights takes a tenth of a second


def unet_digest(model: BaseModel) -> str:
    """The digest that a weights file states of its base model's U-Net, of the host's model. Empty where it cannot be
    known: a LoRA or another patch changes the weights, or they are kept in other numbers than the file's."""
    patcher, unet = getattr(model, "current_patcher", None), model.diffusion_model
    if patcher is None or patcher.patches:
        return ""
    if unet not in _known:
        state, names = unet.state_dict(), comfy.utils.unet_to_diffusers(model.model_config.unet_config)
        own = {theirs: state[name] for theirs, name in names.items() if name in state}
        _known[unet] = digest(own) if len(own) == len(state) and in_full_or_half(own) else ""
    return _known[unet]


def require_unet(model: BaseModel, info: InversionInfo) -> None:
    """Raises FeatInvError if the model's weights are known to be others than those that a file was trained on."""
    expected, there = info.base.get("weights"), ""
    if expected and (there := unet_digest(model)) and there != expected:
        raise FeatInvError(
            f"the inversion model was trained on the base model {info.base['name']} (digest {expected}); the sampler's"
            f" model is of the same kind, with other weights ({there}). Load that base model. {WAY}"
        )


def of_any_weights(info: InversionInfo) -> InversionInfo:
    """What a weights file says of itself, without the digests, so that no weights are refused."""
    base = {name: value for name, value in info.base.items() if name != "weights"}
    return replace(info, source=replace(info.source, weights=""), base=base)
