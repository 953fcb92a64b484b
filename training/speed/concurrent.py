"""Programs side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch


def run_concurrently(ways: dict[str, list[str]], settings: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Runs programs of this Python side by side, each in a folder of its own; (name, exit status, lines it wrote) of
    each."""
    env = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        try:
            for number, (what, arguments) in enumerate(ways.items()):
                command = [sys.executable, *arguments, "--output", f"{folder}/{number}", *settings]
                running[what] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
                )
            for what, process in running.items():
                lines = process.communicate()[0].replace("\r", "\n").splitlines()
                yield what, process.returncode, [line[:300] for line in lines if line.strip()]
        finally:
            for process in running.values():
                process.kill()
                process.wait()
