"""The same name with other weights: refused by programs, caches and runs that go on, or allowed and said so."""

import html
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from featinv_nodes.core.concepts import load_concepts, save_concepts
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import CONCEPTS, MODELS, concepts_file, model_file, open_backbone
from featinv_nodes.worlds.drawn import FOLDER
from featinv_nodes.worlds.drawn.scenes import draw
from training import cache, cli, evaluate, reconstruct, visualize_concepts
from training.config import DEFAULT, read_config
from training.data.latent_cache import open_pictures
from training.loop.training import train
from training.models.base_model import load_base
from training.models.pipeline import load_pipeline

PROMPT = "a drawing of the small world"
SMALL = {"batch": "8", "lr": "1e-3", "schedule": "constant", "precision": "fp32", "save_every": "8", "warmup": "0"}
QUICK = ["--steps", "1", "--gradient", "0", "--device", "cpu"]


def fine_tune(folder, copy, name):
    """A copy of a model's folder whose weights are a little different: the name stays."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / name)
    save_file(
        {key: value * 1.01 if value.is_floating_point() else value for key, value in weights.items()}, copy / name
    )
    return str(copy)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A weights file with digests, a concept file of other weights, and fine-tunes of backbone and base model."""
    work = tmp_path_factory.mktemp("made")
    source = open_backbone("tiny-cnn").source()
    file = work / "mine.safetensors"
    shutil.copy(model_file("tiny_cnn_last"), file)
    concepts = load_concepts(concepts_file("tiny_cnn_concepts"))
    save_concepts(work / "concepts.safetensors", replace(concepts, source=replace(source, weights="another")))
    scene = draw(0, torch.arange(1), "held-out").image[0]
    Image.fromarray((scene * 255).byte().permute(1, 2, 0).numpy()).save(work / "scene.png")
    backbone = fine_tune(FOLDER / "backbone_cnn", work / "backbone", "model.safetensors")
    base = fine_tune(FOLDER / "base", work / "base", "unet/diffusion_pytorch_model.safetensors")
    return {"file": str(file), "backbone": backbone, "base": base, "work": work, "source": source}


def test_a_program_refuses_other_weights_or_says_that_they_are_allowed(made, tmp_path, monkeypatch, capsys):
    words = ["--model", made["file"], "--image", str(made["work"] / "scene.png"), "--out", str(tmp_path), *QUICK]
    other = open_backbone(made["backbone"])
    assert other.name == made["source"].backbone and other.weights != made["source"].weights
    monkeypatch.setattr(cli.sys, "argv", ["reconstruct.py"])
    for option, said in (
        ("--backbone", f"other weights (digest {made['source'].weights} against {other.weights})"),
        ("--base", "mine.safetensors was made with other weights of the same name: digest "),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.run(partial(reconstruct.main, [*words, option, made[option.strip("-")]]))
        message = capsys.readouterr().err
        assert said in message and "give --other-weights" in message and message.count("\n") == 1
    both = ["--backbone", made["backbone"], "--base", made["base"], "--other-weights"]
    reconstruct.main([*words, *both])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["digests"] == {"backbone": other.weights, "base model": load_base(made["base"], PROMPT).weights}
    assert results["note"].count("Other weights are allowed by --other-weights: mine.safetensors was made with") == 2
    assert results["note"].splitlines()[-1] in capsys.readouterr().err
    reconstruct.main(words)  # the right ones
    assert "allowed" not in json.loads((tmp_path / "results.json").read_text())["note"]


def test_the_shipped_files_state_the_weights_that_they_were_made_with():
    for name in MODELS:
        info = read_info(model_file(name))
        assert info.source.weights == open_backbone(info.source.backbone).weights, name
        assert info.base["weights"] == load_base(info.base["name"], info.prompt).weights, name
    for name in CONCEPTS:
        source = load_concepts(concepts_file(name)).source
        assert source.weights == open_backbone(source.backbone).weights, name


def test_concepts_of_other_weights_are_refused_or_allowed(made, tmp_path):
    words = ["--model", "tiny_cnn_last", "--concepts", str(made["work"] / "concepts.safetensors"), "--names", "object"]
    words += ["--image", str(made["work"] / "scene.png"), "--seeds", "1", *QUICK]
    with pytest.raises(FeatInvError, match="the concepts are of resnet10t.tiny_world with other weights"):
        visualize_concepts.main([*words, "--out", str(tmp_path)])
    visualize_concepts.main([*words, "--out", str(tmp_path), "--other-weights"])
    (note,) = json.loads((tmp_path / "results.json").read_text())["notes"]
    assert note.startswith("Other weights are allowed by --other-weights: concepts.safetensors was made with")


def test_an_evaluation_states_digests_and_repeats_what_is_allowed(made, tmp_path):
    other, out = fine_tune(FOLDER / "backbone_cnn", tmp_path / "other", "model.safetensors"), tmp_path / "out"
    words = ["--model", made["file"], "--count", "1", "--out", str(out), "--backbone", other, *QUICK]
    with pytest.raises(FeatInvError, match="with other weights .* give --other-weights"):
        evaluate.main(words)
    assert not (out / "records").exists()
    evaluate.main([*words, "--other-weights"])
    results, digest = json.loads((out / "results.json").read_text()), open_backbone(other).weights
    assert results["digests"][f"backbone of {made['file']}"] == digest
    assert results["digests"][f"base model of {made['file']}"] == load_base("tiny", PROMPT).weights
    said = [results["notes"][0], f"backbone of {made['file']} {digest}"]
    assert (
        said[0].startswith("Other weights are allowed by --other-weights: ") and "--other-weights" in results["command"]
    )
    page, text = html.unescape((out / "index.html").read_text()), (out / "report.md").read_text()
    assert [words for words in said if words not in page or words not in text] == []
    shutil.copy(FOLDER / "backbone_cnn" / "model.safetensors", other)
    with pytest.raises(FeatInvError, match="records of another evaluation .*weights.backbone of"):
        evaluate.main([*words, "--other-weights"])


def test_a_run_does_not_go_on_with_other_weights(made, tmp_path):
    def run(images, **changes):
        return train(read_config(DEFAULT, SMALL | {"max_images": str(images)} | changes), tmp_path / "run")

    backbone, base = tmp_path / "backbone", tmp_path / "base"
    shutil.copytree(FOLDER / "backbone_cnn", backbone)
    shutil.copytree(FOLDER / "base", base)
    named = {"backbone": str(backbone), "base": str(base)}
    info = read_info(run(8, **named))
    assert info.source.weights == made["source"].weights and info.base["weights"] == load_base("tiny", PROMPT).weights
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    for there, part, file in (
        (backbone, "backbone", "model.safetensors"),
        (base, "base model", "unet/diffusion_pytorch_model.safetensors"),
    ):
        right = (there / file).read_bytes()
        shutil.copy(f"{made[part.split()[0]]}/{file}", there / file)
        with pytest.raises(FeatInvError, match=rf"began with other weights of the same name \({part}: digest .* then"):
            run(16, keep="7", **named)
        (there / file).write_bytes(right)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert load_pipeline(str(run(16, **named)), backbone=str(backbone)).info.images_seen == 16


def test_a_cache_of_another_backbone_of_the_name_is_refused(made, tmp_path):
    config = read_config(DEFAULT, SMALL | {"cache": str(tmp_path), "cache_features": "true", "images": "8"})
    cache.fill(config)
    base = load_base("tiny", PROMPT)
    open_pictures(config, base, open_backbone("tiny-cnn"), "cpu", 0, 1)
    with pytest.raises(FeatInvError, match=r"cache of something else \(backbone: "):
        open_pictures(config, base, open_backbone(made["backbone"]), "cpu", 0, 1)
