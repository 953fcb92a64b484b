"""Images come to a backbone as in timm's own evaluation, whatever its crop_mode, and stay differentiable."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import as_tensor
from featinv_nodes.core.preprocess import evaluation_view, stretched

#: pretrained configurations of every crop_mode and interpolation, upright ones too
CONFIGURATIONS = {
    "center": "resnet18.a1_in1k",
    "center, bilinear": "resnet18.tv_in1k",
    "squash": "dm_nfnet_f0.dm_in1k",
    "squash of all": "tf_efficientnetv2_l.in1k",
    "squash, bilinear, upright": "vit_base_patch16_sapiens2.fb",
    "border": "deepseek_vit_412m_enc.deepseek_v4_flash_vision_exp",
}
VIEW = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def backbone_evaluated_as(**changes):
    """A small network that timm evaluates so."""
    return Backbone(timm.create_model("resnet10t", pretrained_cfg_overlay=changes), "resnet10t")


def view_of(name):
    """How timm evaluates a configuration; skipped where this timm does not know it."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is None or not known.architecture:
        pytest.skip(f"this timm has no {name}")
    return {key: getattr(known, key) for key in VIEW}


def timms_view(backbone, image):
    """timm's own evaluation transform of a Pillow picture, in 0..1."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone.model), normalize=False)
    return transform(image)[None] / 255


@pytest.mark.parametrize("photograph", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("name", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS))
def test_a_photograph_is_seen_as_timm_evaluates_it(name, photograph):
    backbone = backbone_evaluated_as(**view_of(name))
    image = Image.fromarray(load_sample_image(photograph))
    off = (backbone.preprocess(as_tensor(image)) - timms_view(backbone, image)).abs()
    # Pillow rounds to 8 bits after each of the two passes: half a level twice, the first spread by bicubic weights
    assert off.max() <= 1.5 / 255 and off.mean() <= 0.0015


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(96, 160), (128, 128)])
@pytest.mark.parametrize("sides", [(500, 101), (33, 57), (167, 168)])
def test_so_is_a_picture_of_any_shape_at_any_input_size(crop_mode, size, sides):
    # bilinear: of a picture squashed unevenly, newer Pillow scales the height first, which bicubic overshoot tells
    backbone = backbone_evaluated_as(input_size=(3, *size), crop_mode=crop_mode, crop_pct=0.9, interpolation="bilinear")
    image = Image.fromarray(load_sample_image("flower.jpg")).resize(sides)
    view = backbone.preprocess(as_tensor(image))
    assert view.shape == (1, 3, *size) and (view - timms_view(backbone, image)).abs().max() <= 1.5 / 255  # as above


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_gradients_reach_the_pictures(crop_mode):
    backbone = backbone_evaluated_as(input_size=(3, 64, 64), crop_mode=crop_mode)
    picture = (torch.rand(1, 3, 90, 120) / 2 + 0.25).requires_grad_()
    backbone.preprocess(picture).sum().backward()
    assert picture.grad[:, :, 45, 60].gt(0).all()


@pytest.mark.parametrize(
    ("sides", "rows", "columns"),
    [((40, 120), (10, 30), (45, 75)), ((120, 60), (40, 80), (0, 60)), ((8, 12), (2, 6), (3, 9))],
)
def test_crop_first_cuts_the_middle_of_the_input_s_shape_and_scales_that(sides, rows, columns):
    """Of half of the largest region of 10 x 15 pixels in a wide picture, and of all of it in a tall one."""
    picture = torch.rand(1, 3, *sides, generator=torch.Generator().manual_seed(0))
    share = 0.5 if sides[0] < sides[1] else 1.0
    view = evaluation_view(picture, (10, 15), share, "crop_first", "bicubic", (0.5,) * 3)
    middle = picture[:, :, slice(*rows), slice(*columns)]
    assert torch.equal(view, stretched(middle, (10, 15), "bicubic"))


def test_a_mask_has_no_border():
    """It says where something is; outside it nothing is."""
    backbone = backbone_evaluated_as(input_size=(3, 64, 64), crop_mode="border", crop_pct=1.0)
    mask = backbone.preprocess(torch.ones(1, 1, 64, 128))[0, 0]
    assert mask[:16].max() == 0 == mask[48:].max() and mask[16:48].min() == 1
    picture = backbone.preprocess(torch.ones(1, 3, 64, 128))[0]
    assert torch.allclose(picture[:, 0, 0], torch.tensor(backbone.mean), atol=0.5 / 255)  # timm rounds it to 8 bits


@pytest.mark.parametrize("field, value", [("interpolation", "lanczos"), ("crop_mode", "random")])
def test_an_evaluation_that_is_not_reproduced_is_refused(field, value):
    with pytest.raises(FeatInvError, match=f"{field} '{value}'; expected one of"):
        backbone_evaluated_as(**{field: value})
