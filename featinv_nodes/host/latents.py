"""Latents that share their noise."""

from __future__ import annotations

import comfy.utils
import torch


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
