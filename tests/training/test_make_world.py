"""A world is made whole from a folder of photographs, goes on from wherever it was stopped, and says what it cannot
do."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import COUNT, DEPTHS, Stopped, images_seen, maker, says, weights_of, write_network, write_photographs

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import is_in_8_bits
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import open_backbone
from training import cli
from training.models.base_model import load_base
from training.models.pipeline import load_pipeline
from training.worlds import inversion, loop, make_photo
from training.worlds.photographs import read_photographs

#: checkpoint -> images seen: the shares of 960, in whole batches
SEEN = {"decoder": 96, "base": 384, "small_layer2": 160, "small_last": 160, "small_pooled": 160}
MODELS = [f"small_{depth}.safetensors" for depth in DEPTHS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are added in one order, so that equal runs have equal results."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def make(data, network):
    return maker(data, network)


@pytest.fixture(scope="module")
def made(make, tmp_path_factory):
    """(folder of a whole world, pictures that the autoencoder was shown, white ones among them, files started from)"""
    out, encoded, started = tmp_path_factory.mktemp("made") / "world", [], []
    with pytest.MonkeyPatch.context() as patch:
        encode, start_from = PatchAutoencoder.encode, inversion.start_from
        patch.setattr(
            PatchAutoencoder, "encode", lambda self, x: (encoded.append(x.amin((1, 2, 3)) > 0.99), encode(self, x))[1]
        )
        patch.setattr(
            inversion,
            "start_from",
            lambda model, file, base: (started.append(Path(file).name), start_from(model, file, base))[1],
        )
        make(out)
    encoded = torch.cat(encoded)
    return out, len(encoded), encoded.sum().item(), started


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def assert_same(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for file in one:
        assert all(torch.equal(value, other[file][name]) for name, value in one[file].items()), file


# --- a whole world ---


def test_a_whole_world_opens_and_draws(made, network):
    out, *_ = made
    assert images_seen(out) == SEEN and not list(out.rglob("*.part"))
    assert sorted(f.name for f in out.glob("*.safetensors")) == sorted(MODELS)
    panels = list((out / "work").glob("panel_*.png"))
    assert {f.name for f in panels} == {f"panel_{stage}.png" for stage in ("autoencoder", "base", *DEPTHS)}
    assert all(Image.open(f).width > 8 * 144 for f in panels)
    base = load_base(out / "base", "a photograph")
    assert (base.latent_size, base.downscale, base.resolution, base.describe()["latent_channels"]) == (4, 8, 32, 8)
    backbone = open_backbone(str(network))
    for depth, name in zip(DEPTHS, MODELS):
        pipeline = load_pipeline(str(out / name), backbone=str(network))
        assert is_in_8_bits(out / name) and pipeline.info.images_seen == SEEN[name.removesuffix(".safetensors")]
        assert pipeline.info.source == backbone.source("last" if depth == "pooled" else depth, depth == "pooled")
        sampling = pipeline.recommended()
        assert pipeline.info.config["cycle"] == 0.5  # worth more than twice the images
        assert (sampling.steps, sampling.negative, sampling.gradient > 0) == (10, "features", depth != "pooled")
        drawn = pipeline.draw(
            pipeline.extract(torch.rand(2, 3, 80, 80)), pipeline.recommended(steps=2), pipeline.noise([0, 1])
        )
        assert drawn.shape == (2, 3, 32, 32) and drawn.std() > 0.01


def test_the_latents_that_the_base_model_learns_are_standardised(made, data):
    out, *_ = made
    base = load_base(out / "base", "a photograph")
    photographs = read_photographs([str(data)], 64)
    torch.manual_seed(1)
    z = base.encode(torch.nn.functional.interpolate(photographs.random(500), (32, 32), mode="bilinear", antialias=True))
    assert z.mean().abs() < 0.1 and abs(z.std() - 1) < 0.1  # of other crops than those it was fitted to
    assert base.vae.decoder[-2].weight.abs().max() > 0  # it starts at zero: the decoder has learned


def test_pictures_that_are_kept_back_are_in_no_stage(made):
    """They are white: what the autoencoder encodes is what the stages learn from, and its panel alone shows it white
    ones."""
    _, encoded, white, _ = made
    assert white == make_photo.SHOWN and encoded > 3000 + SEEN["decoder"] + SEEN["base"] + COUNT - 9


def test_each_model_starts_from_the_one_before(made):
    assert made[3] == MODELS[:2]


# --- going on ---


def test_the_same_command_again_trains_nothing(made, copy, make):
    before = {file.name: file.read_bytes() for file in (copy / "work").glob("*.pt")}
    (copy / "work" / "panel_base.png").unlink()
    make(copy)
    assert {file.name: file.read_bytes() for file in (copy / "work").glob("*.pt")} == before
    assert_same(copy, made[0])
    assert (copy / "work" / "panel_base.png").exists()


def dies(patch, name, count, before=False):
    """Every step is followed by a checkpoint; the process ends after, or before, number `count` of the stage."""
    real, saves = loop.save_checkpoint, []

    def save(file, *state):
        saves.extend([file] if file.stem == name else [])
        if len(saves) == count and before:
            raise Stopped
        real(file, *state)
        if len(saves) == count:
            raise Stopped

    patch.setattr(loop, "CHECKPOINT_SECONDS", -1)
    patch.setattr(loop, "save_checkpoint", save)


def test_a_world_that_was_stopped_at_any_moment_ends_as_one_never_stopped(made, make, tmp_path):
    out = tmp_path / "world"
    last = SEEN["small_last"] // 16
    for name, count, before in (
        ("decoder", 2, True),
        ("base", 5, False),
        ("small_layer2", 3, True),
        ("small_last", last, False),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            dies(patch, name, count, before)
            make(out)
    assert images_seen(out) == {name: SEEN[name] for name in list(SEEN)[:4]}
    make(out)
    assert images_seen(out) == SEEN
    assert_same(out, made[0])
    for depth in DEPTHS:
        assert np.array_equal(*(Image.open(folder / "work" / f"panel_{depth}.png") for folder in (out, made[0])))


def test_a_stage_alone_and_more_of_it(made, make, copy):
    """--images is then the stage's own; a larger number goes on, and the other stages stay as they are."""
    make(copy, "--stage", "base", length=("--images", "480"))
    assert images_seen(copy) == SEEN | {"base": 480}
    before, after = weights_of(made[0]), weights_of(copy)
    changed = [f for f in after if not all(torch.equal(after[f][k], before[f][k]) for k in after[f])]
    assert changed == ["base/unet/diffusion_pytorch_model.safetensors"]


def test_further_training_starts_from_what_is_there(made, make, copy):
    """Without checkpoints, as whoever has the published files: the images seen before count, also after a stop."""
    shutil.rmtree(copy / "work")
    before = weights_of(copy)
    for length in (32, 48):
        make(copy, "--stage", "last", "--further", "--lr", "1e-9", length=("--images", str(length)))
        assert read_info(copy / "small_last.safetensors").images_seen == SEEN["small_last"] + length
    for name, value in weights_of(copy)[
        "small_last.safetensors"
    ].items():  # a rate of nearly 0, and rounded to 8 bits again
        assert torch.allclose(value, before["small_last.safetensors"][name], atol=1e-3), name
    make(copy, "--stage", "base", "--further", "--lr", "1e-9", length=("--images", "32"))
    unet = "base/unet/diffusion_pytorch_model.safetensors"
    assert all(torch.allclose(value, before[unet][name], atol=1e-3) for name, value in weights_of(copy)[unet].items())


def test_a_stage_waits_for_those_before_it(make, tmp_path):
    says("no autoencoder yet; run the stage autoencoder first", lambda: make(tmp_path, "--stage", "base"))
    says("no base model yet; run the stages autoencoder and base first", lambda: make(tmp_path, "--stage", "last"))
    make(tmp_path, "--stage", "autoencoder", length=("--images", "32"))
    assert images_seen(tmp_path) == {"decoder": 32} and (tmp_path / "work" / "panel_autoencoder.png").exists()
    says(
        "no base model yet", lambda: make(tmp_path, "--stage", "last", length=("--images", "32"))
    )  # one at random weights is none
    make(tmp_path, "--stage", "base", length=("--images", "32"))
    make(tmp_path, "--stage", "last", length=("--images", "32"))
    assert images_seen(tmp_path) == {"decoder": 32, "base": 32, "small_last": 32}


def test_minutes_of_a_stage_end(make, copy, monkeypatch):
    """A clock that gives each step a second: the last model has .5 / 3 of the minutes."""
    clock = iter(range(100_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    (copy / "work" / "small_pooled.pt").unlink()
    make(copy, "--stage", "pooled", length=("--minutes", "0.5"))
    state = torch.load(copy / "work" / "small_pooled.pt", weights_only=True)
    assert 0 < state["seen"] <= 30 * 16 and state["spent"] >= 30
    assert read_info(copy / "small_pooled.safetensors").images_seen == state["seen"]


def test_other_sizes_in_the_same_folder_are_refused(copy, make):
    before = weights_of(copy)
    for changes in (("--latents", "16"), ("--widths", "32", "96"), ("--patch", "4"), ("--side", "64")):
        with pytest.raises(FeatInvError, match=r"(--work|--out)") as error:
            make(copy, *changes)
        assert "\n" not in str(error.value)
    after = weights_of(copy)
    assert all(torch.equal(after[f][k], before[f][k]) for f in before for k in before[f])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(copy, make, capsys, monkeypatch):
    """The kernel's own refusal, while torch writes the checkpoint; with room made, the same command goes on."""
    file = copy / "work" / "base.pt"
    before, part = file.read_bytes(), Path(f"{file}.part")
    part.symlink_to("/dev/full")
    again = partial(make, copy, "--stage", "base", length=("--images", "480"))
    with pytest.raises(SystemExit) as end:
        cli.run(again)
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in line and line.endswith("and give the same command again")
    assert file.read_bytes() == before and not file.is_symlink()
    part.unlink(missing_ok=True)
    again()
    assert images_seen(copy)["base"] == 480 and os.listdir(copy / "work") and not part.exists()
