"""A small world of photographs at random: its images, its network, and the program that makes it."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.files import read_weights
from training import make_world
from training.worlds.loop import read_images_seen

COUNT = 210
DEPTHS = ("layer2", "last", "pooled")


class Stopped(BaseException):
    """The end of a process, as nothing in it can catch it; not KeyboardInterrupt, which would end the tests, too."""


def write_photographs(folder):
    """Random crops of two photographs; those that are to be kept back from training are white, and nothing else is."""
    random = np.random.default_rng(0)
    originals = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    for number in range(COUNT):
        whole, side = originals[number % 2], int(random.integers(80, 200))
        top, left = random.integers(whole.shape[0] - side), random.integers(whole.shape[1] - side)
        picture = Image.fromarray(whole[top : top + side, left : left + side]).resize((80, 72))
        if number % 25 == 0:
            picture.paste((255, 255, 255), (0, 0, 80, 72))
        picture.save(folder / f"{number:03}.png")
    return folder


def write_network(folder):
    """A timm-hub folder of a small network at random weights, which reads 64 pixels."""
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


def maker(data, network):
    """The program: out, changed arguments -> the whole small world, or what the arguments ask for."""
    sizes = ["--side", "32", "--patch", "8", "--latents", "8", "--widths", "32", "64", "--batch", "16"]
    paths = ["--data", str(data), "--backbone", str(network), "--name", "small"]

    def run(out, *more, length=("--images", "960")):
        torch.manual_seed(0)
        settings = ["photo", "--device", "cpu", "--threads", "1", *paths, "--out", str(out)]
        make_world.main([*settings, *length, *sizes, "--depths", *DEPTHS, *more])

    return run


def weights_of(out):
    """Every number of a world's files; not bytes, as safetensors writes metadata in any order."""
    return {file.relative_to(out).as_posix(): read_weights(file) for file in sorted(out.rglob("*.safetensors"))}


def images_seen(out):
    return {file.stem: read_images_seen(out / "work", file.stem) for file in (out / "work").glob("*.pt")}


def says(why, action):
    """The action is refused with one line that matches; the line."""
    with pytest.raises(FeatInvError, match=why) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)
