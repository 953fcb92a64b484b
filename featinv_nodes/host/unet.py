"""Diffusers' U-Nets and ControlNets in the host's own classes: configuration and names."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.utils
from torch import Tensor

from ..core.errors import FeatInvError


class Ratio(float):
    """A factor on a channel count whose product is a whole number, as the host's classes expect of channel_mult."""

    def __mul__(self, channels: float) -> int:  # type: ignore[override]
        return round(float(self) * channels)

    __rmul__ = __mul__  # type: ignore[assignment]


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts `prefix`0, `prefix`1, ... there are."""
    number = 0
    while any(key.startswith(f"{prefix}{number}.") for key in tensors):
        number += 1
    return number


def ldm_config(tensors: Mapping[str, Tensor], heads: int) -> dict:
    """The host's U-Net settings of a diffusers U-Net or ControlNet of the SD 1.x kind, read off its tensors.

    heads: attention heads, the one number that shapes do not tell.
    """
    levels = count(tensors, "down_blocks.")
    width = tensors["conv_in.weight"].shape[0]
    residuals, depths = [], []
    for level in range(levels):
        here = count(tensors, f"down_blocks.{level}.resnets.")
        residuals.append(here)
        depths += [count(tensors, f"down_blocks.{level}.attentions.{i}.transformer_blocks.") for i in range(here)]
    widths = [tensors[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)]
    output = [depths[sum(residuals[:level])] for level in range(levels) for _ in range(residuals[level] + 1)]
    context = next(t.shape[1] for key, t in tensors.items() if key.endswith("attn2.to_k.weight"))
    return {
        "image_size": 32,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_in.weight"].shape[1],
        "model_channels": width,
        "channel_mult": [Ratio(w / width) for w in widths],
        "num_res_blocks": residuals,
        "transformer_depth": depths,
        "transformer_depth_output": output,
        "transformer_depth_middle": count(tensors, "mid_block.attentions.0.transformer_blocks."),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "context_dim": context,
        "legacy": False,
        "adm_in_channels": None,
        "num_heads": heads,
        "num_head_channels": -1,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def to_ldm(tensors: Mapping[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Tensors under the host's names. Raises FeatInvError for names that have no counterpart."""
    names = comfy.utils.unet_to_diffusers(config)
    for number in range(count(tensors, "controlnet_down_blocks.")):
        for part in ("weight", "bias"):
            names[f"controlnet_down_blocks.{number}.{part}"] = f"zero_convs.{number}.0.{part}"
            names[f"controlnet_mid_block.{part}"] = f"middle_block_out.0.{part}"
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise FeatInvError(f"the model has tensors that the SD 1.x architecture does not: {', '.join(unknown[:4])}")
    return {names[key]: value for key, value in tensors.items()}
