"""The program that finds concepts: its file, its table, its page, and images that cannot be read."""

import base64
import io
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featinv_nodes.core.concepts import Concepts, load_concepts, sparse
from featinv_nodes.core.concepts.collect import Folder, Pictures, collect
from featinv_nodes.core.concepts.statistics import concept_statistics
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training import discover_concepts
from training.concepts import page as concept_page


@pytest.fixture
def folder(tmp_path):
    """Eight scenes in two folders and one file that is no picture."""
    for i, picture in enumerate(draw(0, torch.arange(8), "held-out").image):
        file = tmp_path / "pictures" / f"class {i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(file)
    (tmp_path / "pictures" / "broken.jpg").write_text("no image")
    return tmp_path / "pictures"


def test_embedded_world(tmp_path, capsys):
    for name in ("a", "b"):
        discover_concepts.main(["--count", "1500", "--concepts", "4", "--out", str(tmp_path / f"{name}.safetensors")])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    concepts = load_concepts(tmp_path / "a.safetensors")
    assert concepts.source == open_backbone("tiny-cnn").source() and 2 <= len(concepts) <= 4
    assert len(concepts.settings["share"]) == len(concepts) + 1
    assert sum(concepts.settings["relevance"]) == pytest.approx(1, abs=1e-3)
    printed = capsys.readouterr().out
    assert all(name in printed for name in concepts.names) and "completeness" in printed
    assert "read 400 images: 1,500 feature vectors" in printed and "look at" in printed


def test_folder_with_an_unreadable_picture(folder, tmp_path, capsys):
    file = tmp_path / "new" / "c.safetensors"
    discover_concepts.main(
        ["--data", str(folder), "--layer", "layer2", "--method", "pca", "--concepts", "3", "--out", str(file)]
    )
    printed = capsys.readouterr().out
    assert "skipped 1 of 9 images" in printed and "broken.jpg" in printed and "no relevance" in printed
    assert "read 8 images in 2 class folders" in printed
    concepts = load_concepts(file)
    assert concepts.source.layer == "layer2" and concepts.method == "pca" and len(concepts) == 3
    assert concepts.settings["relevance"] == [] and concepts.settings["classes"] == 2


def test_vectors_come_evenly_from_all_pictures(folder):
    """From the maps of 8 readable pictures, whose vectors say which picture they are of: as many from each as can
    be."""
    backbone = open_backbone("tiny-cnn")
    seen, steps = [], []

    def extract(pixel_values):
        values = (
            torch.zeros(len(pixel_values), 128, 8, 8)
            + torch.arange(len(seen), len(seen) + len(pixel_values))[:, None, None, None]
        )
        values[:, 1] = torch.arange(64).view(8, 8)
        seen.extend(pixel_values)
        return FeatureMap(values, backbone.source())

    pictures = Folder(folder, backbone, seed=3)
    result = collect(pictures, extract, 100, 0, lambda done, total: steps.append((done, total)))
    counts = result.vectors[:, 0].long().bincount()
    assert (
        len(counts) == 8 and counts.max() - counts.min() <= 1 and counts.min() == 11
    )  # 100 among 9 files, one of which cannot be read
    assert len({tuple(row[:2].tolist()) for row in result.vectors}) == len(result.vectors)  # no place twice
    assert len(result.maps) == len(result.pictures) == len(result.names) == result.read == 8 and steps[-1] == (9, 9)
    assert "broken.jpg" in pictures.skipped() and {name.split("/")[0] for name in result.names} == {
        "class 0",
        "class 1",
    }
    assert torch.equal(result.pictures, (torch.stack(seen) * 255).round().byte())

    def collected(order, places):
        seen.clear()
        return collect(Folder(folder, backbone, seed=order), extract, 100, places)

    assert torch.equal(collected(3, 0).vectors, result.vectors)
    assert not torch.equal(collected(3, 1).vectors, result.vectors)  # other places in the same pictures
    assert collected(4, 0).names != result.names and len(Folder(folder, backbone, most=4)) == 4


def test_a_number_that_grows(tmp_path, capsys):
    discover_concepts.main(["--count", "1500", "--concepts", "auto", "--out", str(tmp_path / "c.safetensors")])
    concepts = load_concepts(tmp_path / "c.safetensors")
    assert (
        concepts.settings["grown"][-1][1] >= 0.5
        and "completeness by number of clusters: 2: 0." in capsys.readouterr().out
    )
    assert concepts.settings["completeness"] == pytest.approx(concepts.settings["grown"][-1][1], abs=1e-4)


def test_sparse_dictionary_and_its_page(tmp_path, capsys, monkeypatch):
    """More atoms than channels; the page shows some of them in pictures and all in its table."""
    monkeypatch.setattr(concept_page, "MOST", 6)
    monkeypatch.setattr(sparse, "STEPS", 200)
    out = tmp_path / "c.safetensors"
    discover_concepts.main(
        ["--count", "1500", "--method", "sae", "--concepts", "150", "--active", "4", "--out", str(out)]
    )
    concepts = load_concepts(out)
    assert (
        concepts.encoder.active == 4
        and len(concepts) > 100
        and sum(concepts.settings["relevance"]) == pytest.approx(1, abs=1e-3)
    )
    page = out.with_suffix(".html").read_text()
    assert page.count("<section id=") == 7 and page.count("<tr><td") == len(concepts) + 1
    assert "http" not in page and "<script" not in page
    assert concepts.source.weights and f"Digests of the weights: backbone {concepts.source.weights}." in page


def test_the_page_shows_each_concept_where_it_is(tmp_path):
    """A map in which one concept is strong in one cell of each of six pictures: crops contain that cell, the largest
    first; heat maps are bright there; numbers and what was rejected are on the page."""
    backbone = open_backbone("tiny-cnn")
    scenes = draw(0, torch.arange(6), "held-out").image
    values = torch.zeros(6, 128, 8, 8)
    values[:, 1] = 1
    for number in range(6):
        values[number, 0, number, 7 - number] = number + 1.0
    collected = collect(Pictures(scenes, backbone), lambda x: FeatureMap(values, backbone.source()), 6, 0)
    concepts = Concepts(
        [torch.eye(128)[:1], torch.eye(128)[1:2]],
        ["spot & dot", "flat"],
        backbone.source(),
        settings={"rejected": ["cluster of 3: <small>"]},
    )
    result = concept_statistics(backbone, concepts, collected.maps)
    lengths = concepts.lengths(collected.maps)
    assert concept_page.strongest(lengths[0]) == [5, 4, 3, 2, 1]
    cut = concept_page.crop(collected, lengths[0], 5)  # cell (5, 2) of 8 x 8 pixels each
    assert torch.equal(cut, collected.pictures[5][:, 28:60, 4:36])
    assert torch.equal(concept_page.crop(collected, lengths[0], 0), collected.pictures[0][:, :32, 32:])  # a corner
    heat = concept_page.overlay(torch.full((3, 64, 64), 90, dtype=torch.uint8), lengths[0, 5] / 6).float()
    yellow = heat[0] - heat[2]
    assert (
        yellow[40:48, 16:24].min() > 100
        and yellow.masked_fill(lengths[0, 5].repeat_interleave(8, 0).repeat_interleave(8, 1) > 0, 0).max() < 1
    )
    page = concept_page.page(concepts, collected, result)
    assert (
        "spot &amp; dot" in page
        and "&lt;small&gt;" in page
        and f"{result.share[0]:.1%}" in page
        and f"{result.relevance[1]:.1%}" in page
    )
    data = re.findall(r"base64,([^\"]+)", page)
    assert len(data) == 4 + 3 * (5 + 4)  # examples; two concepts and the rest
    assert all(max(Image.open(io.BytesIO(base64.b64decode(text))).size) == concept_page.SIDE for text in data)


def test_examples_cover_the_concepts():
    lengths = torch.zeros(3, 5, 1, 1)
    lengths[0, 1], lengths[1, 3], lengths[2, 4] = 5.0, 0.1, 2.0
    assert set(concept_page.covering(lengths)[:3]) == {1, 3, 4}


def test_own_directions(tmp_path, capsys):
    save_file({"paw": torch.randn(2, 128, generator=torch.Generator().manual_seed(0))}, tmp_path / "own.safetensors")
    discover_concepts.main(
        ["--directions", str(tmp_path / "own.safetensors"), "--count", "800", "--out", str(tmp_path / "c.safetensors")]
    )
    assert load_concepts(tmp_path / "c.safetensors").names == ["paw", "rest"] and "paw" in capsys.readouterr().out


def test_bad_input(folder, tmp_path):
    out = ["--out", str(tmp_path / "c.safetensors")]
    cases = {
        "neither 'drawn' nor a folder": ["--data", str(tmp_path / "none")],
        "no layer": ["--layer", "x"],
        "17 vectors of 128 channels": ["--data", str(folder), "--count", "20"],
        "--count 0": ["--count", "0"],
        "--concepts few: expected a number from 1, or auto": ["--concepts", "few"],
        "give a number of them for pca": ["--concepts", "auto", "--method", "pca"],
        "give a number of them: the classifier head": ["--concepts", "auto", "--layer", "layer2"],
    }
    for words, arguments in cases.items():
        with pytest.raises(FeatInvError, match=words):
            discover_concepts.main([*arguments, *out])
    for file in folder.rglob("*.png"):
        file.unlink()
    with pytest.raises(FeatInvError, match="none of the 1 images"):
        discover_concepts.main(["--data", str(folder), *out])
    assert not (tmp_path / "c.safetensors").exists() and not (tmp_path / "c.html").exists()
