"""Each suite's report has the paper's rows, and its conditions do what they say."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_real_layout import PROMPT
from test_real_layout import stable_diffusion as stable_diffusion
from timm.data import ImageNetInfo

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.weights import InversionInfo, load_scope, read_info
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn.scenes import draw
from training import evaluate
from training.evaluation.context import EvalContext, ModelSpec
from training.evaluation.evaluator import Evaluator
from training.evaluation.sources import open_source
from training.evaluation.suites import baseline, corruptions, models
from training.evaluation.suites.corruptions import CORRUPTIONS, SEEDED, Corruptions, corrupt, library
from training.evaluation.suites.mixing import Mixing
from training.evaluation.suites.variability import Variability
from training.models.base_model import load_base
from training.models.controlnet import FeatureControlNet


def run(tmp_path, suite, *options, count=4):
    evaluate.main(
        [
            "--suite",
            suite,
            "--count",
            str(count),
            "--steps",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / suite),
            *options,
        ]
    )
    assert (tmp_path / suite / "panel.png").exists() and (tmp_path / suite / "index.html").exists()
    return json.loads((tmp_path / suite / "results.json").read_text()), (tmp_path / suite / "report.md").read_text()


@pytest.fixture
def captions(monkeypatch):
    """Condition -> column under its pictures, of the panel that is drawn last."""
    seen, real = {}, models.condition_panel

    def drawn(tables, conditions, heading, scored):
        assert all(name in tables[condition].columns for condition, name in scored.items())
        seen.update(scored)
        return real(tables, conditions, heading, scored)

    monkeypatch.setattr(models, "condition_panel", drawn)
    return seen


def test_layers_compares_at_every_stage(tmp_path, captions):
    result, text = run(tmp_path, "layers", "--models", "tiny_cnn_last", "tiny_cnn_stage")
    stages = {name for name in result["tiny_cnn_stage"] if name.startswith("cosine ") and not name.endswith("centred")}
    assert "cosine last" in stages and len(stages) > 3
    layer = read_info(model_file("tiny_cnn_stage")).source.layer
    # even after two steps the model of the earlier stage is closer at that stage (paper Fig. 4a)
    assert result["tiny_cnn_stage"][f"cosine {layer}"]["value"] > result["unconditional"][f"cosine {layer}"]["value"]
    assert result.keys() >= {"unconditional", "round trip"} and "| tiny_cnn_stage | layer" in text
    # under each picture the cosine of the map that its model inverts (Fig. 14)
    assert captions["tiny_cnn_stage"] == f"cosine {layer}" and captions["tiny_cnn_last"] == "cosine last"


def test_cross_model_is_a_matrix(tmp_path, captions):
    result, text = run(tmp_path, "cross-model")
    evaluators = ("resnet10t.tiny_world", "vit_tiny_patch16_224.tiny_world")
    for model in ("tiny_cnn_last", "tiny_vit_last"):
        for evaluator in evaluators:
            assert result[model][f"{evaluator}: top1_match"]["n"] == 4
            assert (
                result[model][f"{evaluator}: cosine"]["value"]
                > result["unconditional"][f"{evaluator}: cosine"]["value"]
            )
    assert f"| {evaluators[0]} | {evaluators[1]} |" in text
    own, _ = run(tmp_path, "quality")
    for measure in ("cosine", "top1_match"):  # a model judged by its own backbone: the same figure in both suites
        assert result["tiny_cnn_last"][f"{evaluators[0]}: {measure}"] == own["reconstruction"][measure]
    # under each picture the cosine by its own model's backbone (Fig. 3)
    assert [captions[name] for name in ("tiny_cnn_last", "tiny_vit_last")] == [f"{name}: cosine" for name in evaluators]


def test_sweep_finds_the_best_setting_and_writes_it_back(tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(model_file("tiny_cnn_last"), file)
    before, scope = read_info(file), load_scope(file)
    result, text = run(
        tmp_path, "sweep", "--model", str(file), "--strengths", "0", "1", "--guidances", "1", "--write-back"
    )
    # strength 0 draws without features; whatever else differs, it is no way to reconstruct
    assert result["best"] == {"strength": 1.0, "guidance": 1.0} and "now recommends strength=1, guidance=1" in text
    after = read_info(file)
    assert (
        after.recommended == before.recommended | {"strength": 1.0, "guidance": 1.0} and after.source == before.source
    )
    assert (load_scope(file) is None) == (scope is None)
    again, _ = run(
        tmp_path, "sweep", "--model", str(file), "--strengths", "0", "1", "--guidances", "1"
    )  # finds all records
    assert again.keys() == result.keys() and again["unconditional"] == result["unconditional"]
    assert (tmp_path / "sweep" / "cosine.png").exists() and (tmp_path / "sweep" / "top1_match.png").exists()
    assert (tmp_path / "sweep" / "settings.png").exists()  # Fig. 9


def test_the_weight_is_the_share_of_the_second_map():
    source = FeatureSource("net", "last", False, 2, (1, 3), (8, 8), (0.0,) * 3, (1.0,) * 3)
    maps = {name: FeatureMap(torch.rand(2, 2, 1, 3), source) for name in ("first", "second")}
    first, second = (SimpleNamespace(preprocess=lambda _, name=name: name) for name in maps)
    pipeline = SimpleNamespace(
        features=maps.get, draw=lambda target, *_: target.values, score=lambda target, _: target.values.sum((1, 2, 3))
    )
    suite = SimpleNamespace(
        context=SimpleNamespace(open=lambda _: pipeline),
        spec=None,
        tested=SimpleNamespace(backbone=None, start=lambda _: None),
        sampling={"weight=0.25": None},
        partners=lambda _: second,
    )
    drawn = Mixing.interpolated(suite, 0.25)(first)["pictures"]
    assert torch.allclose(drawn, 0.75 * maps["first"].values + 0.25 * maps["second"].values)


def test_variances_are_over_the_samples_and_in_units_of_the_original_vectors():
    original, *drawn = (torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    backbone = SimpleNamespace(
        preprocess=lambda x, _: x, extract=lambda x, layer: SimpleNamespace(values=2 * x if layer == "layer2" else x)
    )
    pipeline = SimpleNamespace(
        features=lambda x: None,
        draw=lambda target, sampling, start, batch: drawn[start[0]],
        info=SimpleNamespace(source=SimpleNamespace(layer="layer2")),
    )
    tested = SimpleNamespace(
        backbone=backbone,
        start=lambda originals, sample: [sample] * 3,
        measure=lambda pixel_values, pictures, single: {"cosine": pictures.mean((1, 2, 3))},
    )
    suite = SimpleNamespace(
        tested=tested, context=SimpleNamespace(open=lambda _: pipeline), spec=None, args=SimpleNamespace(samples=2)
    )
    columns = Variability.varied(suite, None, True)(SimpleNamespace(preprocess=lambda _: original, single=None))
    square = (drawn[0] - drawn[1]).square() / 2  # the variance of two
    assert torch.allclose(columns["pixel_variance"], square.mean((1, 2, 3)), atol=1e-6)
    expected = square.sum(1).mean((1, 2)) / original.square().sum(1).mean((1, 2))  # the layer's factor 2 falls out
    assert torch.allclose(columns["feature_variance"], expected, atol=1e-6)
    assert torch.allclose(columns["cosine"], (drawn[0] + drawn[1]).mean((1, 2, 3)) / 2, atol=1e-6)


def test_variability_is_of_the_samples(tmp_path):
    result, _ = run(tmp_path, "variability", "--samples", "2", count=2)
    assert 0 < result["reconstruction"]["pixel_variance"]["value"] < result["unconditional"]["pixel_variance"]["value"]
    assert (
        0 < result["reconstruction"]["feature_variance"]["value"] < result["unconditional"]["feature_variance"]["value"]
    )


def test_mixing_along_the_interpolation_and_by_region(tmp_path):
    result, _ = run(tmp_path, "mixing", "--weights", "0", "0.5", count=3)
    assert result["weight=0"]["cosine"]["n"] == result["weight=0.5"]["cosine"]["n"] == 3
    composed = {name: entry["value"] for name, entry in result["composed"].items()}
    assert composed["cosine_inside"] > composed["cosine_inside_with_other"]
    assert composed["cosine_outside"] > composed["cosine_outside_with_other"]
    result, text = run(tmp_path / "pooled", "mixing", "--model", "tiny_cnn_pooled", "--weights", "0", count=2)
    assert "composed" not in result and "no locations to compose" in text


def stand_in(seen):
    """A package like imagecorruptions: noise from numpy's generator, and from the seed where one is given."""

    def apply(image, level, name, seed=None):
        seen.append((name, level, seed))
        noise = (np.random if seed is None else np.random.default_rng(seed)).normal(size=image.shape)
        return np.uint8(np.clip(image + 5 * level * noise, 0, 255))

    return SimpleNamespace(corrupt=apply)


def test_corruptions_are_functions_of_the_pictures_number(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "imagecorruptions", stand_in(seen))
    picture = torch.rand(3, 32, 32)
    for name in ("gaussian_noise", "glass_blur"):
        first, again, other = (corrupt(library(), picture, name, 5, seed) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(CORRUPTIONS) == 19 and set(SEEDED) < set(CORRUPTIONS)
    seen.clear()
    result, text = run(tmp_path, "corruptions", "--corruptions", "fog", "glass_blur", "--levels", "1", "5", count=8)
    assert {(name, level) for name, level, _ in seen} == {("fog", 1), ("fog", 5), ("glass_blur", 1), ("glass_blur", 5)}
    assert {"clean", "fog 1", "fog 5", "glass_blur 5"} <= result.keys() and "| fog 5 |" in text
    # the sets that are compared are the corrupted pictures and what was drawn from them
    assert "kid (resnet10t.tiny_world, pooled)" in result["fog 5"]


def test_reconstructions_of_corrupted_pictures_are_compared_with_these(monkeypatch):
    monkeypatch.setattr(corruptions, "corrupt", lambda library, x, name, level, seed: x + seed)
    clean, given = torch.zeros(2, 3, 4, 4), {}

    def drawn(spoilt, sampling, start):
        given["drawn"] = spoilt
        return spoilt / 2

    def measured(pixel_values, pictures, single):
        given["measured"] = pixel_values, pictures
        return {"cosine": torch.ones(2)}

    tested = SimpleNamespace(backbone=None, draw=drawn, measure=measured, start=lambda _: None)
    tested.vectors = lambda pictures, original: {"vectors/net": pictures.flatten(1)}
    suite = SimpleNamespace(
        kinds={"fog 1": ("fog", 1)},
        tested=tested,
        library=None,
        sampling={"fog 1": None},
        context=SimpleNamespace(seed=10),
    )
    originals = SimpleNamespace(preprocess=lambda _: clean, numbers=[3, 8], single=None)
    columns = Corruptions.corrupted(suite, "fog 1")(originals)
    spoilt = torch.tensor([13.0, 18.0]).view(2, 1, 1, 1).expand_as(clean)  # a picture's number and the run's seed
    assert torch.equal(given["drawn"], spoilt) and torch.equal(given["measured"][0], spoilt)
    assert torch.equal(given["measured"][1], spoilt / 2) and torch.equal(columns["reference/net"], spoilt.flatten(1))


@pytest.fixture
def photographic(stable_diffusion, tmp_path):
    """Options for a model of Stable Diffusion's layout and a backbone of 1000 classes, at random weights, and two
    pictures in ImageNet's layout."""
    torch.manual_seed(0)
    backbone = untrained_backbone("resnet10t", 64)
    save_file(backbone.model.state_dict(), tmp_path / "backbone.safetensors")
    base = load_base(stable_diffusion, PROMPT)
    model = FeatureControlNet.start(base, backbone.source(), 16)
    model.save(
        tmp_path / "model.safetensors",
        InversionInfo(backbone.source(), model.encoder.settings, base.describe(), PROMPT),
    )
    for synset, picture in zip(("n01440764", "n01484850"), draw(0, torch.arange(2), "held-out").image):
        (tmp_path / "val" / synset).mkdir(parents=True)
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "val" / synset / "0.png")
    return [
        "--model",
        str(tmp_path / "model.safetensors"),
        "--backbone-weights",
        str(tmp_path / "backbone.safetensors"),
        "--data",
        str(tmp_path / "val"),
    ]


def test_baseline_draws_each_class_by_its_name(photographic, tmp_path, monkeypatch):
    asked = []
    real = baseline.embeddings
    monkeypatch.setattr(baseline, "embeddings", lambda base, prompts: asked.append(prompts) or real(base, prompts))
    result, text = run(tmp_path, "baseline", *photographic, count=2)
    start, kind = "a high-quality, detailed, and professional image of a ", ", which is a kind of "
    assert asked == [
        [f"{start}tench{kind}cyprinid", f"{start}great white shark{kind}mackerel shark"]
    ]  # the first is the paper's example
    assert (
        result["class name"]["top5_accuracy"]["n"] == result["class name"]["cosine"]["n"] == 2 and "SUPERCLASS" in text
    )
    for folder in (tmp_path / "val").iterdir():
        folder.rename(folder.with_name(f"dogs {folder.name[-1]}"))
    with pytest.raises(FeatInvError, match="needs ImageNet's layout"):
        run(tmp_path / "plain", "baseline", *photographic, count=2)


def test_every_class_of_imagenet_has_a_superclass():
    result = baseline.superclasses()
    assert list(result) == ImageNetInfo().label_names() and all(result.values())


def test_natural_adversarial_matches_among_200_classes(photographic, tmp_path, monkeypatch):
    asked = []
    real = Evaluator.__init__
    monkeypatch.setattr(
        Evaluator,
        "__init__",
        lambda self, backbone, compared, subset=None: asked.append(subset) or real(self, backbone, compared, subset),
    )
    result, _ = run(tmp_path, "natural-adversarial", *photographic, count=2)
    found = result["reconstruction"]
    assert len(asked[0]) == 200 and asked[0][:3] == [6, 11, 13] and found["top1_match"]["n"] == 2
    assert found["top5_match_of_all"]["n"] == 2 and result["round trip"]["top1_match_of_all"]["value"] is not None


def test_a_model_and_its_judges_share_one_backbone():
    context = EvalContext(open_source("drawn", 1))
    spec = ModelSpec("tiny_cnn_last")
    assert context.open(spec).backbone is context.backbone(spec)


def test_without_the_corruptions_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(FeatInvError, match="pip install imagecorruptions-imaug"):
        run(tmp_path, "corruptions")
