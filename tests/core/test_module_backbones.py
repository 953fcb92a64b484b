"""Any nn.Module serves as a backbone: the page's own adapters, on tiny models at random weights in their real files."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from featinv_nodes.core.backbone_opening import load_backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.guidance import toward_features
from featinv_nodes.core.metadata import Source, parse
from featinv_nodes.core.module_backbones import Layer, ModuleBackbone
from featinv_nodes.worlds import open_backbone

PAGE = Path(__file__).parents[2] / "docs" / "own-models.md"
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TRANSFORMERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(intermediate_size=32, **TINY), 1),
    "dinov2": (Dinov2Model, Dinov2Config(mlp_ratio=1, **TINY), 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(intermediate_size=32, **TINY), 0),
}


def read_again(source):
    """A source after a trip through a file's metadata."""
    return parse(Source, json.dumps(source.to_dict()), "file", "source").made()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """backbones.py as the page has it."""
    file = tmp_path_factory.mktemp("own") / "backbones.py"
    file.write_text(re.search(r"```python\n(# backbones.py\n.*?)```", PAGE.read_text(), re.DOTALL)[1])
    return file


def opened(file, name, weights, size=None):
    return load_backbone(f"module:{file}:{name}", weights, size, run_code=True)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_of_transformers(file, tmp_path, name):
    kind, config, prefix = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    backbone = opened(file, name, tmp_path)
    x = torch.rand(2, 3, 32, 32)
    normalised = (x - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    with torch.inference_mode():
        states = model(normalised, output_hidden_states=True).hidden_states
        for layer, index in (("last", 4), ("middle", 3)):
            expected = states[index][:, prefix:].transpose(1, 2).unflatten(2, (4, 4))
            features = backbone(x, layer)
            assert torch.allclose(features.values, expected, atol=1e-5)  # float32 rounding of the same operations
            assert (features.source.channels, features.source.grid, features.source.layer) == (32, (4, 4), layer)
    assert backbone.layers == ["last", "middle"] and (backbone(x).prefix is None) == (prefix == 0)
    several = backbone.several(x, ["middle", "last"])
    assert torch.equal(several["middle"], backbone.values(x, "middle")) and len(backbone.stages(x)) == 1
    moved = toward_features(x, lambda z: z, backbone, backbone.extract(x.flip(0)), 0.1)
    assert (moved - x).abs().sum() > 0  # the gradient reaches the pictures
    with pytest.raises(FeatInvError, match="no classifier"):
        backbone.logits(backbone(x))


def test_a_network_of_torchvision_with_its_classifier(file, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    backbone = opened(file, "resnet18", tmp_path / "resnet18.pth", 64)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        own = model((x - backbone._mean) / backbone._std)
        assert torch.allclose(backbone.logits(backbone(x)), own, atol=1e-5)  # the same operations
    assert backbone.source("layer2").grid == (8, 8) and backbone.num_classes == 1000
    assert (
        len(backbone.top_classes(own, 3)[0]) == 3 and backbone.preprocess(torch.rand(1, 3, 90, 70)).shape == x[:1].shape
    )


def test_maps_in_nhwc_and_tokens_of_an_oblong_grid():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 8, 8)
            self.as_nhwc, self.as_tokens = nn.Identity(), nn.Identity()

        def forward(self, x):
            x = self.as_nhwc(self.conv(x).permute(0, 2, 3, 1))
            return self.as_tokens((x.flatten(1, 2), "another output"))

    layers = {"last": Layer("as_tokens", "NLC", grid=(2, 4)), "nhwc": Layer("as_nhwc", "NHWC"), "plain": Layer("conv")}
    backbone = ModuleBackbone(Net(), "net", layers, (16, 32), (0.5,) * 3, (0.5,) * 3)
    maps = backbone.several(torch.rand(1, 3, 16, 32), backbone.layers)
    assert torch.equal(maps["last"], maps["plain"]) and torch.equal(maps["nhwc"], maps["plain"])
    square = ModuleBackbone(Net(), "net", {"last": Layer("as_tokens", "NLC")}, (16, 32), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(FeatInvError, match="8 tokens.*State prefix and grid"):
        square.source()
    wrong = ModuleBackbone(Net(), "net", {"last": Layer("conv", "NLC")}, (16, 32), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(FeatInvError, match=r"conv gave \[\(1, 5, 2, 4\)\].*NLC"):
        wrong.source()
    with pytest.raises(FeatInvError, match="a module that the model has"):
        ModuleBackbone(Net(), "net", {"last": Layer("none")}, (16, 32), (0.5,) * 3, (0.5,) * 3)


def test_the_source_records_the_hook_and_the_preprocessing():
    model, view = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1)), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    one = ModuleBackbone(model, "net", {"last": Layer("1")}, (16, 16), **view).source()
    for other in (
        ModuleBackbone(model, "net", {"last": Layer("0")}, (16, 16), **view),
        ModuleBackbone(model, "net", {"last": Layer("1")}, (16, 16), **view, crop_pct=0.9),
        ModuleBackbone(model, "net", {"last": Layer("1")}, (16, 16), **view, crop_mode="squash"),
        ModuleBackbone(model, "net", {"last": Layer("1")}, (16, 16), **view, interpolation="bilinear"),
        ModuleBackbone(model, "other", {"last": Layer("1")}, (16, 16), **view),
    ):
        with pytest.raises(FeatInvError, match="do not fit together"):
            one.require(other.source(), "the feature map", "the backbone")
    assert read_again(one) == one and "output of 1 as NCHW" in one.definition
    timms = replace(one, definition="")
    assert "definition" not in timms.to_dict() and read_again(timms) == timms


def test_no_file_is_run_unless_the_user_named_it(tmp_path):
    """A workflow or a weights file names a backbone too."""
    file = tmp_path / "evil.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(weights, input_size): return 1\n")
    for refusing in (load_backbone, open_backbone):
        with pytest.raises(FeatInvError, match="is never run"):
            refusing(f"module:{file}:make")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FeatInvError, match="returned a int; expected a ModuleBackbone"):
        open_backbone(f"module:{file}:make", run_code=True)
    assert (tmp_path / "ran").exists()


def test_what_goes_wrong_in_the_file_is_told_in_a_line(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def make(weights, input_size):\n    raise RuntimeError('no\\nweights')\n")
    for name, message in (
        (f"module:{file}:make", r"RuntimeError: no weights\)"),
        (f"module:{file}:none", "AttributeError"),
        (f"module:{tmp_path}/none.py:make", "FILE.py that exists"),
        ("module:make", "FILE.py that exists"),
    ):
        with pytest.raises(FeatInvError, match=message) as error:
            load_backbone(name, run_code=True)
        assert "\n" not in str(error.value)
