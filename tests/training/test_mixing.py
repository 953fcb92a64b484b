"""What reconstruct.py asks for where several images are mixed, or a linear map changes one."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.linear_map_files import save_linear_map
from featinv_nodes.core.linear_maps import LinearMap
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training import reconstruct


@pytest.fixture(scope="module")
def opened():
    backbone = open_backbone("tiny-cnn")
    return SimpleNamespace(backbone=backbone, features=backbone.extract)


def asked(opened, *options, pictures=3):
    args = reconstruct.arguments().parse_args(
        ["--image", *(f"{n}.png" for n in range(pictures)), "--out", "out", *map(str, options)]
    )
    pixel_values = draw(0, torch.arange(pictures), "held-out").image
    return opened.features(pixel_values).values, reconstruct.target_maps(opened, args, pixel_values)


def test_a_weighted_mean_of_several(opened):
    maps, [(name, mean)] = asked(opened, "--weights", 1, 1, 2)
    assert name == "mean" and torch.allclose(mean.values[0], maps[0] / 4 + maps[1] / 4 + maps[2] / 2, atol=1e-6)
    with pytest.raises(FeatInvError, match="3 feature maps but 2 weights"):
        asked(opened, "--weights", 1, 1)
    for wrong in ("nan", "inf", "-1"):
        with pytest.raises(FeatInvError, match="expected non-negative numbers"):
            asked(opened, "--weights", 1, 1, wrong)


def test_several_regions_the_earlier_on_top_the_last_picture_around_them(opened, tmp_path):
    files = []
    for name, box in (("top", (0, 0, 64, 32)), ("left", (0, 0, 32, 64))):
        mask = Image.new("L", (64, 64))
        mask.paste(255, box)
        files.append(tmp_path / f"{name}.png")
        mask.save(files[-1])
    maps, [(name, composed)] = asked(opened, "--mask", *files)
    (values,), half = composed.values, slice(4, None)
    assert name == "composed" and torch.equal(values[:, :4], maps[0][:, :4])
    assert torch.equal(values[:, half, :4], maps[1][:, half, :4]) and torch.equal(
        values[:, half, half], maps[2][:, half, half]
    )
    with pytest.raises(FeatInvError, match="got 3 images and 1 masks"):
        asked(opened, "--mask", files[0])


def test_a_linear_map_at_several_strengths(opened, tmp_path):
    source, file = opened.backbone.source(), tmp_path / "map.safetensors"
    save_linear_map(file, LinearMap("direction", None, torch.linspace(0, 1, 128), source))
    maps, targets = asked(opened, "--linear-map", file, "--map-strength", 0, 0.5, pictures=2)
    assert [name for name, _ in targets] == ["0_0.00", "0_0.50", "1_0.00", "1_0.50"]
    half = maps + torch.linspace(0, 0.5, 128)[:, None, None]
    assert torch.allclose(torch.cat([m.values for _, m in targets[1::2]]), half, atol=1e-6)
