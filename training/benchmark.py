"""Speed and memory, measured here and now.

    python training/benchmark.py reconstruct     sixteen pictures, 20 steps, with guidance
    python training/benchmark.py world           scenes drawn per second
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reconstruct(repeats: int = 5) -> None:
    """Seconds from feature maps to pictures of a batch of 16, after one run that is not counted."""
    from featinv_nodes.tiny_world.scenes import draw
    from training.inversion import open_model

    opened = open_model("tiny_cnn_last")
    framed = opened.backbone.frame(draw(0, torch.arange(16), "held-out").image)
    how, start = opened.recommended(steps=20, guidance=2.0), opened.noise(range(16))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        opened.draw(opened.features(framed), how, start)
        times.append(time.perf_counter() - began)
    times = sorted(times[1:])
    print(f"16 pictures, 20 steps, guidance {how.guidance}: {times[len(times) // 2]:.2f} s (median of {repeats}, {times[0]:.2f} to {times[-1]:.2f})")
    print(f"peak memory {peak_memory():.2f} GB, {torch.get_num_threads()} threads")


def world(count: int = 4000) -> None:
    """Scenes drawn per second in batches of 64."""
    from featinv_nodes.tiny_world.scenes import draw

    draw(0, torch.arange(64))
    began = time.perf_counter()
    for first in range(0, count, 64):
        draw(0, torch.arange(first, first + 64))
    print(f"{count / (time.perf_counter() - began):.0f} scenes a second, {torch.get_num_threads()} threads")


PARTS = {"reconstruct": reconstruct, "world": world}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    PARTS[parser.parse_args().part]()
