"""Photographs and arguments that make_world.py takes, and what it says of those that it cannot use."""

import re
import shutil
from argparse import Namespace
from functools import partial

import pytest
import torch
from small_world import COUNT, maker, says, write_network, write_photographs

from training.worlds import make_photo
from training.worlds.photographs import read_photographs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def make(data, network):
    return maker(data, network)


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
    (tmp_path / "notes.txt").write_text("no image")
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
