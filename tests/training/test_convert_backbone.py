"""A fine-tune becomes a timm-hub folder with its classes' names; what is damaged is refused."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from featinv_nodes.core.backbone_opening import load_backbone
from featinv_nodes.core.errors import FeatInvError
from training import convert

NAME = "test_resnet.r160_in1k"
CLASSES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def tuned():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).state_dict()


def checkpoints(tuned):
    """kind -> (file name, its content, what else the command line says)"""
    lightning = {f"model.{k}": v for k, v in tuned.items()} | {"loss.weight": torch.ones(3)}
    order = {name: number for number, name in enumerate(CLASSES)}
    return {
        "bare": ("tuned.pth", tuned, ["--backbone", NAME, "--classes", "names.txt"]),
        "timm's": (
            "model_best.pth.tar",
            {"arch": "test_resnet", "state_dict": tuned, "class_to_idx": order, "args": argparse.Namespace(lr=1)},
            [],
        ),
        "lightning": ("last.ckpt", {"state_dict": lightning, "epoch": 3, "classes": CLASSES}, ["--backbone", NAME]),
        "json": ("tuned.bin", tuned, ["--backbone", NAME, "--classes", "names.json"]),
    }


@pytest.mark.parametrize("kind", ["bare", "timm's", "lightning", "json"])
def test_a_fine_tune_becomes_a_folder_that_opens_with_its_classes(tmp_path, monkeypatch, capsys, tuned, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    (tmp_path / "names.json").write_text(json.dumps(CLASSES))
    file, content, others = checkpoints(tuned)[kind]
    torch.save(content, file)
    convert.main([file, "mine", "--to", "timm", *others])
    said = capsys.readouterr().out
    assert said.startswith("mine: test_resnet.mine, 3 classes (cat, dog, bird), ") and len(said.splitlines()) == 1
    if kind == "lightning":
        assert "entry 'state_dict'" in said and "prefix 'model.'" in said and "epoch" in said and "loss.weight" in said
    if kind == "timm's":
        assert "did not make objects of argparse.Namespace" in said
    backbone = load_backbone("mine")
    assert backbone.name == "test_resnet.mine" and backbone.classes == CLASSES  # not to be taken for timm's own
    assert all(torch.equal(backbone.model.state_dict()[k], v) for k, v in tuned.items())
    known = timm.get_pretrained_cfg(NAME)
    assert backbone.mean == known.mean or kind == "timm's"
    x = torch.rand(2, 3, *backbone.input_size)
    assert {name for row in backbone.top_classes(backbone.logits(backbone(x)), 3) for name, _ in row} == set(CLASSES)
    with pytest.raises(FeatInvError, match="mine exists already"):
        convert.main([file, "mine", "--to", "timm", *others])


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, monkeypatch, tuned):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    (tmp_path / "bad.json").write_text('[{"a": 1}, 2]')
    torch.save(tuned, "tuned.pth")
    torch.save({**tuned, "layer1.0.conv1.weight": tuned["layer1.0.conv1.weight"] * torch.nan}, "nan.pth")
    save_file({"a": torch.zeros(3)}, "foreign.safetensors")
    before = sorted(f.name for f in tmp_path.iterdir())
    for arguments, words in (
        (["tuned.pth", "--backbone", NAME, "--classes", "two.txt"], "names 2 classes, but the classifier has 3"),
        (["tuned.pth", "--backbone", NAME, "--classes", "bad.json"], "expected a name on each line"),
        (["tuned.pth", "--backbone", NAME, "--classes", "none.txt"], "--classes none.txt cannot be read"),
        (["tuned.pth"], "does not say which timm model.*--backbone"),
        (["tuned.pth", "--backbone", "test_vit"], "does not fit test_vit: missing"),
        (["tuned.pth", "--backbone", "timm/test_resnet"], "similar names: test_resnet"),
        (["nan.pth", "--backbone", NAME], r"holds NaN or infinite values in layer1\.0\.conv1\.weight;"),
        (["foreign.safetensors", "--backbone", NAME], "does not fit"),
        (["none.pth", "--backbone", NAME], "do not exist"),
    ):
        with pytest.raises(FeatInvError, match=words):
            convert.main([arguments[0], "out", "--to", "timm", *arguments[1:]])
    assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_files_in_the_folder_are_for_everyone(tmp_path, tuned):
    torch.save(tuned, tmp_path / "tuned.pth")
    convert.main([str(tmp_path / "tuned.pth"), str(tmp_path / "out"), "--to", "timm", "--backbone", NAME, "--tag", "x"])
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes.keys() == {"config.json", "model.safetensors"} and len(set(modes.values())) == 1
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tuned.keys()
    assert load_backbone(str(tmp_path / "out")).name == "test_resnet.x"
