"""Features that make_world.py keeps of a stage are those of the photographs, however often it was stopped."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from small_world import COUNT, DEPTHS, Stopped, maker, write_network, write_photographs

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import open_backbone
from training.models.base_model import load_base
from training.worlds import inversion
from training.worlds.inversion import StageCache
from training.worlds.photographs import read_photographs


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
def base(make, tmp_path_factory):
    """A base model of a few steps, which is enough to encode."""
    out = tmp_path_factory.mktemp("world")
    for stage in ("autoencoder", "base"):
        make(out, "--stage", stage, length=("--images", "32"))
    return load_base(out / "base", "a photograph")


@pytest.fixture
def keep(base, data, network):
    """(folder, views) -> the kept features of the world's own base model."""
    backbone, photographs = open_backbone(str(network)), read_photographs([str(data)], 64)
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


def test_kept_features_do_not_depend_on_being_interrupted(keep, tmp_path, monkeypatch):
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


def test_kept_features_are_of_these_photographs(keep, base, data, network, tmp_path):
    """As many others, mirrored: their features are not those that are there."""
    before = rows_of(keep(tmp_path))
    backbone, photographs = open_backbone(str(network)), read_photographs([str(data)], 64)
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
