"""The program that finds concepts: its file, its table, and pictures that cannot be read."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featinv_nodes.core.concepts import load_concepts
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.tiny_world import open_backbone
from featinv_nodes.tiny_world.scenes import draw
from training import discover_concepts


@pytest.fixture
def folder(tmp_path):
    """Eight scenes in two folders and one file that is no picture."""
    for i, picture in enumerate(draw(0, torch.arange(8), "held-out").image):
        file = tmp_path / "pictures" / f"class {i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(file)
    (tmp_path / "pictures" / "broken.jpg").write_text("no picture")
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


def test_folder_with_an_unreadable_picture(folder, tmp_path, capsys):
    file = tmp_path / "new" / "c.safetensors"
    discover_concepts.main(["--data", str(folder), "--layer", "layer2", "--method", "pca", "--concepts", "3", "--out", str(file)])
    printed = capsys.readouterr().out
    assert "skipped 1 of 9 pictures" in printed and "broken.jpg" in printed and "no relevance" in printed
    concepts = load_concepts(file)
    assert concepts.source.layer == "layer2" and concepts.method == "pca" and len(concepts) == 3


def test_own_directions(tmp_path, capsys):
    save_file({"paw": torch.randn(2, 128, generator=torch.Generator().manual_seed(0))}, tmp_path / "own.safetensors")
    discover_concepts.main(["--directions", str(tmp_path / "own.safetensors"), "--count", "800", "--out", str(tmp_path / "c.safetensors")])
    assert load_concepts(tmp_path / "c.safetensors").names == ["paw", "rest"] and "paw" in capsys.readouterr().out


def test_bad_input(folder, tmp_path):
    out = ["--out", str(tmp_path / "c.safetensors")]
    cases = {
        "neither 'tiny' nor a folder": ["--data", str(tmp_path / "none")], "no layer": ["--layer", "x"],
        "20 vectors of 128 channels": ["--data", str(folder), "--count", "20"], "--count 0": ["--count", "0"],
    }
    for words, arguments in cases.items():
        with pytest.raises(FeatInvError, match=words):
            discover_concepts.main([*arguments, *out])
    for file in folder.rglob("*.png"):
        file.unlink()
    with pytest.raises(FeatInvError, match="none of the 1 pictures"):
        discover_concepts.main(["--data", str(folder), *out])
    assert not (tmp_path / "c.safetensors").exists()
