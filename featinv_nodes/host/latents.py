"""Latents that share their noise, and empty ones."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch

from ..core.errors import FeatInvError
from ..core.weights import InversionInfo
from .sizes import trained_size


def with_equal_noise(latent: dict, times: int) -> dict:
    """The host's LATENT of a batch n repeated to times * n; row i of each repetition starts from the same noise.

    The host draws noise by `batch_index`, each row's number in its batch. Repeated, the numbers repeat, unlike in the
    host's own Repeat Latent Batch, which counts on.
    """
    count = len(latent["samples"])
    paired = {
        **latent,
        "samples": torch.cat([latent["samples"]] * times),
        "batch_index": list(latent.get("batch_index", range(count))) * times,
    }
    if len(latent.get("noise_mask", ())) > 1:  # a single mask serves all
        paired["noise_mask"] = torch.cat([comfy.utils.repeat_to_batch_size(latent["noise_mask"], count)] * times)
    return paired


def empty_latents(info: InversionInfo, count: int) -> dict:
    """The host's LATENT of `count` empty latents of the size that an inversion model was trained at. Raises
    FeatInvError where the weights file does not say which."""
    size = trained_size(info)
    if size is None:
        raise FeatInvError(
            f"the weights file does not say at which size the inversion model was trained, and its base model"
            f" {info.base['name']!r} does not tell; use Empty Latent Image with the size of its training"
        )
    samples = torch.zeros(
        count, info.base["latent_channels"], size.cells, size.cells, device=comfy.model_management.intermediate_device()
    )
    return {"samples": samples}
