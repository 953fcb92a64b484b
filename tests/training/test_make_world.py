"""A world is made whole from a folder of photographs, goes on from wherever it was stopped, and says what it cannot
do."""

import json
import os
import re
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.files import is_in_8_bits, read_weights
from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file, open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training import cli, make_world
from training.models.base_model import load_base
from training.models.controlnet import FeatureControlNet
from training.models.pipeline import load_pipeline
from training.worlds import inversion, loop, make_photo
from training.worlds.inversion import StageCache
from training.worlds.loop import images_seen
from training.worlds.photographs import read_photographs

COUNT = 210
DEPTHS = ("layer2", "last", "pooled")
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
    """Random crops of two photographs; those that are to be kept back from training are white, and nothing else is."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    originals = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    for number in range(COUNT):
        whole, side = originals[number % 2], int(random.integers(80, 200))
        top, left = random.integers(whole.shape[0] - side), random.integers(whole.shape[1] - side)
        picture = Image.fromarray(whole[top : top + side, left : left + side]).resize((80, 72))
        if number % 25 == 0:
            picture.paste((255, 255, 255), (0, 0, 80, 72))
        picture.save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A timm-hub folder of a small network at random weights, which reads 64 pixels."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), folder / "model.safetensors")
    known = {
        "tag": "random",
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "num_classes": 10,
    }
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "num_classes": 10, "pretrained_cfg": known})
    )
    return folder


@pytest.fixture(scope="module")
def make(data, network):
    """The program: out, changed arguments -> the whole small world, or what the arguments ask for."""

    def run(out, *more, length=("--images", "960")):
        torch.manual_seed(0)
        small = [
            "--side",
            "32",
            "--patch",
            "8",
            "--latents",
            "8",
            "--widths",
            "32",
            "64",
            "--batch",
            "16",
            "--depths",
            *DEPTHS,
        ]
        make_world.main(
            [
                "photo",
                "--device",
                "cpu",
                "--threads",
                "1",
                "--data",
                str(data),
                "--backbone",
                str(network),
                "--name",
                "small",
                "--out",
                str(out),
                *length,
                *small,
                *more,
            ]
        )

    return run


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


def weights_of(out):
    """Every number of a world's files; not bytes, as safetensors writes metadata in any order."""
    return {file.relative_to(out).as_posix(): read_weights(file) for file in sorted(out.rglob("*.safetensors"))}


def assert_same(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for file in one:
        assert all(torch.equal(value, other[file][name]) for name, value in one[file].items()), file


def seen(out):
    return {file.stem: images_seen(out / "work", file.stem) for file in (out / "work").glob("*.pt")}


# --- a whole world ---


def test_a_whole_world_opens_and_draws(made, network):
    out, *_ = made
    assert seen(out) == SEEN and not list(out.rglob("*.part"))
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


def test_photographs_part_into_training_and_kept_back(data):
    photographs = read_photographs([str(data)], 64)
    assert len(photographs.kept_back) == 9 and len(photographs.pictures) == COUNT - 9
    assert (
        photographs.kept_back.min() == 255
        and (photographs.held_out(8) == 1).all()
        and len(photographs.held_out(99)) == 9
    )
    crops = photographs.random(2000)
    assert crops.shape == (2000, 3, 64, 64) and crops.amin((1, 2, 3)).max() < 0.99


def test_crops_are_parts_of_the_pictures_mirrored_where_asked(data):
    photographs = read_photographs([str(data)], 64)
    rows, top, left = torch.tensor([3, 3, 7]), torch.tensor([0, 1, 3]), torch.tensor([2, 0, 3])
    result = photographs.crops(rows, top, left, torch.tensor([False, True, False]))
    for crop, row, y, x, flip in zip(result, rows, top, left, (False, True, False)):
        expected = photographs.pictures[row, :, y : y + 64, x : x + 64].float() / 255
        assert torch.equal(crop, expected.flip(2) if flip else expected)
    assert photographs.margin == 3


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


class Stopped(BaseException):
    """The end of a process, as nothing in it can catch it; not KeyboardInterrupt, which would end the tests, too."""


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
    assert seen(out) == {name: SEEN[name] for name in list(SEEN)[:4]}
    make(out)
    assert seen(out) == SEEN
    assert_same(out, made[0])
    for depth in DEPTHS:
        assert np.array_equal(*(Image.open(folder / "work" / f"panel_{depth}.png") for folder in (out, made[0])))


def test_a_stage_alone_and_more_of_it(made, make, copy):
    """--images is then the stage's own; a larger number goes on, and the other stages stay as they are."""
    make(copy, "--stage", "base", length=("--images", "480"))
    assert seen(copy) == SEEN | {"base": 480}
    before, after = weights_of(made[0]), weights_of(copy)
    changed = [f for f in after if not all(torch.equal(after[f][k], before[f][k]) for k in after[f])]
    assert changed == ["base/unet/diffusion_pytorch_model.safetensors"]


def test_further_training_starts_from_what_is_there(made, make, copy):
    """Without checkpoints, as whoever has the published files: the images seen before count, also after a stop."""
    shutil.rmtree(copy / "work")
    before = weights_of(copy)
    for length in (32, 48):
        make(copy, "--stage", "last", "--further", "--lr", "0", length=("--images", str(length)))
        assert read_info(copy / "small_last.safetensors").images_seen == SEEN["small_last"] + length
    for name, value in weights_of(copy)["small_last.safetensors"].items():  # a rate of 0, and rounded to 8 bits again
        assert torch.allclose(value, before["small_last.safetensors"][name], atol=1e-3), name
    make(copy, "--stage", "base", "--further", "--lr", "0", length=("--images", "32"))
    unet = "base/unet/diffusion_pytorch_model.safetensors"
    assert all(torch.allclose(value, before[unet][name], atol=1e-3) for name, value in weights_of(copy)[unet].items())


def test_a_stage_waits_for_those_before_it(make, tmp_path):
    says("no autoencoder yet; run the stage autoencoder first", lambda: make(tmp_path, "--stage", "base"))
    says("no base model yet; run the stages autoencoder and base first", lambda: make(tmp_path, "--stage", "last"))
    make(tmp_path, "--stage", "autoencoder", length=("--images", "32"))
    assert seen(tmp_path) == {"decoder": 32} and (tmp_path / "work" / "panel_autoencoder.png").exists()
    says(
        "no base model yet", lambda: make(tmp_path, "--stage", "last", length=("--images", "32"))
    )  # one at random weights is none
    make(tmp_path, "--stage", "base", length=("--images", "32"))
    make(tmp_path, "--stage", "last", length=("--images", "32"))
    assert seen(tmp_path) == {"decoder": 32, "base": 32, "small_last": 32}


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


# --- features that are kept ---


@pytest.fixture
def keep(made, data, network):
    """(folder, views) -> the kept features of the world's own base model."""
    base, backbone, photographs = (
        load_base(made[0] / "base", "a photograph"),
        open_backbone(str(network)),
        read_photographs([str(data)], 64),
    )
    return lambda folder, views=1: StageCache(folder, photographs, base, backbone, list(DEPTHS), views)


def rows_of(kept):
    return {name: np.array(rows) for name, rows in kept.rows.items()}


def stop_at(patch, call):
    """The process ends at that call of the network."""
    real, calls = Backbone.several, []

    def several(self, *args):
        calls.append(args)
        if len(calls) == call:
            raise Stopped
        return real(self, *args)

    patch.setattr(Backbone, "several", several)


def test_kept_features_do_not_depend_on_being_interrupted(keep, made, tmp_path, monkeypatch):
    monkeypatch.setattr(inversion, "PART", 64)
    expected = rows_of(keep(tmp_path / "straight", 2))
    for call in (1, 2, 4):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, call)
            keep(tmp_path / "stopped", 2)
    result = rows_of(keep(tmp_path / "stopped", 2))
    assert expected.keys() == result.keys() == {"latents", "layer2", "last"} and all(
        np.array_equal(result[k], expected[k]) for k in expected
    )
    count = COUNT - 9
    assert len(expected["last"]) == 2 * count and (expected["latents"].std((1, 2, 3)) > 0).all()
    assert not np.array_equal(expected["latents"][:count], expected["latents"][count:])  # two crops, not one twice
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        keep(tmp_path / "stopped", 2)  # whole: the network is not asked again


def test_kept_features_that_are_made_anew_are_not_taken_for_whole_ones(keep, tmp_path):
    """One file is lost, or other views are asked for; and the run that makes them anew is stopped at once."""
    expected = rows_of(keep(tmp_path))

    def interrupted(views):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, 1)
            keep(tmp_path, views)

    (tmp_path / "latents.npy").unlink()
    interrupted(1)
    interrupted(2)
    result = rows_of(keep(tmp_path))
    assert all(np.array_equal(result[k], expected[k]) for k in expected)


def test_kept_features_are_of_these_photographs(keep, made, data, network, tmp_path):
    """As many others, mirrored: their features are not those that are there."""
    before = rows_of(keep(tmp_path))
    base, backbone, photographs = (
        load_base(made[0] / "base", "a photograph"),
        open_backbone(str(network)),
        read_photographs([str(data)], 64),
    )
    photographs.pictures = photographs.pictures.flip(3)
    after = rows_of(StageCache(tmp_path, photographs, base, backbone, list(DEPTHS), 1))
    assert not np.array_equal(before["latents"], after["latents"])


def test_kept_rows_belong_together(keep, tmp_path, network):
    """Latents and features that are drawn are of the same crop, and pooled features are the mean of the last
    layer's."""
    kept = keep(tmp_path)
    drawn = {}
    for depth in DEPTHS:
        torch.manual_seed(3)
        drawn[depth] = kept.draw(depth, "cpu")(32)
    for depth in ("layer2", "last"):
        latents, values = drawn[depth]
        for z, v in zip(latents, values):
            (place,) = [
                k for k in range(len(kept.rows["latents"])) if np.array_equal(kept.rows["latents"][k], z.half())
            ]
            assert np.array_equal(kept.rows[depth][place], v.half())
    assert torch.equal(drawn["pooled"][1], drawn["last"][1].mean((2, 3), keepdim=True))


def test_features_that_do_not_fit_on_the_disk_are_refused(keep, tmp_path, monkeypatch):
    """A mapped file on a full disk ends the process without a word, so that room is asked for before."""
    rows = (COUNT - 9) * (8 * 4 * 4 + 512 * 2 * 2 + 128 * 8 * 8)  # latents, last, layer2
    monkeypatch.setattr(inversion.shutil, "disk_usage", lambda folder: Namespace(free=2 * rows - 1))
    with pytest.raises(FeatInvError, match=rf"{tmp_path} has 0.0 GB left .* --views 0"):
        keep(tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    monkeypatch.setattr(inversion.shutil, "disk_usage", lambda folder: Namespace(free=2 * rows))
    keep(tmp_path)
    monkeypatch.setattr(inversion.shutil, "disk_usage", lambda folder: Namespace(free=0))
    keep(tmp_path)  # what is there needs no more room


# --- what it cannot do ---


def says(why, action):
    with pytest.raises(FeatInvError, match=why) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_arguments_that_cannot_work_are_refused_before_anything_runs(make, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(make_photo, "read_photographs", None)
    says(
        "--stage pancake: expected one of autoencoder, base, layer2, last, pooled",
        lambda: make(out, "--stage", "pancake"),
    )
    says("no layer 'layer9'; choose one of last, .*layer1", lambda: make(out, "--depths", "layer9"))
    says("--patch 6: expected a patch that is a multiple of 4", lambda: make(out, "--patch", "6"))
    says("--side 40 and --patch 8: .*parts the side into a multiple of 2 cells", lambda: make(out, "--side", "40"))
    says("--side 36", lambda: make(out, "--side", "36"))
    for latents in ("193", "0", "-8"):
        says(
            f"--latents {latents}, .*expected at most 192 latents",
            lambda latents=latents: make(out, "--latents", latents),
        )
    for widths in (("48", "64"), ("0", "32"), ("-32",)):
        says("--widths .*multiples of 32", lambda widths=widths: make(out, "--widths", *widths))
    says("--patch 0", lambda: make(out, "--patch", "0"))
    says("timm does not know the architecture 'resnet9'", lambda: make(out, "--backbone", "resnet9"))
    assert not out.exists()


@pytest.mark.parametrize("depths", range(1, 6))
@pytest.mark.parametrize("batch", [None, 16, 50])
def test_too_little_to_learn_from_says_how_much_is_enough(depths, batch):
    """And that much is accepted, by each stage and for each alone."""
    stages = ["autoencoder", "base", *[f"depth{n}" for n in range(depths)]]
    for option, low in (("images", 3), ("minutes", 0.01)):
        for alone in (False, True):
            for stage in stages:
                args = Namespace(
                    images=None, minutes=None, batch=batch, stage=stage if alone else None, depths=stages[2:]
                )
                setattr(args, option, low)
                text = says(
                    rf"^--{option} {low}: stage {stage} would .*; give at least [\d.]+$",
                    partial(make_photo.length, args, stage),
                )
                enough = float(re.search(r"[\d.]+$", text)[0])
                setattr(args, option, int(enough) if option == "images" else enough)
                assert make_photo.length(args, stage)[option] > 0
                setattr(args, option, getattr(args, option) - (2 if option == "images" else 0.2))
                says("give at least", partial(make_photo.length, args, stage))  # and it asks for hardly more than that


def test_too_little_is_refused_by_the_program(make, tmp_path):
    says(
        "--images 100: stage autoencoder would see 10, less than one batch; give at least 160",
        lambda: make(tmp_path, length=("--images", "100")),
    )
    says(
        "--minutes 0.1: stage autoencoder would have 0.6 seconds; give at least 0.9",
        lambda: make(tmp_path, length=("--minutes", "0.1")),
    )
    says("--minutes -5", lambda: make(tmp_path, length=("--minutes", "-5")))
    assert not list(tmp_path.iterdir())


def test_folders_without_enough_photographs_are_refused(data, tmp_path, capsys):
    says("neither .* nor a folder", lambda: read_photographs([str(tmp_path / "none")], 64))
    (tmp_path / "notes.txt").write_text("no picture")
    says(rf"no images \(.*\.jpg.*\) below {tmp_path}", lambda: read_photographs([str(tmp_path)], 64))
    for number in range(5):
        shutil.copy(data / f"{number:03}.png", tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "cut off.png").write_bytes((data / "001.png").read_bytes()[:300])
    says(
        f"{tmp_path}: 5 photographs that can be read; a world needs at least 200, a good one tens of thousands",
        lambda: read_photographs([str(tmp_path)], 64),
    )
    said = capsys.readouterr().out
    assert re.search(
        r"left out 2 that cannot be read: broken.jpg \(UnidentifiedImageError\), cut off.png \(\w+\)\n", said
    )


def test_photographs_that_cannot_be_read_are_left_out_and_the_rest_is_used(data, tmp_path, capsys):
    for number in range(8):
        (tmp_path / f"broken {number}.jpg").write_bytes(b"no picture")
    photographs = read_photographs([str(data), str(tmp_path)], 64)
    assert len(photographs.pictures) + len(photographs.kept_back) == COUNT
    said = capsys.readouterr().out
    assert (
        "left out 8 that cannot be read: broken 0.jpg" in said
        and "broken 4.jpg" in said
        and "broken 5.jpg" not in said
        and "and others" in said
    )
    assert "210 photographs from 2 folders; 9 are kept back from training" in said


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
    assert "No space left on device" in line and line.endswith("make room there, and give the same command again")
    assert file.read_bytes() == before and not file.is_symlink()
    part.unlink(missing_ok=True)
    again()
    assert seen(copy)["base"] == 480 and os.listdir(copy / "work") and not part.exists()


# --- 8 bits ---


def test_an_inversion_model_in_8_bits_draws_the_same_pictures(tmp_path):
    """A trained one: each picture within 1/50 of the whole range of what it is in 16 bits, on average over its
    pixels."""
    pipeline = load_pipeline("tiny_cnn_last")
    features = pipeline.extract(draw(0, torch.arange(4), "held-out").image)
    sampling, start = pipeline.recommended(steps=10, gradient=0.0), pipeline.noise(range(4))
    expected = pipeline.draw(features, sampling, start)
    pipeline.model.save(tmp_path / "small.safetensors", pipeline.info, torch.int8)
    pipeline.model, info = FeatureControlNet.load(tmp_path / "small.safetensors", pipeline.base)
    result = pipeline.draw(features, sampling, start)
    assert (
        info == pipeline.info
        and (tmp_path / "small.safetensors").stat().st_size < 0.6 * model_file("tiny_cnn_last").stat().st_size
    )
    assert 0 < (result - expected).abs().mean((1, 2, 3)).max() < 0.02
    assert (expected[0] - expected[1]).abs().mean() > 0.1  # as far as two pictures are apart
