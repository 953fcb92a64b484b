"""What a run says about itself: stats.jsonl, trackers, speed."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from PIL import Image

from featinv_nodes.core.errors import FeatInvError

from ..files import write_text
from ..report import save_image

#: dense bf16 peak, FLOP/s, by a part of the device's name (NVIDIA's data sheets)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "4090": 165e12}


def open_log(file: Path, images_seen: int) -> IO[str]:
    """stats.jsonl for appending, without lines after `images_seen` and without a line that was cut off: a
    continued run writes them again."""
    if file.exists():
        write_text(
            file,
            "".join(
                line
                for line in file.read_text(encoding="utf-8").splitlines(True)
                if line.endswith("}\n") and json.loads(line)["images"] <= images_seen
            ),
        )
    return open(file, "a", encoding="utf-8")


def write_line(log: IO[str], values: dict[str, float], say: Callable[[str], object]) -> None:
    """Appends a line; a full disk does not end a run."""
    try:
        log.write(json.dumps(values) + "\n")
        log.flush()
    except OSError as error:
        say(f"stats.jsonl was not written: {error}")


def check_trackers(names: list[str], folder: Path) -> None:
    """Raises FeatInvError for trackers that accelerate does not know, or whose package is not installed. To be called
    when accelerate's state is there: it logs what is missing."""
    for name in names:
        if not isinstance(name, str):
            raise FeatInvError(f"trackers: {name!r} is no name; expected such as [tensorboard]")
        try:
            installed = filter_trackers([name], folder)
        except ValueError as error:
            raise FeatInvError(f"trackers: {error}") from error
        if not installed:
            raise FeatInvError(f"tracker {name!r} is not installed: pip install {name}, or leave it out of trackers")


def start_trackers(accelerator: Accelerator, config: dict) -> None:
    """Starts those that the accelerator was made with; fields of types that they do not take go as text."""
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    accelerator.init_trackers("featinv", plain, {"wandb": {"name": config["name"]}})


def show(
    accelerator: Accelerator, image: Image.Image, file: Path, images_seen: int, say: Callable[[str], object]
) -> None:
    """Writes a panel, and gives it to the trackers that take pictures; neither a full disk nor a tracker ends a run."""
    try:
        save_image(image, file)
    except OSError as error:
        say(f"{file} was not written: {error}")
    for tracker in (tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        try:
            tracker.log_images({"panel": np.asarray(image)[None]}, step=images_seen, **layout)
        except Exception as error:  # each library has its own
            say(f"the tracker {tracker.name} did not take the panel: {error}")


class Pace:
    """Speed since the last report: images per second, share of the time spent waiting for data, arithmetic. Without the
    first step, which compiles and warms up, and what is done elsewhere: panels and checkpoints.

    gmac: what an image costs at least (see step_gmac). peak: FLOP/s of all processes together where known, else None.
    """

    def __init__(self, gmac: float, peak: float | None) -> None:
        self.gmac, self.peak = gmac, peak
        self._since, self._waited, self._images = None, 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def step(self, images: int) -> None:
        """A step of so many images is done."""
        if self._since is None:
            self._since, self._waited = time.perf_counter(), 0.0
        else:
            self._images += images

    def report(self) -> dict[str, float]:
        """Figures of the steps since the last report, the memory alone where there were none; "share_of_peak" counts
        the FLOPs that a step cannot avoid."""
        if not self._images:
            return {"memory_gb": peak_memory()}
        now = time.perf_counter()
        taken = now - self._since
        rate = self._images / taken
        figures = {
            "images_per_second": rate,
            "gflops": 2 * self.gmac * rate,
            "data_wait": self._waited / taken,
            "memory_gb": peak_memory(),
        }
        self._since, self._waited, self._images = now, 0.0, 0
        return figures | ({"share_of_peak": 1e9 * figures["gflops"] / self.peak} if self.peak else {})


def device_peak(device: torch.device, count: int = 1) -> float | None:
    """Dense bf16 FLOP/s of `count` such devices, None where PEAK does not have them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((count * peak for part, peak in PEAK.items() if part in name), None)


def peak_memory() -> float:
    """GB at most so far: the device's where there is one, else this process's resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
