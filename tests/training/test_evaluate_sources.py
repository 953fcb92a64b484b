"""Which images an evaluation takes, in which order, and what it says of those that it cannot use."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from training.evaluation.sources import class_folder, open_source, read

TENCH, SHARK, FOREIGN = "n01440764", "n01484850", "n99999999"


@pytest.fixture
def folder(tmp_path):
    """ImageNet's layout: three pictures of two classes, two of a synset that ImageNet does not have."""
    root = tmp_path / "val"
    for seed, (synset, count) in enumerate(((SHARK, 3), (TENCH, 3), (FOREIGN, 2))):
        (root / synset).mkdir(parents=True)
        for k in range(count):
            pixels = np.random.default_rng((seed, k)).integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / synset / f"{k}.png")
    return root


def test_as_many_of_each_class_in_the_order_of_classes_and_names(folder):
    source = open_source(str(folder), per_class=2)
    assert source.names == [f"{c}/{k}.png" for c in (TENCH, SHARK, FOREIGN) for k in range(2)]
    assert source.classes == [c for c in (TENCH, SHARK, FOREIGN) for _ in range(2)]
    assert source.labels[TENCH].startswith("tench") and FOREIGN not in source.labels
    assert "no synsets of ImageNet-1k" in source.notes[0] and FOREIGN in source.notes[0]
    with pytest.raises(FeatInvError, match=f"fewer in {FOREIGN} \\(2\\)"):
        open_source(str(folder), per_class=3)


def test_a_count_is_spread_over_all_names(folder):
    assert len(open_source(str(folder)).names) == 8
    assert open_source(str(folder), 4).names == [
        f"{TENCH}/0.png",
        f"{TENCH}/2.png",
        f"{SHARK}/1.png",
        f"{FOREIGN}/0.png",
    ]
    with pytest.raises(FeatInvError, match="holds 8 images; asked for 9"):
        open_source(str(folder), 9)


def test_plain_and_empty_folders(folder, tmp_path):
    plain = open_source(str(folder / TENCH))
    assert plain.classes == [None] * 3 and not plain.labels and not plain.notes
    with pytest.raises(FeatInvError, match="no class folders"):
        open_source(str(folder / TENCH), per_class=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FeatInvError, match="no images"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(FeatInvError, match="no class folders"):
        open_source("drawn", per_class=1)


def test_shards_hold_what_the_folder_holds(folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "000.tar", "w") as opened:
        for file in sorted(folder.rglob("*.png")):
            opened.add(file, f"{file.parent.name}_{file.name}")  # as training shards of ImageNet name their members
    expected, one = open_source(str(folder)), open_source(str(shards / "000.tar"))
    assert one.classes == expected.classes and one.labels == expected.labels
    for a, b in zip(read(expected, range(8))[0].pictures, read(open_source(str(shards)), range(8))[0].pictures):
        assert torch.equal(a, b)
    assert class_folder("000.tar/x.png", True) is None and class_folder("dogs/x.png", False) == "dogs"


def test_classes_are_in_their_order_whatever_the_shards(folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard, synset in (("000", SHARK), ("001", TENCH)):
        with tarfile.open(shards / f"{shard}.tar", "w") as opened:
            opened.add(folder / synset, synset)
    assert open_source(str(shards), per_class=1).names == [f"001.tar/{TENCH}/0.png", f"000.tar/{SHARK}/0.png"]


def test_pictures_that_cannot_be_read_are_left_out_and_named(folder):
    (folder / TENCH / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 4)).save(folder / TENCH / "2.png")
    originals, failed = read(open_source(str(folder)), range(8))
    assert originals.numbers == [0, 3, 4, 5, 6, 7] and originals.classes[0] == TENCH
    assert set(failed) == {f"{TENCH}/1.png", f"{TENCH}/2.png"} and "4 x 4 pixels" in failed[f"{TENCH}/2.png"]


def test_scenes_are_the_embedded_worlds_held_out_ones():
    source = open_source("drawn", 6)
    originals, failed = read(source, [1, 5])
    assert (
        not failed
        and originals.numbers == [1, 5]
        and originals.pictures[0].shape == (3, 64, 64)
        and len(source.names) == 6
    )


def test_a_data_sets_labels_are_its_classes(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[SHARK, TENCH, "dogs"])}
    )
    pictures, labels = (
        [str(folder / synset / f"{k}.png") for synset in (SHARK, TENCH) for k in range(3)],
        [0, 0, 0, 1, 1, 2],
    )
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).save_to_disk(
        str(tmp_path / "set")
    )
    source = open_source(f"hf:{tmp_path / 'set'}", per_class=1)
    assert source.classes == ["dogs", TENCH, SHARK]
    assert source.labels[TENCH].startswith("tench") and "dogs" not in source.labels
    assert [name[-3:] for name in source.names] == ["[5]", "[3]", "[0]"]
    assert open_source(f"hf:{tmp_path / 'set'}", 3).classes == [SHARK, SHARK, TENCH]
