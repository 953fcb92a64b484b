"""Weights of a backbone open from any common kind of file, and names that are not timm's are explained."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from featinv_nodes.core import backbone_opening
from featinv_nodes.core.backbone_opening import load_backbone, untrained_backbone
from featinv_nodes.core.errors import FeatInvError, UnknownBackbone
from featinv_nodes.core.requirements import TIMM, old_timm
from featinv_nodes.worlds import BACKBONES, open_backbone

NAME = "test_resnet.r160_in1k"  # timm's own smallest


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model("test_resnet").state_dict()


def same(backbone, state):
    return all(torch.equal(backbone.model.state_dict()[k], v) for k, v in state.items())


WRAPPED = {
    "bare.pth": lambda s: s,
    "timm.pth.tar": lambda s: {"epoch": 3, "arch": "test_resnet", "state_dict": s, "args": argparse.Namespace(lr=1)},
    "average.pth": lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
    "parallel.bin": lambda s: {f"module.{k}": v for k, v in s.items()},
    "lightning.ckpt": lambda s: {"state_dict": {f"net.model.{k}": v for k, v in s.items()} | {"loss.w": torch.ones(3)}},
    "double.pt": lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_in_any_common_wrapping_open(tmp_path, state, name):
    torch.save(WRAPPED[name](state), tmp_path / name)
    assert same(load_backbone(NAME, tmp_path / name), state)


def test_weights_that_are_not_finite_are_refused(tmp_path, state):
    head = "fc.weight"  # no map shows it, and each of its logits is NaN: every picture would match
    save_file(state | {head: state[head] * torch.nan}, tmp_path / "nan.safetensors")
    with pytest.raises(FeatInvError, match=f"NaN or infinite values in {head}"):
        load_backbone(NAME, tmp_path / "nan.safetensors")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_folder_opens_with_either_kind_of_weights(tmp_path, state, file):
    save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(state, tmp_path / file)
    names = {str(n): f"name {n}" for n in range(999)}  # timm leaves out what has no name
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "label_names": names}))
    backbone = load_backbone(str(tmp_path))
    assert same(backbone, state) and backbone.classes[998:] == ["name 998", "class 999"]


@pytest.mark.parametrize(
    "config, words",
    {
        "[1]": "configuration cannot be read: it should be an object",
        "{": "is no JSON",
        "[" * 9000: "is no JSON that can be read .recursion limit",
        "{}": "field architecture is missing",
        '{"model_type": "vit_mae", "architectures": ["ViTMAEModel"]}': "of transformers .vit_mae.*Give that name",
        '{"architecture": "none"}': "timm does not know the architecture 'none'",
        '{"architecture": "test_resnet", "label_names": 3}': "field label_names",
        '{"architecture": "test_resnet", "label_names": ["a"]}': "1 names for a model of 1000 classes",
        '{"architecture": "test_resnet", "pretrained_cfg": [1]}': "field pretrained_cfg",
        '{"architecture": "test_resnet", "pretrained_cfg": {"input_size": 3}}': "timm cannot run .*Error: ",
        '{"architecture": "test_resnet", "pretrained_cfg": {}, "model_args": {"no": 1}}': "timm cannot run .*Error: ",
        "\xff": "config.json is not a timm-hub configuration",
    }.items(),
)
def test_a_damaged_configuration_is_named(tmp_path, state, config, words):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(FeatInvError, match=words):
        load_backbone(str(tmp_path))


def test_files_of_other_kinds_are_named(tmp_path, state):
    torch.save({k: v for k, v in state.items() if "fc" not in k}, tmp_path / "part.pth")
    (tmp_path / "w.onnx").write_text("x")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "part.pth").read_bytes()[:5000])
    for name, words in {
        "part.pth": "part.pth does not fit test_resnet.r160_in1k: missing fc.weight, fc.bias.*convert.py --to timm",
        "w.onnx": "w.onnx: backbone weights are a file in .safetensors or one of .ckpt, .pth",
        "cut.pth": "cut.pth is not a complete PyTorch checkpoint",
        "none.bin": "none.bin do not exist",
        "": "are a folder; expected one of its files, such as model.safetensors",
    }.items():
        with pytest.raises(FeatInvError, match=words):
            load_backbone(NAME, tmp_path / name)


@pytest.mark.parametrize(
    "name, near",
    {
        "timm/resnet18.a1_in1k": "resnet18.a1_in1k",
        "hf-hub:timm/resnet18.a1_in1k": "resnet18.a1_in1k",
        "test-resnet": "test_resnet",
        "vit-tiny-patch16-224": "vit_tiny_patch16_224",
        "tiny_cnn": "Embedded backbones: tiny-cnn, tiny-vit",
        "model": "Embedded backbones: tiny-cnn, tiny-vit",
    }.items(),
)
def test_a_misspelt_name_is_told_the_right_one(name, near):
    with pytest.raises(FeatInvError) as error:
        open_backbone(name)
    assert near in str(error.value)
    assert all(known in str(error.value) for known in BACKBONES)  # each in its one spelling


def test_an_embedded_backbone_takes_no_other_weights(tmp_path):
    for name in ("tiny-cnn", "resnet10t.tiny_world"):
        with pytest.raises(FeatInvError, match=f"{name} is embedded with its own weights: leave out .*--to timm"):
            open_backbone(name, tmp_path / "mine.safetensors")


def test_an_old_timm_is_said_in_one_line(monkeypatch):
    assert not any(map(old_timm, ("1.0.12", "1.0.31", "1.1", "2.0.0.dev0")))
    requirement = ".".join(map(str, TIMM))
    assert f"timm>={requirement}" in (Path(__file__).parents[2] / "requirements.txt").read_text().splitlines()
    monkeypatch.setattr(timm, "__version__", "0.6.13")
    backbone_opening.require_timm.cache_clear()
    for ask in (lambda: untrained_backbone("test_resnet"), lambda: open_backbone("tiny-cnn")):
        with pytest.raises(FeatInvError, match=f"^timm 0.6.13 is installed, but FeatInv needs timm {requirement}"):
            ask()
    monkeypatch.undo()
    assert untrained_backbone("test_resnet").name == "test_resnet"


def test_a_name_that_is_not_timms_can_be_told_from_a_damaged_file(tmp_path):
    with pytest.raises(UnknownBackbone):
        load_backbone("model", tmp_path / "model.safetensors")
