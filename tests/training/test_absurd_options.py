"""Numbers that no program can use are refused by name, before anything is read or written."""

import argparse
import tarfile

import pytest
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import find_images
from training import discover_concepts, fit_linear_map, fit_scope, make_world, rank_backbones, visualize_concepts
from training.cli import require_positive

OUT = ["--out", "out/file.safetensors"]
MODEL = ["--model", "tiny_cnn_last", "--data", "drawn"]
PHOTO = ["photo", "--data", "pictures"]


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (discover_concepts, ["--count", "0", *OUT], "--count 0: expected at least 1"),
        (discover_concepts, ["--seed", "-1", *OUT], "--seed -1: expected 0 to 4294967295"),
        (discover_concepts, ["--seed", "99999999999", *OUT], "--seed 99999999999: expected"),
        (discover_concepts, ["--device", "nonsense", *OUT], "--device nonsense"),
        (fit_scope, [*MODEL, "--count", "0", "--drawn", "0"], "--count 0: expected at least 1"),
        (fit_scope, [*MODEL, "--centres", "-5"], "--centres -5: expected at least 1"),
        (fit_linear_map, ["--change", "hue:120", "--count", "0", *OUT], "--count 0: expected at least 1"),
        (fit_linear_map, ["--change", "hue:120", "--drawn", "0", *OUT], "--drawn 0: expected at least 1"),
        (rank_backbones, ["--held-out-count", "0", "--out", "out"], "--held-out-count 0: expected at least 1"),
        (make_world, [*PHOTO, "--minutes", "nan"], "--minutes nan: expected a finite number above 0"),
        (make_world, [*PHOTO, "--minutes", "0"], "--minutes 0.0: expected a finite number above 0"),
        (make_world, [*PHOTO, "--minutes", "1", "--batch", "-1"], "--batch -1: expected at least 1"),
        (make_world, [*PHOTO, "--minutes", "1", "--views", "-1"], "--views -1: expected at least 0"),
        (make_world, [*PHOTO, "--minutes", "1", "--lr", "nan"], "--lr nan: expected a finite"),
        (make_world, ["decoder", "--data", "drawn", "--minutes", "nan"], "--minutes nan: expected a finite"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(tmp_path, monkeypatch, program, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FeatInvError, match=f"^{message}"):
        program.main(options)
    assert not list(tmp_path.iterdir())


def test_a_factor_that_is_not_finite_is_named(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = ["--image", str(tmp_path / "a.png"), "--names", "object", "--factor", "nan", "--out", str(tmp_path)]
    with pytest.raises(FeatInvError, match="^factor nan: expected a finite number"):
        visualize_concepts.main(options)


def test_what_is_not_given_is_left_out():
    require_positive(argparse.Namespace(count=None, batch=1, minutes=0.5), "count", "batch", "minutes", "views")


def test_a_folder_of_tar_files_is_no_folder_of_pictures(tmp_path):
    with tarfile.open(tmp_path / "part.tar", "w"):
        pass
    with pytest.raises(FeatInvError, match="no images .*; unpack its tar files, such as part.tar"):
        find_images(tmp_path)
