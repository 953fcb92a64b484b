"""A data set that is streamed is read once an epoch, by whoever reads it, and a run goes on in it exactly."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from killed import SMALL
from PIL import Image

from featinv_nodes.core.errors import FeatInvError
from training.config import DEFAULT, read_config
from training.data import stream
from training.data.listing import open_listing
from training.data.loader import loader
from training.experiments.kill_test import differences
from training.loop.panel import held_out
from training.loop.training import train

datasets = pytest.importorskip("datasets")
FILES, ROWS = 4, 5


def pack(folder, files=FILES, spoilt=()):
    """`files` parquet files of five pictures, number n of one colour, red n; the spoilt ones are no pictures."""
    folder.mkdir()
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    for file in range(files):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        pictures = [Image.fromarray(np.full((40, 50, 3), (n, 90, 90), np.uint8)) for n in numbers]
        encoded = [
            {"bytes": b"no picture", "path": None} if n in spoilt else picture for n, picture in zip(numbers, pictures)
        ]
        datasets.Dataset.from_dict({"label": list(numbers), "image": encoded}, features=features).to_parquet(
            folder / f"{file}.parquet"
        )
    return f"stream:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("stream") / "set")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 3)  # a file's five rows do not divide by it


def reading(data, batch=2, rank=0, processes=1, workers=0, state=None):
    return loader(stream.Stream(data, {"pictures": 8}, "both", 0), 0, batch, rank, processes, workers, state=state)


def numbers(batches, count):
    """Which pictures the next `count` batches hold."""
    return [
        round(x.item() * 255) for batch in islice(batches, count) for x in batch.tensors["pictures"].mean((2, 3))[:, 0]
    ]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_every_picture_is_read_once_an_epoch_by_one_reader(data, processes, workers):
    each = FILES * ROWS // processes
    readers = [reading(data, 1, rank, processes, workers) for rank in range(processes)]
    first, second = ([numbers(r, each) for r in readers] for _ in range(2))
    for epoch in (first, second):
        assert Counter(n for own in epoch for n in own) == Counter(range(FILES * ROWS))
    for a, b in zip(first, second):
        assert set(a) == set(b) and a != b  # a reader keeps its files, and takes them in another order
    assert first[0] != sorted(first[0])


@pytest.mark.parametrize("workers", [0, 3])
def test_it_goes_on_exactly_from_any_batch(data, workers):
    whole = [batch.tensors["pictures"] for batch in islice(reading(data, workers=workers), 25)]  # more than two epochs
    for stop in (1, 5, 20):
        before = reading(data, workers=workers)
        for _ in range(stop):
            next(before)
        for in_hand, used in ((True, stop - 1), (False, stop)):  # the last batch is still to be used, or was
            after = reading(data, workers=workers, state=before.state(in_hand))
            for expected, result in zip(whole[used:], islice(after, 25 - used)):
                assert torch.equal(expected, result.tensors["pictures"])


def test_a_run_that_was_stopped_ends_as_one_that_was_not(data, tmp_path):
    def run(folder, images):
        train(read_config(DEFAULT, SMALL | {"data": data, "workers": "2", "max_images": images}), tmp_path / folder)

    run("straight", "50")
    for images in ("6", "31", "50"):
        run("stopped", images)
    assert set(differences(tmp_path / "straight", tmp_path / "stopped")) <= {
        "stats.jsonl"
    }  # each end has a line of its own
    logs = [
        [json.loads(line) for line in (tmp_path / name / "stats.jsonl").read_text().splitlines()]
        for name in ("straight", "stopped")
    ]
    assert [(line["images"], line["loss"]) for line in logs[0]] == [
        (line["images"], line["loss"]) for line in logs[1] if line["images"] not in (6, 32)
    ]


def test_other_readers_begin_anew_and_say_so(data, capsys):
    state = reading(data, workers=2).state(False)
    expected = numbers(reading(data), 4)
    assert numbers(reading(data, state=state), 4) == expected
    assert (
        "was read by 2 readers, 2 each process, and now by 1: it starts from its beginning" in capsys.readouterr().out
    )


def test_what_cannot_be_read_is_replaced_and_named(tmp_path, monkeypatch):
    spoilt = pack(tmp_path / "some", 2, spoilt=(3, 6))
    batches = list(islice(reading(spoilt), 4))
    assert sorted(numbers(batches, 4)) == [n for n in range(10) if n not in (3, 6)]
    assert sorted(name for batch in batches for name, _ in batch.skipped) == [
        f"{spoilt}, file 0, row 3",
        f"{spoilt}, file 1, row 1",
    ]
    monkeypatch.setattr(stream, "TRIES", 8)
    with pytest.raises(FeatInvError, match="8 images in a row could not be read, stream:.*UnidentifiedImageError"):
        next(reading(pack(tmp_path / "none", 1, spoilt=range(5))))


def test_what_cannot_be_streamed_is_explained(data, tmp_path):
    with pytest.raises(
        FeatInvError, match="has 4 files, of which each of 6 readers .2 processes with 3 workers. needs one of its own"
    ):
        reading(data, processes=2, workers=3)
    with pytest.raises(FeatInvError, match="cannot be opened"):
        stream.Stream(f"stream:{tmp_path / 'nowhere'}", {}, "none", 0)
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(saved)
    with pytest.raises(
        FeatInvError,
        match=f"^data stream:{saved} was saved by save_to_disk and is on this computer already: write hf:{saved}$",
    ):
        stream.Stream(f"stream:{saved}", {}, "none", 0)
    (tmp_path / "texts").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "texts" / "0.parquet")
    with pytest.raises(FeatInvError, match="no column of images; it has text"):
        stream.Stream(f"stream:{tmp_path / 'texts'}", {}, "none", 0)
    with pytest.raises(FeatInvError, match="cannot be counted or cached; leave out --cache, --views and --images"):
        read_config(DEFAULT, {"data": data, "images": "8"})
    with pytest.raises(FeatInvError, match="can be trained on, not evaluated"):
        open_listing(data, None)


def test_a_panel_shows_its_first_pictures(data):
    pictures = held_out(read_config(DEFAULT, {"data": data}))
    assert pictures.shape == (8, 3, 512, 512) and [round(x[0].mean().item() * 255) for x in pictures] == list(range(8))
