"""benchmark.py gpu, tried out on narrow models: every part runs, each is written, and neither a failure nor the clock
loses any."""

import json
import sys
import time
from argparse import Namespace

import pytest
import torch

from featinv_nodes.core.errors import FeatInvError
from training.config import CONFIGS, parse_arguments, read_config
from training.speed import gpu
from training.speed.page import Page


@pytest.fixture(autouse=True)
def nothing_to_free(monkeypatch):
    monkeypatch.setattr(gpu.gc, "collect", lambda: None)  # dozens of times, for the sake of a GPU


def measure(folder, parts=None, minutes=5.0):
    config = read_config(CONFIGS / "convnext_last.yaml", {"precision": "bf16"})
    gpu.gpu(Namespace(config=config, device="cpu", small=True, minutes=minutes, out=folder, parts=parts))
    return json.loads((folder / "benchmark.json").read_text())["parts"], (folder / "benchmark.md").read_text()


def test_every_part_runs_and_is_on_the_page(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(
        gpu,
        "run_concurrently",
        lambda ways, settings: (
            started.extend([*way, *settings] for way in ways.values()) or [("bf16", 1, ["begins", "fails"])]
        ),
    )
    parts, page = measure(tmp_path)
    assert list(parts) == list(gpu.PARTS) and not [part["error"] for part in parts.values() if "error" in part]
    assert all(part["rows"] and f"## {part['title']}\n" in page for part in parts.values())
    step = parts["step"]["rows"][0]
    assert step["images/s"] == pytest.approx(1000 * step["batch"] / step["ms"])
    times = step["images/s"] / parts["released"]["rows"][0]["images/s"]
    assert f"is {times:.1f} times as fast" in page
    assert all(row["largest difference"] < 1e-6 for row in parts["upsampling"]["rows"])
    sampling = parts["sampling"]["rows"][0]
    assert sampling["minutes for 10000"] == pytest.approx(10_000 / sampling["images/s"] / 60)
    assert "begins\nfails" in page and "group normalisation" in page and "benchmark.py" in page
    monkeypatch.setattr(sys, "argv", started[0])  # train.py takes what it would be started with
    assert parse_arguments("")[0].precision == "bf16"


def test_a_failure_is_written_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails(benchmark):
        benchmark.page.row(step="first", ms=1.0)
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setitem(gpu.PARTS, "profile", (fails, "Fails", 1))
    parts, page = measure(tmp_path, "profile,upsampling")
    assert parts["profile"]["rows"] == [{"step": "first", "ms": 1.0}] and "OutOfMemoryError: too large" in page
    assert parts["upsampling"]["rows"]


def test_the_clock_decides_what_is_begun_and_ends_what_is_running(tmp_path):
    page = Page(tmp_path, 0.5 / 60, {"device": "a processor"})
    done = []
    page.part("long", "Long", 60, lambda: done.append("long"))
    page.part("short", "Short", 0, lambda: done.append("short"))
    page.part("endless", "Endless", 0, lambda: time.sleep(60))
    assert done == ["short"] and page.left() < 1
    assert "60 s" in page.parts["long"]["not begun"] and "OutOfTime" in page.parts["endless"]["error"]
    assert page.parts["endless"]["seconds"] < 30


def test_programs_run_side_by_side_each_with_its_status_and_what_it_wrote():
    ways = {"good": ["-c", "print('one'); print('two')"], "bad": ["-c", "raise SystemExit('no')"]}
    assert list(gpu.run_concurrently(ways, [])) == [("good", 0, ["one", "two"]), ("bad", 1, ["no"])]


def test_without_a_gpu_and_for_unknown_parts_it_says_what_to_do(tmp_path):
    for options, message in (
        ({"small": False, "parts": None}, "--small"),
        ({"small": True, "parts": "speed"}, "step,upsampling"),
    ):
        with pytest.raises(FeatInvError, match=message):
            gpu.gpu(Namespace(config=None, device="cpu", minutes=1, out=tmp_path, **options))
