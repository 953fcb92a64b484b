"""Feature decoders on the command line: reconstruct.py --decoder."""

import json

import pytest
import torch
from PIL import Image
from rae import backbone_of, own_decoder, trained

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import read_image
from featinv_nodes.feature_decoders import open_feature_decoder
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training import reconstruct


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    picture = draw(0, torch.arange(1), "held-out").image[0]
    Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(file)
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "mine"
    own_decoder(folder, open_backbone("tiny-cnn").source())
    return folder


def test_it_writes_the_files_of_a_reconstruction(folder, scene, tmp_path):
    """The decoder's pictures, of a picture's map and of mixtures; the backbone is found by the decoder's own source."""
    out = tmp_path / "out"
    reconstruct.main(["--decoder", str(folder), "--image", scene, scene, "--mix", "0", "1", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    names = ["000_mix_0.00_0.png", "001_mix_1.00_0.png", "panel.png", "results.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert results["model"] is None and results["sampling"] is None and results["decoder"] == str(folder)
    backbone = open_backbone("tiny-cnn")
    assert results["source"]["weights"] == results["digests"]["backbone"] == backbone.weights
    assert "feature decoder mine" in results["note"] and -1 <= results["pictures"][0]["cosine"] <= 1
    drawn = open_feature_decoder(folder).decode(backbone.extract(backbone.preprocess(read_image(scene))))
    assert (read_image(out / names[0])[0] - drawn[0]).abs().max() <= 0.5001 / 255  # rounded to 8 bits


def test_a_released_decoder_takes_its_backbone_at_its_own_size(scene, tmp_path):
    made = trained("dinov2", tmp_path / "rae")
    backbone_of(made, tmp_path / "timm", made.transformers)
    command = ["--decoder", str(made.folder), "--image", scene, "--out", str(tmp_path / "out")]
    with pytest.raises(FeatInvError, match="needs that backbone"):
        reconstruct.main(command)
    reconstruct.main([*command, "--backbone", str(tmp_path / "timm")])
    assert Image.open(tmp_path / "out" / "000_scene_0.png").size == (256, 256)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--steps", "2"], "--steps means nothing with --decoder"),
        (["--precision", "bf16"], "--precision means nothing with --decoder"),
        (["--samples", "2"], "--samples means nothing"),
        (["--untrained"], "--untrained means nothing"),
        (["--moves", "2"], "--moves means nothing"),
        (["--base", "photo"], "--base means nothing"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--backbone", "tiny-vit"], "the backbone is vit_tiny_patch16_224.tiny_world"),
    ],
)
def test_what_does_not_go_together_is_named(folder, scene, tmp_path, options, words):
    with pytest.raises(FeatInvError, match=words):
        reconstruct.main(["--decoder", str(folder), "--image", scene, "--out", str(tmp_path / "out"), *options])
    assert not list((tmp_path / "out").glob("*"))
