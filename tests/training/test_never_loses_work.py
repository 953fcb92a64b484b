"""Whatever happens to a run, what it has learned is kept, and it goes on as if nothing had happened."""

import errno
import json
import multiprocessing
import os
import shutil
import signal

import killed
import numpy as np
import pytest
import torch
from PIL import Image
from processes import exit_codes
from safetensors.torch import load_file

from featinv_nodes.core.errors import FeatInvError
from training import checksum
from training.config import DEFAULT, read_config
from training.experiments.kill_test import differences
from training.loop import checkpoints, log
from training.loop import run as running
from training.loop.folder import check_room, only_run_in
from training.loop.training import train


def process(folder, moment=killed.never):
    """A run in its own process; the exit code."""
    (code,) = exit_codes(killed.run, (str(folder), moment))
    return code


def here(folder, **changes):
    return train(read_config(DEFAULT, killed.SMALL | changes), folder)


@pytest.fixture(autouse=True)
def arithmetic_not_counted(monkeypatch):
    """Which takes as long as some steps of these runs, and is tested elsewhere."""
    monkeypatch.setattr(running, "step_gmac", lambda *_: 1.0)


def saved(folder):
    return [int(f.name.split("-")[1]) for f in sorted(folder.glob("checkpoint-*.pt"))]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert process(folder) == 0
    return folder


def test_a_run_killed_at_any_moment_ends_as_one_never_killed(straight, tmp_path):
    folder = tmp_path / "run"
    for moment in killed.MOMENTS:
        assert process(folder, moment) == -signal.SIGKILL, moment.__name__
        # what has a checkpoint's name is one: half of one has another name until it is whole
        assert all(checksum.is_whole(file) for file in folder.glob("checkpoint-*.pt")), moment.__name__
    assert process(folder) == 0
    assert differences(straight, folder) == []
    assert saved(folder) == [42, 48, 50] and not list(folder.glob("*.part"))
    assert [json.loads(line)["images"] for line in (folder / "stats.jsonl").read_text().splitlines()] == [40, 50]


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(straight, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    here(folder, max_images="20")
    *_, before, newest = sorted(folder.glob("checkpoint-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000]):
        newest.write_bytes(damaged)
        assert checkpoints.newest(folder, print) == before
        assert f"{newest} is damaged and passed over" in capsys.readouterr().out
    before.unlink()
    for file in folder.glob("checkpoint-*.pt"):
        file.write_bytes(b"")
    with pytest.raises(FeatInvError, match="no checkpoint in .* is whole"):
        here(folder)
    assert checkpoints.newest(tmp_path, print) is None


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch, capsys):
    real = open

    def full(file, mode="r"):
        return real(
            "/dev/full" if "w" in mode and "000000000012" in str(file) else file, mode
        )  # every write to it fails as on a full disk

    def no_panel(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checksum, "open", full, raising=False)
    monkeypatch.setattr(log, "save_image", no_panel)
    monkeypatch.setattr(running, "open_log", lambda *_: real("/dev/full", "a"))
    here(tmp_path, max_images="18", panel_every="10")
    said = capsys.readouterr().out
    assert "stats.jsonl was not written: [Errno 28]" in said and "panel_000000010.png was not written" in said
    assert os.strerror(errno.ENOSPC) in said and "those before are kept" in said and "the run goes on" in said
    assert saved(tmp_path) == [6, 18] and not list(tmp_path.glob("*.part"))
    assert here(tmp_path / "two", max_images="12").exists()  # what matters most is written all the same
    assert saved(tmp_path / "two") == [6]


class Filling:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    """While it is written, there is nothing that a reader of such files would take for one."""

    def write(opened):
        opened.write(b"half")
        opened.flush()
        assert not list(tmp_path.glob("*.pt"))
        opened.write(b"whole")

    file = checksum.write_checksummed(tmp_path, "checkpoint-000000000002", ".pt", write)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"halfwhole" and checksum.is_whole(file)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_said_to_be_full(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 2, {"seen": 2}, keep=2)
    monkeypatch.setattr(checksum, "open", lambda file, mode: Filling(open(file, mode), 100_000), raising=False)
    with pytest.raises(FeatInvError, match="not written.*No space left on device.*make room"):
        checkpoints.save(tmp_path, 4, {"seen": 4, "weights": torch.zeros(100_000)}, keep=2)
    assert saved(tmp_path) == [2] and not list(tmp_path.glob("*.part"))


def test_a_disk_without_room_for_the_checkpoints_is_told_of_at_the_start(tmp_path):
    said = []
    check_room(tmp_path, 1000, 2, said.append)
    assert not said
    checkpoints.save(tmp_path, 2, {"seen": 2}, keep=2)  # which counts as there already
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free, 2, said.append)
    assert "checkpoints need" in said[0] and "--keep" in said[0]


def test_a_second_run_is_kept_out_of_the_folder_of_the_first(tmp_path):
    with only_run_in(tmp_path):
        (tmp_path / "checkpoint-000000000007.pt.part").touch()
        with pytest.raises(FeatInvError, match="another run is at work in"):
            here(tmp_path)
        assert (tmp_path / "checkpoint-000000000007.pt.part").exists()
    here(tmp_path, max_images="2")
    assert saved(tmp_path) == [2] and not list(tmp_path.glob("*.part"))


def test_a_checkpoint_that_the_disk_did_not_keep_costs_none_of_those_before(tmp_path, monkeypatch):
    for seen in (2, 4):
        checkpoints.save(tmp_path, seen, {"seen": seen}, keep=2)
    monkeypatch.setattr(checksum.os, "fsync", lambda number: os.pwrite(number, b"other", 20))
    with pytest.raises(FeatInvError, match="does not hold what was written.*those before are kept"):
        checkpoints.save(tmp_path, 6, {"seen": 6}, keep=2)
    assert saved(tmp_path) == [2, 4] and not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    checkpoints.save(tmp_path, 6, {"seen": 6}, keep=2)
    assert saved(tmp_path) == [4, 6] and checkpoints.load(checkpoints.newest(tmp_path, print)) == {"seen": 6}


def test_the_log_goes_on_where_the_checkpoint_does(tmp_path):
    file = tmp_path / "stats.jsonl"
    file.write_text("".join(json.dumps({"images": n, "loss": 1.0}) + "\n" for n in (10, 20, 30)) + '{"images": 40, "lo')
    with log.open_log(file, 20) as opened:
        log.write_line(opened, {"images": 30, "loss": 0.5}, print)
    assert [(line["images"], line["loss"]) for line in map(json.loads, file.read_text().splitlines())] == [
        (10, 1.0),
        (20, 1.0),
        (30, 0.5),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(straight, tmp_path, monkeypatch, capsys, number):
    real, calls = running.set_lr, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        real(*args)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(running, "set_lr", interrupted)
    with pytest.raises(SystemExit) as ended:
        here(tmp_path)
    assert ended.value.code == 128 + number and saved(tmp_path) == [6, 8]
    assert "stopped at 8 images" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def test_pictures_that_cannot_be_read_are_replaced_counted_and_named(photographs, tmp_path, capsys):
    good = (photographs / "03.png").read_bytes()
    (photographs / "03.png").write_bytes(good[: len(good) // 2])
    (photographs / "07.png").write_text("no image")
    one = here(tmp_path / "one", data=str(photographs), max_images="24", save_every="8")
    said = capsys.readouterr().out
    assert (
        said.count("03.png cannot be read") == 1
        and "2 images could not be read and were replaced (03.png, 07.png" in said
    )
    assert [line.split("\t")[0] for line in (tmp_path / "one" / "unreadable.txt").read_text().splitlines()] == [
        "03.png",
        "07.png",
    ]
    here(tmp_path / "two", data=str(photographs), max_images="8", save_every="8")
    two = here(tmp_path / "two", data=str(photographs), max_images="24", save_every="8")
    a, b = load_file(one), load_file(two)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for file in photographs.iterdir():
        file.write_text("no image")
    with pytest.raises(FeatInvError, match="100 images in a row could not be read, .*check that --data"):
        here(tmp_path / "three", data=str(photographs))


def poisoned(monkeypatch, call):
    """The loss of one call is NaN."""
    real, calls = running.training_loss, []

    def loss(*args):
        calls.append(0)
        return real(*args) * (float("nan") if len(calls) in call else 1)

    monkeypatch.setattr(running, "training_loss", loss)


def test_a_signal_to_the_whole_group_saves_first(photographs, tmp_path, monkeypatch, capsys):
    """As a terminal's Ctrl-C and a cluster's SIGTERM come: to the workers, too."""
    real, calls = running.set_lr, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 3:
            for number in (signal.SIGINT, signal.SIGTERM):
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, number)
            os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(running, "set_lr", interrupted)
    with pytest.raises(SystemExit) as ended:
        here(tmp_path / "run", data=str(photographs), workers="2", save_every="1000")
    assert ended.value.code == 130 and saved(tmp_path / "run") == [6]
    monkeypatch.undo()
    again = here(tmp_path / "run", data=str(photographs), workers="2", max_images="10")
    straight = here(tmp_path / "straight", data=str(photographs), max_images="10")
    a, b = load_file(again), load_file(straight)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_was_learned_is_saved_where_the_pictures_go_away(photographs, tmp_path, monkeypatch, workers):
    real = running.set_lr

    def vanishing(*args):
        for file in photographs.glob("*.png"):
            file.unlink()
        real(*args)

    monkeypatch.setattr(running, "set_lr", vanishing)
    with pytest.raises(FeatInvError, match="^100 images in a row could not be read"):
        here(tmp_path / "run", data=str(photographs), workers=workers, save_every="1000")
    assert len(saved(tmp_path / "run")) == 1


def test_a_panel_that_cannot_be_drawn_does_not_end_a_run(photographs, tmp_path, monkeypatch, capsys):
    def nothing(*_):
        raise FeatInvError("no image to show could be read")

    monkeypatch.setattr("training.loop.panel.held_out", nothing)
    assert here(tmp_path, panel_every="4", max_images="6").exists()
    assert "no panel at 4 images: no image to show" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    poisoned(monkeypatch, [5])
    with pytest.raises(FeatInvError, match="not finite in the step from image 8 on.*nan skip"):
        here(tmp_path)
    assert saved(tmp_path) == [6]
    report = json.loads((tmp_path / "not_finite_000000000008.json").read_text())
    assert (
        report["first_image"] == 8 and report["pictures"] == ["scene 8", "scene 9"] and report["config"]["batch"] == 2
    )


def test_a_step_that_is_not_finite_can_be_left_out(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, [2])
    one = load_file(here(tmp_path / "one", nan="skip", max_images="4", ema="0"))
    assert "1 steps were left out, not finite, from image 2 on" in capsys.readouterr().out
    monkeypatch.undo()
    short = load_file(here(tmp_path / "short", max_images="2", ema="0"))
    assert all(torch.equal(one[k], short[k]) for k in one)  # nothing of the bad step is left in the weights


def test_twenty_steps_in_a_row_that_are_not_finite_end_a_run_in_any_case(tmp_path, monkeypatch):
    bad = [4, 5, *range(7, 100)]
    poisoned(monkeypatch, bad)
    with pytest.raises(FeatInvError, match="from image 12 on, and in 19 more after it") as told:
        here(tmp_path / "all", nan="skip", save_every="2", keep="2", max_images="100")
    assert "nan skip" not in str(told.value)
    assert saved(tmp_path / "all") == [6, 12]  # none from the row, whose saves would have pushed these out
    monkeypatch.undo()
    poisoned(monkeypatch, [n for n in range(1, 25) if n % 20])
    assert here(
        tmp_path / "some", nan="skip", max_images="48"
    ).exists()  # never twenty, though twenty-three of twenty-four
