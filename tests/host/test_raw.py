"""Damaged and foreign files in a real ComfyUI's process: what raw.py was told there."""

import re

import pytest


@pytest.fixture
def told(measured):
    return measured["raw"]


def test_an_old_timm_is_one_line_at_the_start(told):
    (line,) = told["start"]
    assert line.startswith("FeatInv: timm 0.6.13 is installed, but FeatInv needs timm 1.0.12 or newer; run `pip ")


def test_fields_are_named_and_a_bad_scope_is_left_out(told):
    said = told["models"]
    for case, words in {
        "a list for a source": "FeatInvError: .*damaged 0.*: the FeatInv weights file cannot be read: field source",
        "a later version": "FeatInvError: .*format version 2, which a later release wrote",
        "concepts without a source": "FeatInvError: .*concept file cannot be read: field source is missing",
    }.items():
        assert re.search(words, said[case]), said[case]
    assert said["without steps"] == said["bad scope"] == "no error" and said["opened"] == 2
    assert "steps 50" in said["steps"] and "damaged 3.safetensors is opened without its scope statistics" in said["log"]


def test_backbones_open_from_any_kind_of_file_and_names_are_explained(told):
    said = told["backbones"]
    assert {"bare/model.safetensors", "hub/pytorch_model.bin", "test_resnet.pth"} <= {
        name.replace("\\", "/") for name in said["listed"]
    }
    assert said["hub"] == "resnet10t.tiny_world" and said["pth"] == "no error"
    for case, near in (("no config", "no config.json"), ("hub name", "resnet18.a1_in1k"), ("hyphen", "test_resnet")):
        assert near in said[case] and "into timm_name" in said[case] and "tiny-cnn, tiny-vit" in said[case], case
    assert said["old timm"].startswith("FeatInvError: timm 0.6.13 is installed, but FeatInv needs timm 1.0.12 or newer")


def test_pictures_masks_and_names_of_any_kind(told):
    said = told["pictures"]
    assert max(said["white"], said["grey"]) <= 1e-6  # alpha on white and grey as RGB, in float32
    assert "expected 1 to 4 channels" in said["five"] and "the mask has NaN" in said["mask"]
    assert said["shown"] == [1, 256, 256, 3]  # a pooled vector does not stop the prompt
    assert all("a name takes at most 250. Give a shorter one" in said[case] for case in ("long", "folder"))


def test_a_workflow_opens_no_files_elsewhere_on_the_disk(told):
    said = told["elsewhere"]
    for case in ("model", "concepts", "backbone", "decoder"):
        assert "is not part of the pack" in said[case], said[case]
    assert "leads out of the output and the input folder" in said["features"]
    assert said["own features"] == "no error"
