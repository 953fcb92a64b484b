"""Tests that a run that is killed many times ends like one that was never stopped.

    python training/experiments/kill_test.py --kills 20                       the drawn world's CNN at a small size
    python training/experiments/kill_test.py --kills 20 --layer layer2 ...    any field of the configuration

Trains once undisturbed, then again with SIGKILL at random moments and a checkpoint at every step, and compares weights
and log bit by bit. Every second kill falls into the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from training.cli import run
from training.config import DEFAULT, add_fields, given_fields, read_config
from training.loop.training import train

SMALL = {
    "max_images": 240,
    "batch": 8,
    "cycle": 0,
    "encoder_width": 16,
    "panel_every": 80,
    "save_every": 8,
    "warmup": 0,
    "precision": "fp32",
    "ema": 0.9,
}
#: imports once, then a fresh process from a fork that has not computed anything
START = multiprocessing.get_context("fork")


def attempt(values: dict[str, str], folder: Path) -> None:
    """A process that trains; silent, on one thread, so that sums are added in one order."""
    with open(folder.with_suffix(".txt"), "a", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    train(read_config(DEFAULT, values), folder)


def start(values: dict[str, str], folder: Path) -> BaseProcess:
    process = START.Process(target=attempt, args=(values, folder))
    process.start()
    return process


def differences(one: Path, two: Path) -> list[str]:
    """What of two runs' results is not the same: tensors of the weights files, and lines of the logs without their
    speeds."""
    (first,), (second,) = (list(folder.glob("*.safetensors")) for folder in (one, two))
    a, b = load_file(first), load_file(second)
    differing = [key for key in a.keys() | b.keys() if key not in a or key not in b or not torch.equal(a[key], b[key])]
    logs = []
    for folder in (one, two):
        lines = map(json.loads, (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines())
        logs.append([{k: line.get(k) for k in ("images", "loss", "lr", "cosine")} for line in lines])
    return differing + (["stats.jsonl"] if logs[0] != logs[1] else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--moments", type=int, default=0, help="seed of the moments to kill at")
    add_fields(parser)
    args = parser.parse_args()
    values = {k: str(v) for k, v in SMALL.items()} | given_fields(args)
    read_config(DEFAULT, values)
    rng, kills, writing, wrong = random.Random(args.moments), 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        baseline_run, began = Path(name) / "baseline", time.monotonic()
        start(values, baseline_run).join()
        length = time.monotonic() - began
        print(f"undisturbed: {length:.1f} s", flush=True)
        for number in range(1, args.kills + 1):
            killed = Path(name) / f"killed_{number}"
            while not list(killed.glob("*.safetensors")):
                process = start(values, killed)
                process.join(rng.uniform(0, length) if kills < args.kills else None)
                while kills % 2 and process.is_alive() and not list(killed.glob("*.part")):
                    time.sleep(0.0005)  # a checkpoint is written within milliseconds
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    part = bool(list(killed.glob("*.part")))
                    kills, writing = kills + 1, writing + part
                    seen = max((int(f.name.split("-")[1]) for f in killed.glob("checkpoint-*.pt")), default=0)
                    print(
                        f"run {number}, kill {kills}: {seen} images saved{', a file half written' if part else ''}",
                        flush=True,
                    )
                elif process.exitcode:
                    said = killed.with_suffix(".txt").read_text(encoding="utf-8")
                    sys.exit(f"run {number} did not go on: {said[-2000:]}")
            wrong += differences(baseline_run, killed)
            if kills == args.kills:
                break
    verdict = f"DIFFERENT: {', '.join(wrong[:5])}" if wrong else "weights and log the same bit by bit"
    print(f"{kills} kills in {number} runs, {writing} of them with a file half written: {verdict}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run(main)
