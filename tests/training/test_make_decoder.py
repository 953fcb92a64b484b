"""make_world.py decoder: what it writes opens as a feature decoder, learns, goes on, and refuses what cannot work."""

import pytest
import torch
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.feature_decoders import open_feature_decoder
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn import DRAWN
from training import make_world
from training.worlds.feature_decoder import Decoder, Sizes, write_feature_decoder


def make(out, *options):
    make_world.main(["decoder", "--out", str(out), "--device", "cpu", "--width", "32", "--layers", "1", *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder")
    make(out, "--backbone", "tiny-vit", "--images", "512", "--batch", "32", "--pixels-first", "256")
    return out


def error(decoder, pictures, features):
    return (decoder.decode(features) - pictures).square().mean().item()


def test_draws_scenes_that_it_did_not_see(made):
    """Nearer to them than what it draws of another scene's map, after 16 steps by a third."""
    scenes = DRAWN.draw(torch.arange(100, 132))
    features = open_backbone("tiny-vit").extract(scenes)
    decoder = open_feature_decoder(made)
    others = features.with_values(features.values.roll(1, 0))
    assert error(decoder, scenes, features) < 0.67 * error(decoder, scenes, others)
    with Image.open(made / "work" / "panel_decoder.png") as panel:
        assert panel.width > 8 * 64


def test_the_folder_holds_what_was_trained(tmp_path):
    """Standardised maps and 8 bits included: 1/127 of the largest weight of a row is at most .4 % of a value's
    rounding, over two layers below 2 % of the pictures' range."""
    torch.manual_seed(0)
    backbone, scenes = open_backbone("tiny-cnn"), DRAWN.draw(torch.arange(8))
    features = backbone.extract(scenes)
    decoder = Decoder(features.source, Sizes(32, 1, 4)).eval()
    decoder.standardise(features.values)
    decoder.start_linear(features.values, scenes * 2 - 1)
    write_feature_decoder(tmp_path, decoder)
    with torch.no_grad():
        expected = (decoder(features.values) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1
    assert (open_feature_decoder(tmp_path, backbone).decode(features) - expected).abs().max() < 0.02


def test_a_linear_start_draws_the_scenes(tmp_path):
    """Before any training; and the maps' scale does not matter, as they are standardised."""
    torch.manual_seed(0)
    backbone, scenes = open_backbone("tiny-vit"), DRAWN.draw(torch.arange(64))
    values = 50 * backbone.extract(scenes).values + 7
    decoder = Decoder(backbone.source(), Sizes()).eval()
    decoder.standardise(values)
    decoder.start_linear(values, scenes * 2 - 1)
    with torch.no_grad():
        drawn = decoder(values) / 2 + 0.5
    assert (drawn - scenes).square().mean() < 0.6 * (scenes - scenes.mean((2, 3), keepdim=True)).square().mean()


def test_goes_on_from_its_checkpoint(made, tmp_path, capsys):
    """Another 32 images of a finished run change the weights, and nothing begins anew."""
    weights = made / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    make(made, "--backbone", "tiny-vit", "--images", "544", "--batch", "32", "--pixels-first", "256")
    state = torch.load(made / "work" / "decoder.pt", weights_only=True)
    assert state["seen"] == 544 and weights.read_bytes() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "8", "--batch", "16"), "less than one batch of 16"),
        (("--images", "64", "--width", "40"), "--width 40 and --heads 4"),
        (("--images", "64", "--layer", "pancake"), "no layer 'pancake'"),
    ],
)
def test_refuses_what_cannot_work_before_anything_runs(tmp_path, options, message):
    with pytest.raises(FeatInvError, match=message):
        make(tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_pooled_or_oblong_map_is_refused(tmp_path):
    with pytest.raises(FeatInvError, match="square maps"):
        Decoder(open_backbone("tiny-cnn").source(pooled=True), Sizes())
