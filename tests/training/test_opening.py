"""What a run says before it begins, and `train.py --check`: images, models, precision, memory, disk and time."""

import re
import sys
import tarfile

import pytest
import torch
import yaml
from killed import SMALL
from test_never_loses_work import photographs as photographs

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training import cli
from training import train as program
from training.config import DEFAULT, read_config
from training.loop import memory, setup, training
from training.loop.opening import duration, tried
from training.loop.setup import with_precision
from training.loop.training import check, train
from training.models.base_model import load_base

CPU = torch.device("cpu")
TOPICS = ["precision", "images", "base model", "scheduler", "backbone", "memory", "disk", "time"]


def config(**changes):
    return read_config(DEFAULT, SMALL | {"max_images": "8", "save_every": "1000"} | changes)


def below(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def topics(said):
    return [line.partition(":")[0] for line in said.splitlines() if line.partition(":")[0] in TOPICS]


def test_a_check_says_what_a_run_says_and_writes_nothing(photographs, tmp_path, monkeypatch, capsys):
    with tarfile.open(photographs / "more.tar", "w") as opened:
        opened.add(photographs / "03.png", "03.png")
    (photographs / "labels.txt").touch()
    before, some = below(tmp_path), config(data=str(photographs))
    check(some, tmp_path / "run")
    checked = capsys.readouterr().out
    assert below(tmp_path) == before
    assert topics(checked) == TOPICS and "checked: nothing was written" in checked
    for expected in (
        "images: 1 in 1 tar file, and 12 in 1 folder; left out: 1 of kind .txt (labels.txt)",
        "velocity prediction over 1000 timesteps",
        "precision: fp32, as asked for, on cpu",
        "the 8 images left",
    ):
        assert expected in checked
    monkeypatch.setattr(training, "EVERY", 2)
    train(some, tmp_path / "run")
    said = capsys.readouterr().out
    assert topics(said) == TOPICS
    assert [line for line in checked.splitlines() if line.startswith(tuple(TOPICS[1:5]))] == [
        line for line in said.splitlines() if line.startswith(tuple(TOPICS[1:5]))
    ]


def test_a_run_that_goes_on_keeps_its_precision_and_says_where_seed_or_pictures_changed(
    photographs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(setup, "computes_in_bf16", lambda device: False)
    train(config(data=str(photographs), precision="auto", max_images="2"), tmp_path)
    assert "precision: fp32, chosen for cpu, which does not compute in bf16" in capsys.readouterr().out
    monkeypatch.setattr(setup, "computes_in_bf16", lambda device: True)
    (photographs / "05.png").write_bytes((photographs / "06.png").read_bytes())
    train(config(data=str(photographs), precision="auto", max_images="4", seed="5"), tmp_path)
    said = capsys.readouterr().out
    assert "precision: fp32, as the run began" in said
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["precision"] == "fp32"
    assert "began with seed 0 and continues with seed 5" in said
    assert "holds other images than before, by their" in said and "contents" in said


@pytest.mark.parametrize(
    "asked, native, began, chosen, said",
    [
        ("auto", True, None, "bf16", "chosen for cpu, which computes in bf16"),
        ("auto", False, None, "fp32", "does not compute in bf16"),
        ("auto", False, "bf16", "bf16", "as the run began.*slow on this device"),
        ("bf16", False, None, "bf16", "as asked for.*slow on this device"),
        ("fp32", True, "bf16", "fp32", "the run began with bf16"),
    ],
)
def test_the_precision_follows_the_device(monkeypatch, asked, native, began, chosen, said):
    monkeypatch.setattr(setup, "computes_in_bf16", lambda device: native)
    settled, line = with_precision(config(precision=asked), CPU, began)
    assert settled.precision == chosen and line.startswith(f"precision: {chosen}, ")
    assert re.search(said, line)


def test_the_default_precision_is_that_of_the_device(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbackbone: tiny-cnn\nbase: tiny\ndata: drawn\nprompt: a\nmax_images: 8\n"
    )
    assert read_config(tmp_path / "mine.yaml").precision == "auto" and read_config(DEFAULT).precision == "bf16"


def test_a_base_model_whose_scheduler_is_wrong_is_found_out():
    base, backbone = load_base("tiny", "a drawing of the small world"), open_backbone("tiny-cnn")
    some = config()
    batch = {"pictures": draw(0, torch.arange(4)).image}
    _, scheduler, _ = tried(base, backbone, batch, some)
    assert "fits" not in scheduler
    base.scheduler.register_to_config(prediction_type="epsilon")
    assert "noise prediction" in (said := tried(base, backbone, batch, some)[1])
    assert "what it predicts fits velocity prediction better" in said
    base.scheduler.alphas_cumprod = base.scheduler.alphas_cumprod.flip(0)
    with pytest.raises(FeatInvError, match="alphas_cumprod from"):
        tried(base, backbone, batch, some)


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (str(limit), str(tmp_path / "none")))
    for text in ("", "max\n"):
        limit.write_text(text)
        assert 1e-6 < memory.available(CPU) < float("inf")
    limit.write_text("1000\n")
    assert memory.available(CPU) == 1e-6


def test_a_time_is_said_in_units_that_fit():
    assert [duration(n, 10) for n in (300, 6000, 100_000)] == ["30 s", "10 min", "2 h 47 min"]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--trackers [wandb]", "tracker 'wandb' is not installed: pip install wandb"),
        ("--trackers [1]", "trackers: 1 is no name"),
        ("--data hf:", "names no data set"),
        ("--data stream:", "names no data set"),
        ("--seed -1", "seed -1: expected 0 to"),
        ("--seed 4294967296", "seed 4294967296: expected 0 to"),
        ("--name a/b", "name 'a/b': expected a file's name"),
        ("--config OUT/round.yaml", "extends itself"),
        ("--config OUT/keys.yaml", "unknown fields"),
        ("--output OUT/damaged", "config.yaml is damaged"),
    ],
)
def test_bad_options_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, options, message):
    pytest.importorskip("datasets")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("a: [")
    (tmp_path / "round.yaml").write_text("extends: round.yaml\n")
    (tmp_path / "keys.yaml").write_text("1: 2\nnothing: 3\n")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *options.replace("OUT", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as ended:
        cli.run(program.main)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and message in said[-1] and said[-1].startswith("train.py: ")
    assert not any("Traceback" in line for line in said)
