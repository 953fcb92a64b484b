"""Speed and memory, measured here and now.

    python training/benchmark.py reconstruct     the embedded world: sixteen pictures, 20 steps, with guidance
    python training/benchmark.py world           its scenes drawn per second
    python training/benchmark.py model           real size, random weights: parameters, GMAC, memory, time of a step
    python training/benchmark.py training        real size: a training step beside that of the paper's released code

The last two take --config NAME (default convnext_last), --batch and --graph.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from training import real_size
from training.config import CONFIGS, read_config


def reconstruct(args: argparse.Namespace, repeats: int = 5) -> None:
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
    print(f"peak memory {real_size.peak_memory():.2f} GB, {torch.get_num_threads()} threads")


def world(args: argparse.Namespace, count: int = 4000) -> None:
    """Scenes drawn per second in batches of 64."""
    from featinv_nodes.tiny_world.scenes import draw

    draw(0, torch.arange(64))
    began = time.perf_counter()
    for first in range(0, count, 64):
        draw(0, torch.arange(first, first + 64))
    print(f"{count / (time.perf_counter() - began):.0f} scenes a second, {torch.get_num_threads()} threads")


def model(args: argparse.Namespace) -> None:
    """The configuration's architectures: what each part costs, and one sampling step and one training step."""
    config, device = args.config, args.device
    print(f"| part of {config.name} | million parameters | GMAC per image |\n|---|---|---|")
    for name, (parameters, gmac) in real_size.costs(config).items():
        print(f"| {name} | {parameters:.1f} | {gmac:.2f} |")
    parts = real_size.build(config, device)
    picture = torch.rand(args.batch, 3, *parts.backbone.input_size, device=device)
    with torch.inference_mode():
        hint = parts.model.hint(parts.backbone.values(picture, config.layer, config.pooled), (32, 32))
        x, t = torch.randn(args.batch, 4, 32, 32, device=device), torch.zeros(args.batch, dtype=torch.long, device=device)
        context = parts.base.text[""].expand(args.batch, -1, -1)
        seconds = real_size.seconds(lambda: parts.model.steer(parts.base.unet, x, t, context, hint), 1, 1)
    print(f"sampling step, float32, batch {args.batch}: {seconds:.2f} s, peak memory {real_size.peak_memory():.1f} GB")
    report(args, "training step, latents cached", real_size.seconds(real_size.our_step(parts, picture, True, args.graph), args.repeats, 1))


def training(args: argparse.Namespace) -> None:
    """Images per second of the released recipe (batch 8 or less) and of ours, with the latents cached and without."""
    parts = real_size.build(args.config, args.device)
    picture = torch.rand(min(8, args.batch), 3, *parts.backbone.input_size, device=args.device)
    step = real_size.released_step(parts, picture)
    first = report(args, "released recipe, float32", real_size.seconds(step, args.repeats, 1), len(picture))
    del parts, step  # before the next is built
    for cached in (True, False):
        parts = real_size.build(args.config, args.device)
        pictures = torch.rand(args.batch, 3, *parts.backbone.input_size, device=args.device)
        step = real_size.our_step(parts, pictures, cached, args.graph)
        rate = report(args, f"ours, {args.config.precision}, latents {'cached' if cached else 'encoded in the step'}", real_size.seconds(step, args.repeats, 1))
        print(f"    {rate / first:.2f} times the released recipe")
        del parts, step


def report(args: argparse.Namespace, what: str, seconds: float, batch: int = 0) -> float:
    """Prints one timing; returns images per second."""
    batch = batch or args.batch
    rate = batch / seconds
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    flops = 2e9 * real_size.FLOOR_GMAC * rate
    share = next((f", {flops / peak:.1%} of the bf16 peak" for part, peak in real_size.PEAK.items() if part in name), "")
    print(f"{what}, batch {batch}: {seconds:.3f} s, {rate:.3g} images/s, {flops / 1e12:.3g} TFLOP/s on the floor{share}, "
          f"peak memory {real_size.peak_memory():.1f} GB ({name})")  # fmt: skip
    return rate


PARTS = {"reconstruct": reconstruct, "world": world, "model": model, "training": training}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--config", default="convnext_last", help="a configuration of training/configs, or a file")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="steps that count")
    parser.add_argument("--precision", default="bf16", help="of our step")
    parser.add_argument("--graph", action="store_true", help="our step as one CUDA graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    file = Path(args.config) if args.config.endswith(".yaml") else CONFIGS / f"{args.config}.yaml"
    args.config = read_config(file, {"precision": args.precision})
    PARTS[args.part](args)
