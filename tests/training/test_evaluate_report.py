"""A report says how its figures were made, marks what says little, and leaves out what a backbone cannot say."""

import html
import json
import shlex
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file, open_backbone
from featinv_nodes.worlds.drawn import FOLDER
from training import evaluate
from training.evaluation.evaluator import Evaluator, deepest
from training.evaluation.report import by_measure, how_made, marks
from training.evaluation.run import arguments, command_of
from training.evaluation.spaces import TimmSpace
from training.models.base_model import load_base
from training.models.controlnet import FeatureControlNet
from training.report import figure_text
from training.worlds.card import entry


def run(folder, *options, count=2):
    words = ["--count", str(count), "--steps", "1", "--gradient", "0", "--device", "cpu", "--out", str(folder)]
    evaluate.main([*words, *options])
    return json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()


def test_intervals_of_few_pictures_are_marked_and_one_picture_has_none():
    one, few = {"value": 0.5, "low": None, "high": None, "n": 1, "few": True}, {"low": 0.25, "high": 0.75, "few": True}
    assert figure_text(one) == "0.500 (-)" and entry(one, percent=True) == "50.0 (-)"
    assert figure_text({"value": 0.5} | few, 2) == "0.50 (0.25 to 0.75, few)"
    assert figure_text({"value": 0.5, "low": 0.25, "high": 0.75}, 2, sign="+") == "+0.50 (+0.25 to +0.75)"
    grid = by_measure("t", {"a": {"cosine": one}, "b": {"cosine": {"value": 0.5, "n": 9} | few}}, ["a", "b"])
    assert grid.rows == [["cosine", "0.500 (-)", "0.500 (0.250 to 0.750, few)"]] and "fewer than 10" in grid.note
    assert marks({"a": {"cosine": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 10}}}) == ""


def test_every_report_says_how_its_figures_were_made(tmp_path):
    options = ["--suite", "quality", "--seed", "3", "--strength", "0.5", "--space", "tiny-vit"]
    result, text = run(tmp_path, *options, count=1)
    page = html.unescape((tmp_path / "index.html").read_text())
    command = "python training/evaluate.py --steps 1 --strength 0.5 --gradient 0.0 --count 1 --seed 3 --space tiny-vit"
    assert result["command"] == command and result["count"] == 1 and result["data"] == "drawn"
    assert result["seeds"] == "image number + 3" and result["digests"]["tiny_cnn_last"]
    assert result["digests"]["space tiny-vit"] == open_backbone("tiny-vit").weights
    said = ["1 image", "drawn", "image number + 3", "strength 0.5", result["digests"]["tiny_cnn_last"], command]
    said += ["64 x 64 pixels, bicubic, antialiased"]
    assert [words for words in said if words not in text or words not in page] == []
    assert result["reconstruction"]["cosine"]["low"] is None and "(-)" in text and "one image has no interval" in text
    again = arguments().parse_args(shlex.split(command)[2:])
    assert command_of(again) == command  # the command gives these settings


def test_sampling_that_differs_between_conditions_is_a_table():
    samplings = {"a": asdict(Sampling(steps=8)), "b": asdict(Sampling(steps=20))}
    made, own = how_made({"count": 2, "sampling": samplings})
    assert own.header == ["condition", "steps"] and own.rows == [["a", "8"], ["b", "20"]]
    common = dict(made.rows)["sampling"]
    assert "guidance 1.75" in common and "steps 8" not in common


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """The drawn world's CNN without its head, as a timm-hub folder."""
    folder = tmp_path_factory.mktemp("headless")
    config = json.loads((FOLDER / "backbone_cnn" / "config.json").read_text())
    config |= {"num_classes": 0}
    del config["label_names"]
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(FOLDER / "backbone_cnn" / "model.safetensors")
    save_file({name: value for name, value in state.items() if "fc." not in name}, folder / "model.safetensors")
    return str(folder)


SUITES = [
    ("sweep", "--strengths", "1", "--guidances", "1"),
    ("layers", "--models", "tiny_cnn_last={}", "tiny_cnn_stage={}"),
]


@pytest.mark.parametrize("suite", SUITES, ids=[suite[0] for suite in SUITES])
def test_without_classes_no_suite_has_a_match(headless, tmp_path, suite):
    options = [word.format(headless) for word in suite]
    result, text = run(tmp_path, "--backbone", headless, "--other-weights", "--suite", *options)
    assert "No match of classes: resnet10t.tiny_world has no classes." in text
    for condition in ("unconditional", "round trip"):
        own = [name for name in result[condition] if not name.startswith(("independent", "vit_tiny"))]
        assert any("cosine" in name for name in own) and not any("match" in name for name in own)


def test_suites_about_classes_refuse_a_backbone_without(headless, tmp_path):
    with pytest.raises(FeatInvError, match="1000 classes"):
        run(tmp_path / "out", "--backbone", headless, "--suite", "natural-adversarial")


@pytest.mark.parametrize("name, side", [("crossvit_tiny_240", 120)])
def test_models_of_several_last_maps_are_evaluated_at_a_named_layer(name, side):
    torch.manual_seed(0)
    backbone = untrained_backbone(name, side)
    layer = deepest(backbone)
    evaluator = Evaluator(backbone, {"cosine": (layer, False), "cosine_pooled": (layer, True)})
    pictures = torch.rand(1, 3, 64, 64)
    features = evaluator.extract(pictures)
    columns = evaluator.compare(features, features)
    # 1e-5: float32 cosines of some hundred channels
    assert layer != LAST and columns["cosine"].tolist() == pytest.approx([1], abs=1e-5)
    assert not any("match" in column for column in columns) and "no single map" in evaluator.no_match
    assert TimmSpace(backbone).name == f"{name} {layer}, pooled"
    assert TimmSpace(backbone)(pictures).shape == (1, backbone.source(layer).channels)


def test_both_sets_have_one_size_whatever_the_backbone_reads(tmp_path, monkeypatch):
    """A model of PiT's last stage, at 96 pixels, on a base model of 64: the originals are not larger than the rest."""
    torch.manual_seed(0)
    backbone = untrained_backbone("pit_ti_224", 96)
    save_file(backbone.model.state_dict(), tmp_path / "pit.safetensors")
    known = read_info(model_file("tiny_cnn_last"))
    base = load_base(known.base["name"], known.prompt)
    source = backbone.source(deepest(backbone))
    model = FeatureControlNet.start(base, source, 16)
    info = replace(known, source=source, encoder=model.encoder.settings)
    model.save(tmp_path / "model.safetensors", info)
    seen = []
    real = TimmSpace.__call__
    monkeypatch.setattr(TimmSpace, "__call__", lambda self, x: seen.append(tuple(x.shape[2:])) or real(self, x))
    options = ["--model", str(tmp_path / "model.safetensors"), "--backbone-weights", str(tmp_path / "pit.safetensors")]
    result, text = run(tmp_path / "own", *options)
    assert len(seen) == 4 and set(seen) == {(64, 64)} and "compared at 64 x 64 pixels" in result["sets"]
    assert result["reconstruction"]["cosine"]["n"] == 2 and "reads no single map" in text and "match |" not in text
    seen.clear()
    assert "compared at 48 x 48 pixels" in run(tmp_path / "smaller", *options, "--set-size", "48")[0]["sets"]
    assert set(seen) == {(48, 48)}
    with pytest.raises(FeatInvError, match="another evaluation.*set_size"):  # records of other sizes are not mixed
        run(tmp_path / "own", *options, "--set-size", "48")
