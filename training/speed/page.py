"""Measurements in parts within a time limit; the page and a JSON file are written after every row."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from ..files import write_text

Value = str | int | float


class OutOfTime(Exception):
    """A part was still running when the time was up."""


class Page:
    """benchmark.md and benchmark.json in a folder. A part that fails leaves its error and the rows it had."""

    def __init__(self, folder: Path, minutes: float, facts: dict[str, str]) -> None:
        """minutes: after which nothing is running any more, from now on. facts: what was measured on, "device"
        first."""
        self.folder, self.facts, self.parts = folder, facts, {}
        self.ends = time.monotonic() + 60 * minutes
        self._part: dict = {}
        self.write()

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.ends - time.monotonic()

    def part(self, name: str, title: str, expected: float, run: Callable[[], None]) -> None:
        """Runs a part, which calls row and text, if the seconds it is expected to take are left; it is cut off when the
        time is up."""
        self._part = self.parts[name] = {"title": title, "rows": [], "texts": []}
        if self.left() < expected:
            self._part["not begun"] = f"expected to take {expected:.0f} s, and {max(0.0, self.left()):.0f} s were left"
        else:
            print(f"{title} ...", flush=True)
            began = time.monotonic()
            try:
                with time_limit(self.left()):
                    run()
            except Exception as error:  # one part out of memory must not lose the others
                self._part["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            self._part["seconds"] = round(time.monotonic() - began, 1)
        self.write()

    def row(self, **values: Value) -> None:
        """Adds a row to the part's table, or begins the next one where its columns are others."""
        self._part["rows"].append(values)
        print("    " + ", ".join(f"{name} {format_cell(value)}" for name, value in values.items()), flush=True)
        self.write()

    def rows(self, name: str) -> list[dict[str, Value]]:
        """The rows of a part so far, none if it was not begun."""
        return self.parts.get(name, {"rows": []})["rows"]

    def text(self, line: str) -> None:
        """Adds a sentence under the part's tables."""
        self._part["texts"].append(line)
        print(f"    {line}", flush=True)
        self.write()

    def write(self) -> None:
        write_text(self.folder / "benchmark.json", json.dumps(self.facts | {"parts": self.parts}, indent=1))
        write_text(self.folder / "benchmark.md", self.markdown())

    def markdown(self) -> str:
        """The page so far."""
        first, *others = self.facts.items()
        lines = [f"# {first[1]}", "", *(f"{name}: {value}  " for name, value in others)]
        for part in self.parts.values():
            lines += ["", f"## {part['title']}"]
            for columns, rows in groupby(part["rows"], list):
                lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
                lines += ["| " + " | ".join(map(format_cell, row.values())) + " |" for row in rows]
            for line in part["texts"]:
                lines += ["", line]
            for what in ("not begun", "error"):
                if what in part:
                    lines += ["", f"{what.capitalize()}: {part[what]}"]
            if "seconds" in part:
                lines += ["", f"(this part took {part['seconds']:.0f} s)"]
        return "\n".join(lines) + "\n"


def format_cell(value: Value) -> str:
    """A table's cell: four digits of a number."""
    return (
        (f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}")
        if isinstance(value, float)
        else str(value).replace("|", "\\|")
    )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after so many seconds, and again every five: libraries swallow exceptions here and
    there. Does nothing outside the main thread and on Windows, which has no such alarm."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime("the time was up")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
