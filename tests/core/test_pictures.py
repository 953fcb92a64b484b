"""Images of feature maps, and feature maps on disk."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_files import load_features, save_features
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.images import as_rgb, as_seen, as_tensor
from featinv_nodes.core.pictures import captioned, diverging, enlarge, heat_map, preview, principal_components

SOURCE = FeatureSource("net.tag", "last", False, 6, (4, 4), (32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_like_features_have_like_colours():
    """Two kinds of vectors give two colours, whatever their order; the sign does not depend on chance."""
    kinds = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    values = kinds[indices].permute(2, 0, 1)[None]
    colours = principal_components(FeatureMap(values, SOURCE))
    assert colours.shape == (1, 3, 4, 4) and 0 <= colours.min() and colours.max() <= 1
    one, other = colours[0][:, indices == 0], colours[0][:, indices == 1]
    assert one.std(1).max() < 1e-3 and other.std(1).max() < 1e-3 and (one[:, 0] - other[:, 0]).abs().max() > 0.9
    even = torch.tensor([0.0, 1.0]).repeat(1, 6, 4, 2)  # as many of each, of which neither is the rarer one
    assert principal_components(FeatureMap(even, SOURCE))[0].flatten(1).std(1).max() > 0.4
    pooled = FeatureMap(values.mean((2, 3), keepdim=True), FeatureSource(**{**SOURCE.to_dict(), "pooled": True}))
    with pytest.raises(FeatInvError, match="pooled"):
        principal_components(pooled)


def test_a_pooled_map_is_shown_as_bars_and_any_map_gets_a_picture():
    """Positive channels stand above the middle, negative ones hang below, the longest to the edge; in their order."""
    values = torch.tensor([2.0, -1.0, 0.0, 1.0, 0.0, 0.0])[None, :, None, None]
    pooled = FeatureMap(values, FeatureSource(**{**SOURCE.to_dict(), "pooled": True}))
    picture = preview(pooled, 48)[0]
    assert picture.shape == (3, 48, 48) and 0 <= picture.min() and picture.max() <= 1
    red, blue = picture[0] - picture[2] > 0.3, picture[2] - picture[0] > 0.3
    assert red[:, :8].sum(0).tolist() == [24] * 8 and red[:, 24:32].sum(0).tolist() == [12] * 8  # six bars of 8 pixels
    assert blue[:, 8:16].sum(0).tolist() == [12] * 8 and not blue[:24].any() and not red[24:].any()
    assert not (red | blue)[:, [*range(16, 24), *range(32, 48)]].any()
    for width in (1, 40, 1000):  # more channels than columns, too
        source = FeatureSource(**{**SOURCE.to_dict(), "pooled": True, "channels": width})
        assert preview(FeatureMap(torch.zeros(2, width, 1, 1), source), 48).shape == (2, 3, 48, 48)
    assert preview(FeatureMap(torch.randn(2, 6, 4, 4), SOURCE), 48).shape == (2, 3, 48, 48)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_tensors_and_files_follow_one_rule_for_grey_and_transparency(mode):
    """Transparency is put on white, grey becomes RGB: for the host's tensors as for files."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, len(mode)), np.uint8)
    expected = as_tensor(as_seen(Image.fromarray(pixels.squeeze(), mode)))
    result = as_rgb(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    assert result.shape == (1, 3, 8, 9) and (result - expected).abs().max() <= 1 / 255  # Pillow rounds to 8 bits
    for shape in ((1, 5, 8, 9), (1, 0, 8, 9), (8, 9, 3)):
        with pytest.raises(FeatInvError, match="expected 1 to 4 channels"):
            as_rgb(torch.zeros(shape))


def test_heat_grows_brighter():
    brightness = heat_map(torch.linspace(0, 1, 9)[None, None])[0].sum(0)[0]
    assert (brightness.diff() > 0).all() and heat_map(torch.tensor([[[-5.0, 7.0]]])).shape == (1, 3, 1, 2)


def test_a_diverging_scale_is_blue_below_and_red_above_and_fades_towards_zero():
    colours = diverging(torch.linspace(-3, 3, 13)[None, None], limit=2)[0, :, 0]  # [3, 13], the middle one is 0
    red, blue = colours[0], colours[2]
    assert (blue[:6] > red[:6]).all() and (red[7:] > blue[7:]).all() and colours[:, 6].std() < 1e-6
    strength = colours.amax(0) - colours.amin(0)
    assert (strength[2:7].diff() < 0).all() and (strength[6:11].diff() > 0).all()
    assert torch.equal(colours[:, 0], colours[:, 2]) and torch.equal(colours[:, 12], colours[:, 10])  # beyond the limit
    assert colours[:, 6].min() > 0.9 and colours.sum(0).argmax() == 6


def test_captions_stand_below_the_enlarged_picture():
    pictures = torch.full((2, 3, 64, 64), 0.5)
    captioned_pictures = captioned(pictures, ["cosine 0.912", ""])
    assert captioned_pictures.shape[0] == 2 and captioned_pictures.shape[3] == 256 and captioned_pictures.shape[2] > 256
    assert (
        captioned_pictures[0, :, 256:].min() < 0.3
        and captioned_pictures[1, :, 256:].min() == 1
        and (captioned_pictures[:, :, :256] == 0.5).all()
    )
    assert enlarge(pictures, 64).shape == pictures.shape and enlarge(pictures[:, :, :16], 100).shape[2:] == (32, 128)


def test_a_caption_may_have_lines_and_is_never_cut():
    pictures = torch.ones(1, 3, 64, 64)
    one, two = captioned(pictures, ["slope 0.25"]), captioned(pictures, ["object\nslope 0.25"])
    assert two.shape[2] - 256 > 1.5 * (one.shape[2] - 256)
    ink = (two[0, :, 256:].amin(0).amin(1) < 0.5).int()
    assert (ink.diff() > 0).sum() == 2  # two lines, white between them
    long = captioned(pictures, ["water + sand: slope 0.93, NOT as requested"])[0, :, 256:]
    assert (long[:, :, :2] == 1).all() and (long[:, :, -2:] == 1).all()


def test_feature_files_come_back_bit_for_bit(tmp_path):
    features = FeatureMap(torch.randn(2, 6, 4, 4), SOURCE, torch.randn(2, 1, 6))
    save_features(tmp_path / "f.safetensors", features)
    again = load_features(tmp_path / "f.safetensors")
    assert (
        torch.equal(again.values, features.values)
        and torch.equal(again.prefix, features.prefix)
        and again.source == SOURCE
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "f.safetensors").read_bytes()[:100])
    for name, words in {"foreign": "no feature map", "cut": "not a complete", "none": "does not exist"}.items():
        with pytest.raises(FeatInvError, match=words):
            load_features(tmp_path / f"{name}.safetensors")
