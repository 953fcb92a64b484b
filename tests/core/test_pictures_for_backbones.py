"""Images come to a backbone as its own configuration says: how much of them, by which filter, antialiased."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from featinv_nodes.core.backbones import Backbone


def backbone_of(**changes):
    """A backbone of 32 x 32 pixels whose timm configuration is changed."""
    overlay = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"} | changes
    return Backbone(timm.create_model("test_resnet", pretrained_cfg_overlay=overlay), "test_resnet")


def by_pillow(picture, side, filter):
    """[1, 3, h, w] in 0..1 scaled whole to side x side, in float32."""
    rows = [Image.fromarray(channel.numpy(), mode="F").resize((side, side), filter) for channel in picture[0]]
    return torch.from_numpy(np.stack(rows))[None].clamp(0, 1)


@pytest.mark.parametrize(("interpolation", "other"), [("bilinear", "bicubic"), ("bicubic", "bilinear")])
def test_a_picture_is_scaled_by_the_models_own_filter_and_antialiased(interpolation, other):
    """Against Pillow, whose filters timm's evaluation uses and which always reads every pixel."""
    picture = torch.rand(1, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    own, wrong = (by_pillow(picture, 32, Image.Resampling[name.upper()]) for name in (interpolation, other))
    result = backbone_of(interpolation=interpolation).preprocess(picture, "stretch")
    assert (own - wrong).abs().max() > 0.05  # the filters can be told apart
    assert (result - own).abs().max() < 1e-4, f"not Pillow's antialiased {interpolation}"  # float32 sums of about 40


def test_a_crop_takes_the_models_own_share_of_the_picture():
    """Half of each side, at the picture's own resolution: nothing is scaled, so the pixels are the centre's."""
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    centre = picture[:, :, 16:48, 16:48]
    assert torch.allclose(backbone_of(crop_pct=0.5).preprocess(picture, "crop"), centre, atol=1e-6)
    whole = backbone_of(crop_pct=1.0).preprocess(picture, "crop")
    assert torch.allclose(whole, by_pillow(picture, 32, Image.Resampling.BILINEAR), atol=1e-4)
