"""What the pack costs in a real host, in every ComfyUI checkout that the tests find.

python tests/host/benchmark.py            a stock ControlNet and ours side by side, and the time to import the pack
python tests/host/benchmark.py cancel     how long guidance of Stable Diffusion 1.5 goes on once it is cancelled, on the
                                          host's own device; on a processor give a small --pixels, and time
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hosts import PACK, Server, find_hosts

PROGRAM = """
import runpy, statistics, sys, time
world_of = runpy.run_path({inside!r}, run_name="library")
import torch
import nodes
torch.set_num_threads(1)
World, stock_control = world_of["World"], world_of["parity"].stock_control
with torch.inference_mode():
    world = World()
    stock = stock_control(world)
    hint = torch.rand(1, 64, 64, 3)
    ours = world.apply(guide_away_from="text")
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    theirs = apply(world.positive, world.negative, stock, hint, 1.0, 0.0, 1.0)
    times = {{"ours": [], "stock": []}}
    for number in range({rounds}):
        pair = [("ours", ours), ("stock", theirs)]
        for name, conditioning in pair[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            world.draw(conditioning, batch=4)
            times[name].append(time.perf_counter() - start)
ratios = [a / b for a, b in zip(times["ours"], times["stock"])]
import json
print(json.dumps({{"ratio": statistics.median(ratios), "ours": min(times["ours"]), "stock": min(times["stock"])}}))
"""


def compare(rounds: int = 41) -> None:
    for host in find_hosts():
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "program.py"
            program.write_text(PROGRAM.format(inside=str(Path(__file__).with_name("inside.py")), rounds=rounds))
            result = host.run_inside(program, PACK, folder)
            server = Server(host, Path(folder) / "base")
            seconds = re.search(r"([\d.]+) seconds: .*FeatInv", server.log)
            server.stop()
        print(
            f"ComfyUI {host.version}: ours costs {result['ratio']:.3f} of a stock ControlNet's time (median of {rounds}"
            f" pairs, 10 steps, 4 images, {result['ours']:.3f} s against {result['stock']:.3f} s at best); import"
            f" {seconds.group(1) if seconds else '?'} s"
        )


def cancel(pixels: int, count: int, width: int) -> None:
    for host in find_hosts():
        with tempfile.TemporaryDirectory() as folder:
            program = Path(__file__).with_name("real_size.py")
            result = host.run_inside(program, PACK, folder, str(pixels), str(count), str(width))
        print(
            f"ComfyUI {host.version}, {result['device']}, {pixels} x {pixels} pixels: a guided step with two moves"
            f" takes {result['step']:.3g} s; {result['cancelled']} of {count} cancels came in time, and the device was"
            f" idle {result['longest']:.3g} s after them at most, {result['median']:.3g} s at the median"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("cancel",))
    parser.add_argument("--pixels", type=int, default=512, help="side of the image")
    parser.add_argument("--count", type=int, default=20, help="cancels, spread over the drawing")
    parser.add_argument("--width", type=int, default=320, help="of the U-Net; 32 tries the program out")
    args = parser.parse_args()
    cancel(args.pixels, args.count, args.width) if args.part else compare()
