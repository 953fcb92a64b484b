"""Folders, tar shards and Hugging Face sets give the same pictures at the same indices."""

import json
import sys
import tarfile
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_nodes.core.feature_map import FeatInvError
from tests.training.test_never_loses_work import photographs as photographs
from training.data.listing import Folder, Part, TarShards, fingerprint, open_listing
from training.data.loader import Photographs, loader


@pytest.fixture
def shards(photographs, tmp_path):
    """The photographs in two tar files, with labels between them, as webdataset packs them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pictures = sorted(photographs.iterdir())
    (photographs / "label.cls").write_text("3")
    for number, part in enumerate((pictures[:7], pictures[7:])):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as opened:
            for file in part:
                opened.add(file, f"./{file.name}")
                opened.add(photographs / "label.cls", f"./{file.stem}.cls")
    return folder


def batch(listing):
    return next(loader(Photographs(listing, {"pictures": 16}, "both", 0), 0, 12, 0, 1, 0)).tensors["pictures"]


def test_tar_shards_hold_the_folders_pictures(photographs, shards, monkeypatch):
    expected = batch(Folder(photographs))
    assert torch.equal(batch(open_listing(str(shards), None)), expected)
    index = shards / "000000.tar.index.json"
    assert len(json.loads(index.read_text())["pictures"]) == 7
    monkeypatch.setattr("training.data.listing.tarfile.open", None)  # the second time no shard is walked
    assert torch.equal(batch(open_listing(str(shards), None)), expected)
    monkeypatch.undo()
    index.write_text("{")  # cut off
    assert len(TarShards(sorted(shards.glob("*.tar"))).names) == 12
    (shards / "000002.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(FeatInvError, match="000002.tar is not a plain tar file"):
        open_listing(str(shards), None)


def test_two_processes_read_each_picture_once(shards):
    listing, opened = open_listing(str(shards), None), []
    real = listing.open
    listing.open = lambda index: opened.append(index) or real(index)
    own = [loader(Photographs(listing, {"pictures": 16}, "none", 0), 0, 2, rank, 2, 0) for rank in range(2)]
    for _ in range(3):  # an epoch: twelve pictures, two at a time, on two processes
        for part in own:
            next(part)
    assert sorted(opened) == list(range(12))


def test_workers_give_the_same_pictures(photographs):
    one, two = (
        loader(Photographs(Folder(photographs), {"pictures": 16}, "both", 0), 4, 5, 0, 1, workers) for workers in (0, 2)
    )
    for _ in range(3):
        assert torch.equal(next(one).tensors["pictures"], next(two).tensors["pictures"])


def test_hugging_face_sets_are_read_by_place(photographs, monkeypatch, tmp_path):
    """With the library's interface in place of the library."""
    with pytest.raises(FeatInvError, match="pip install datasets"):
        monkeypatch.setitem(sys.modules, "datasets", None)
        open_listing("hf:somebody/pictures", None)

    class ImageColumn:
        pass

    class Label:
        names = ["cat", "dog"]

    class Rows(list):
        features = {"label": Label(), "image": ImageColumn()}

        def __getitem__(self, key):
            return [0, 1, -1] * (len(self) // 3) if key == "label" else super().__getitem__(key)

        def select_columns(self, names):
            assert names == ["image"]
            return self

    asked = []
    library = ModuleType("datasets")
    library.Image, library.ClassLabel, library.DatasetDict = ImageColumn, Label, dict
    rows = Rows({"image": Image.open(f)} for f in sorted(photographs.iterdir()))
    library.load_dataset = lambda name, split, streaming: asked.append((name, split)) or rows
    library.load_from_disk = lambda name: {"train": rows}
    monkeypatch.setitem(sys.modules, "datasets", library)
    expected = batch(Folder(photographs))
    assert torch.equal(batch(open_listing("hf:somebody/pictures:validation", None)), expected)
    assert asked == [("somebody/pictures", "validation")]
    assert open_listing("hf:somebody/pictures", None).classes[:4] == ["cat", "dog", None, "cat"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    rows = Rows({"image": Image.open(f)} for f in sorted(photographs.iterdir()))
    assert len(open_listing(f"hf:{tmp_path / 'set'}", None).names) == 12
    rows.features = {"text": SimpleNamespace()}
    with pytest.raises(FeatInvError, match="no column of pictures; it has text"):
        open_listing("hf:somebody/texts", None)


def test_some_pictures_are_spread_over_all(photographs):
    whole = Folder(photographs)
    some = Part(whole, 5)
    assert some.names == ["00.png", "02.png", "04.png", "07.png", "09.png"]
    assert np.array_equal(np.asarray(some.open(3)), np.asarray(whole.open(7)))
    assert fingerprint(some.names) != fingerprint(whole.names)
    with pytest.raises(FeatInvError, match="expected 1 to 12"):
        open_listing(str(photographs), 13)


def test_a_view_is_the_same_in_every_epoch_that_shows_it(photographs):
    source = Photographs(Folder(photographs), {"pictures": 16}, "both", 0, views=2)
    epochs = [
        {source.entry(n): source.__getitems__([n]).tensors["pictures"] for n in range(12 * e, 12 * e + 12)}
        for e in range(3)
    ]
    assert epochs[0].keys() == epochs[2].keys() and not epochs[0].keys() & epochs[1].keys()
    assert all(torch.equal(epochs[0][k], epochs[2][k]) for k in epochs[0])
    assert [source.entry(n) for n in range(12)] != [source.entry(n) for n in range(24, 36)]  # in another order
