"""Scope statistics as programs fit, keep, measure and show them."""

import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import read_metadata, read_tensors
from featinv_nodes.core.scope import LEVELS
from featinv_nodes.core.weights import load_scope
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn.scenes import draw
from training import fit_scope, reconstruct
from training.data.scope import pictures
from training.experiments import measure_scope
from training.experiments.measure_scope import auroc, rank_correlation
from training.models.pipeline import load_pipeline

MODEL = "tiny_cnn_pooled"


@pytest.fixture
def bare(tmp_path):
    """A weights file as training wrote it before there were scope statistics."""
    from safetensors.torch import save_file

    file = model_file(MODEL)
    kept = {k: v for k, v in read_tensors(file).items() if not k.startswith("scope.")}
    save_file(kept, tmp_path / "bare.safetensors", {"featinv": read_metadata(file)["featinv"]})
    return tmp_path / "bare.safetensors"


def save_scenes(folder, numbers):
    folder.mkdir()
    for number, picture in zip(numbers, draw(0, torch.tensor(numbers), "held-out").image):
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{number}.png")


def test_fit_adds_statistics_and_changes_nothing_else(bare, tmp_path):
    out = tmp_path / "fitted.safetensors"
    before = bare.read_bytes()
    fit_scope.main(
        ["--model", str(bare), "--data", "drawn", "--count", "200", "--drawn", "4", "--steps", "1", "--out", str(out)]
    )
    assert bare.read_bytes() == before and load_scope(bare) is None
    scope = load_scope(out)
    assert scope.maps == 200 and len(scope.quantiles["cycle"]) == len(LEVELS)
    old, new = read_tensors(bare), read_tensors(out)
    assert {k for k in new if not k.startswith("scope.")} == set(old)
    assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
    assert read_metadata(out)["featinv"] == read_metadata(bare)["featinv"]
    fit_scope.main(["--model", str(out), "--data", "drawn", "--count", "220", "--drawn", "0"])  # again, in place
    assert load_scope(out).maps == 220 and "cycle" not in load_scope(out).quantiles
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bare.safetensors", "fitted.safetensors"]


def test_fit_reads_a_folder_and_leaves_out_what_it_cannot_read(bare, tmp_path, capsys):
    save_scenes(tmp_path / "p", range(200))
    (tmp_path / "p" / "broken.png").write_text("no image")
    arguments = ["--model", str(bare), "--data", str(tmp_path / "p"), "--drawn", "0"]
    fit_scope.main([*arguments, "--count", "200"])
    assert load_scope(bare).maps == 200
    whole = bare.read_bytes()
    with pytest.raises(FeatInvError, match="201 images; 300 are to be read.*at least 200"):
        fit_scope.main([*arguments, "--count", "300"])
    with pytest.raises(FeatInvError, match="200 readable images; 201 are to be read"):
        fit_scope.main([*arguments, "--count", "201"])
    assert "broken.png" in capsys.readouterr().out
    with pytest.raises(FeatInvError, match="at least 200"):
        fit_scope.main([*arguments, "--count", "20"])
    assert bare.read_bytes() == whole


def test_measure_writes_its_report(tmp_path, bare, monkeypatch):
    monkeypatch.setattr(measure_scope, "DRAWS", 20)
    measure_scope.main(
        ["--count", "24", "--drawn", "2", "--unedited", "12", "--steps", "1", "--out", str(tmp_path / "m")]
    )
    results = json.loads((tmp_path / "m" / "results.json").read_text())
    assert {"object x0.25", "mix 50/50", "half/half splice", "Gaussian noise", "noise images"} <= results[
        "separation"
    ].keys()
    assert results["separation"]["white noise"]["auroc"]["score"]["value"] == 1
    assert results["rank_correlation"]["all maps"]["n"] == 12 + 2 * (len(results["separation"]) - 1)
    text, digests = (tmp_path / "m" / "scope.md").read_text(), results["digests"]
    assert digests["backbone"] and f"backbone {digests['backbone']}, base model {digests['base model']}." in text
    assert "Spearman" in text and Image.open(tmp_path / "m" / "scope.webp").width > 1000
    with pytest.raises(FeatInvError, match="fit_scope.py"):
        measure_scope.main(
            ["--model", str(bare), "--count", "24", "--drawn", "2", "--unedited", "4", "--out", str(tmp_path / "n")]
        )


def test_area_and_rank_correlation():
    a = torch.arange(100.0)
    assert auroc(a, a + 200)["value"] == 1 and auroc(a, a)["value"] == 0.5 and auroc(a + 200, a)["value"] == 0
    assert auroc(torch.zeros(10), torch.zeros(10))["value"] == 0.5  # ties count half
    assert rank_correlation(a, a**3)["value"] == pytest.approx(1) and rank_correlation(a, -a)["value"] == pytest.approx(
        -1
    )
    noise = rank_correlation(a, torch.rand(100, generator=torch.Generator().manual_seed(0)))
    assert noise["low"] < noise["value"] < noise["high"] and noise["low"] < 0 < noise["high"]


def test_reconstruct_says_what_is_outside(tmp_path, bare):
    save_scenes(tmp_path / "p", range(2))
    scenes = [str(tmp_path / "p" / f"{n}.png") for n in range(2)]
    reconstruct.main(
        ["--image", *scenes, "--mix", "0", "0.5", "--gradient", "0", "--samples", "2", "--out", str(tmp_path / "o")]
    )
    entries = json.loads((tmp_path / "o" / "results.json").read_text())["pictures"]
    assert [e["scope"]["verdict"] for e in entries] == ["inside", "inside", "outside", "outside"]
    assert entries[2]["scope"]["off"] and entries[2]["scope"]["line"].startswith("outside: ")
    assert set(entries[0]["scope"]["less_unusual"]) == {"direction", "magnitude", "distance", "neighbours"}
    assert entries[0]["scope"]["cycle"]["verdict"] in ("inside", "at the edge", "outside")
    for name, other in (
        ("g", ["--gradient", "0.05"]),
        ("s", ["--gradient", "0", "--steps", "2"]),
        ("b", ["--gradient", "0", "--best-of", "2"]),
    ):
        reconstruct.main(["--image", scenes[0], *other, "--out", str(tmp_path / name)])
        entries = json.loads((tmp_path / name / "results.json").read_text())["pictures"]
        assert (
            entries[0]["scope"]["verdict"] == "inside" and "cycle" not in entries[0]["scope"]
        )  # its quantiles are of pictures drawn otherwise
    reconstruct.main(["--image", scenes[0], "--model", str(bare), "--steps", "1", "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "results.json").read_text())["pictures"][0]["scope"] == {}
    for name in ("0", "0.5"):
        reconstruct.main(["--image", *scenes, "--mix", name, "--steps", "1", "--out", str(tmp_path / name)])
    heights = [Image.open(tmp_path / name / "panel.png").height for name in ("0", "0.5")]
    assert heights[1] - heights[0] == 18  # the line of the map that is outside


def test_fit_takes_every_25th_picture_of_tar_files_that_a_world_keeps_back(bare, tmp_path):
    """The ones that training/worlds/photographs.py leaves aside, by their index in the folder."""
    save_scenes(tmp_path / "p", range(60))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in sorted((tmp_path / "p").iterdir()):
            tar.add(file, file.name)
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "all.tar").rename(shards / "all.tar")
    pipeline = load_pipeline(str(bare))
    batches = pictures(pipeline, str(shards), 3, 2, kept_back=True)
    names = sorted(f"{number}.png" for number in range(60))
    expected = draw(0, torch.tensor([int(name.removesuffix(".png")) for name in names[::25]]), "held-out").image
    found = torch.cat(list(batches))
    apart = (found[:, None] - pipeline.backbone.preprocess(expected)[None]).abs().amax((2, 3, 4))
    assert sorted(apart.argmin(1).tolist()) == [0, 1, 2] and apart.amin(1).max() < 0.01  # bytes of 8 bits
    with pytest.raises(FeatInvError, match="3 images; 4 are to be read"):
        list(pictures(pipeline, str(shards), 4, 2, kept_back=True))


def test_pictures_for_the_fit_are_spread_over_the_names_and_always_the_same(tmp_path):
    """The first by name would be those of the first classes."""
    for n in range(60):
        Image.new("RGB", (8, 8), (4 * n, 0, 0)).save(tmp_path / f"{n:02}.png")
    pipeline = SimpleNamespace(backbone=SimpleNamespace(preprocess=lambda x: x))
    one, again = (torch.cat(list(pictures(pipeline, str(tmp_path), 12, 5))) for _ in range(2))
    numbers = (one[:, 0, 0, 0] * 255 / 4).round().tolist()
    assert torch.equal(one, again) and len(set(numbers)) == 12 and min(numbers) < 20 and max(numbers) > 40
