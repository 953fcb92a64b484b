"""Folders, tar shards and Hugging Face sets give the same images at the same indices."""

import json
import os
import random
import re
import sys
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_never_loses_work import photographs as photographs

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import as_seen, find_images
from featinv_nodes.core.picture_files import without_decoder
from training.data.batch import Unreadable, crops
from training.data.identity import fingerprint, identity, what_changed
from training.data.listing import Folder, Part, open_listing
from training.data.loader import Photographs, loader
from training.data.shards import TarShards
from training.data.stream import Stream


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
    monkeypatch.setattr("training.data.shards.tarfile.open", None)  # the second time no shard is walked
    assert torch.equal(batch(open_listing(str(shards), None)), expected)
    monkeypatch.undo()
    index.write_text("{")  # cut off
    assert len(TarShards(sorted(shards.glob("*.tar"))).names) == 12
    (shards / "000002.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(FeatInvError, match="000002.tar is not a plain tar file"):
        open_listing(str(shards), None)


def test_odd_entries_of_a_shard_are_named_by_what_they_are(photographs, tmp_path):
    with tarfile.open(tmp_path / "odd.tar", "w") as opened:
        opened.add(sorted(photographs.iterdir())[0], "a.png")
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("folder.png", tarfile.DIRTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            opened.addfile(entry)
        opened.addfile(tarfile.TarInfo("empty.png"))
    shard = TarShards([tmp_path / "odd.tar"])
    assert shard.names == ["odd.tar/a.png", "odd.tar/empty.png"]
    assert shard.describe().endswith("left out: 2 as no plain file within a tar file (odd.tar/device.png)")
    with pytest.raises(Unreadable) as caught:
        crops(lambda: shard.open(1), {"pictures": 8}, "none", random.Random(0))
    assert "no image of a kind that Pillow knows" in str(caught.value) and "0x" not in str(caught.value)


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


def repack(shard, names, folder):
    """Packs files of a folder in this order, with the size and modification time that the shard had."""
    status = shard.stat()
    with tarfile.open(shard, "w") as opened:
        for name in names:
            opened.add(folder / name, name)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard.stat().st_size == status.st_size


def test_a_shard_whose_members_changed_places_is_indexed_anew(tmp_path):
    """Of the same size and modification time: the index beside it would cut every picture in two."""
    for name, side in (("a.bmp", 20), ("b.bmp", 90)):
        Image.new("RGB", (side, side), (side, 0, 0)).save(tmp_path / name)
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    shard.write_bytes(b"")
    with tarfile.open(shard, "w") as opened:
        for name in ("a.bmp", "b.bmp"):
            opened.add(tmp_path / name, name)
    before = open_listing(str(shard.parent), None)
    assert before.open(0).size == (20, 20)
    repack(shard, ["b.bmp", "a.bmp"], tmp_path)
    after = open_listing(str(shard.parent), None)
    assert [after.open(index).size for index in range(2)] == [(90, 90), (20, 20)]
    assert "names" in what_changed(identity(before), identity(after))


def test_links_are_followed_and_loops_are_not(photographs, tmp_path):
    folder = tmp_path / "classes"
    folder.mkdir()
    for name in ("cats", "dogs"):
        (folder / name).symlink_to(photographs, target_is_directory=True)
    (photographs / "back").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    listing = open_listing(str(folder), None)
    assert listing.names == [f"{name}/{i:02d}.png" for name in ("cats", "dogs") for i in range(12)]
    assert listing.open(23).size == (60, 50)
    assert listing.describe() == (
        "24 in 2 folders, 2 reached through a link; left out: 2 as a link back to a folder above (cats/back), 1 as a"
        " link that leads nowhere (gone.png)"
    )
    assert [f.name for f in find_images(folder)] == 2 * [f"{i:02d}.png" for i in range(12)]


def test_pictures_of_all_kinds_are_found_and_others_are_said_to_be_left_out(tmp_path):
    image, kinds = (
        Image.new("RGB", (20, 20), "red"),
        ["avif", "bmp", "jfif", "jpe", "JPEG", "jpg", "png", "tif", "webp"],
    )
    kinds = [kind for kind in kinds if f".{kind}" not in without_decoder()]
    for kind in kinds:
        image.save(tmp_path / f"of.{kind}")
    image.save(tmp_path / "moving.gif")
    (tmp_path / "more.zip").write_bytes(b"")
    (tmp_path / "README").touch()
    (tmp_path / "._of.png").write_bytes(b"Mac OS X")
    listing = open_listing(str(tmp_path), None)
    assert sorted(listing.names) == sorted(f"of.{kind}" for kind in kinds)
    assert all(as_seen(listing.open(index)).size == (20, 20) for index in range(len(kinds)))
    assert listing.describe() == (
        f"{len(kinds)} in 1 folder; left out: 1 of kind .gif (moving.gif), 1 of kind .zip, which has to be unpacked"
        " first (more.zip), 1 without a suffix (README)"
    )
    for name in listing.names:
        (tmp_path / name).unlink()
    with pytest.raises(FeatInvError, match="no images .*left out: 1 of kind .gif"):
        open_listing(str(tmp_path), None)


def test_pictures_beside_and_below_tar_files_count_too(photographs, shards):
    (shards / "more").mkdir()
    (shards / "000001.tar").rename(shards / "more" / "000001.tar")
    (shards / "more" / "loose.png").write_bytes((photographs / "03.png").read_bytes())
    listing = open_listing(str(shards), None)
    assert [Path(name).name for name in listing.names] == [*(f"{i:02d}.png" for i in range(12)), "loose.png"]
    for index, name in enumerate([*range(12), 3]):
        assert np.array_equal(listing.open(index), Image.open(photographs / f"{name:02d}.png"))
    assert listing.describe() == (
        "12 in 2 tar files; left out: 12 of kind .cls (000000.tar/./00.cls), and 1 in 1 folder"
    )


@pytest.fixture
def pack(photographs, tmp_path):
    """Saves a data set of the photographs, under a name, with these columns of pictures."""
    library = pytest.importorskip("datasets")

    def packed(name, *columns, splits=None):
        pictures = [str(f) for f in sorted(photographs.iterdir())]
        kinds = {column: library.Image() for column in columns} | {"label": library.ClassLabel(names=["cat", "dog"])}
        values = dict.fromkeys(columns, pictures) | {"label": [0, 1, -1] * 4}
        made = library.Dataset.from_dict(values, features=library.Features(kinds))
        (library.DatasetDict(dict.fromkeys(splits, made)) if splits else made).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    return packed


def test_hugging_face_sets_are_read_by_place(photographs, pack):
    expected = batch(Folder(photographs))
    for data in (pack("one", "image"), pack("two", "image", "mask") + "::mask", pack("of", "x", splits=["a"]) + ":a"):
        listing = open_listing(data, None)
        assert torch.equal(batch(listing), expected) and listing.classes[:4] == ["cat", "dog", None, "cat"]
        assert listing.encoded(3) == (photographs / "03.png").read_bytes() and listing.stamp(3)[0] == len(
            listing.encoded(3)
        )


def test_what_is_no_hugging_face_set_of_pictures_is_refused_with_the_way_out(pack, monkeypatch, tmp_path):
    two, none, of = pack("two", "image", "mask"), pack("none"), pack("of", "image", splits=["validation"])
    for data, message in {
        "hf:": "names no data set: expected hf:NAME",
        "hf::train": "names no data set",
        "hf:a:b:c:d": "names no data set",
        two: f"2 columns of images, image, mask: say which, such as {two}:train:image",
        f"{two}::depth": "no column of images 'depth'; it has image, mask",
        f"{two}:test": "holds the split train alone",
        none: "no column of images; it has label",
        of: f"has no split 'train'; it has validation: write {of}:validation",
    }.items():
        with pytest.raises(FeatInvError, match=re.escape(message)):
            open_listing(data, None)
    with pytest.raises(FeatInvError, match="stream: names no data set|'stream:' names no data set"):
        Stream("stream:", {}, "none", 0)
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=RuntimeError("scripts are\nnot run")))
    with pytest.raises(FeatInvError, match="cannot be opened: scripts are not run"):
        open_listing("hf:somebody/pictures", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FeatInvError, match="pip install datasets"):
        open_listing("hf:somebody/pictures", None)


def test_pictures_that_changed_under_their_names_are_told_apart(photographs, pack):
    first, saved = identity(Folder(photographs)), identity(open_listing(pack("set", "image"), None))
    assert what_changed(first, identity(Folder(photographs))) == ""
    file = photographs / "05.png"
    content, status = file.read_bytes(), file.stat()
    os.utime(file, ns=(0, status.st_mtime_ns + 1))
    assert what_changed(first, identity(Folder(photographs))).startswith("modification times: where the images were")
    file.write_bytes(content[:-20] + b"x" * 20)
    os.utime(file, ns=(0, status.st_mtime_ns))
    assert what_changed(first, identity(Folder(photographs))) == "contents"
    Image.new("RGB", (60, 50)).save(file)
    assert what_changed(first, identity(Folder(photographs))) == "sizes, modification times, contents"
    again = identity(open_listing(pack("set", "image"), None))
    assert what_changed(saved, again) == "sizes, modification times, contents"


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
