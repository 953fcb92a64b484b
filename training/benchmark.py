"""Measures speed and memory on this computer.

    python training/benchmark.py reconstruct     the drawn world: sixteen images, 20 steps, with guidance
    python training/benchmark.py world           the drawn world: scenes generated per second
    python training/benchmark.py sampling        the drawn world: batches beside a loop that draws one image at a time
    python training/benchmark.py model           real size, random weights: parameters, GMAC, memory, time of a step
    python training/benchmark.py training        real size: a training step beside that of the paper's released code
    python training/benchmark.py memory          real size: GB of a training step on a GPU, counted without one
    python training/benchmark.py gpu --minutes N --out FOLDER     real size: a page about this GPU, by importance

The last four take --config NAME (default convnext_last), the first three of them --precision, model and training
--batch, --graph and --compile, and training --profile.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from training.cli import add_device
from training.config import CONFIGS, TrainConfig, read_config
from training.loop.flops import step_gmac
from training.loop.log import device_peak, peak_memory
from training.loop.memory import MOMENTS
from training.models.flops import gmac_of
from training.speed import real_size, step_memory
from training.speed.gpu import PARTS as GPU_PARTS
from training.speed.gpu import gpu
from training.speed.sampling import sampling


def reconstruct(args: argparse.Namespace, repeats: int = 5) -> None:
    """Seconds from feature maps to pictures of a batch of 16, after one run that is not counted."""
    from featinv_nodes.worlds.drawn.scenes import draw
    from training.models.pipeline import load_pipeline

    pipeline = load_pipeline("tiny_cnn_last")
    pixel_values = pipeline.backbone.preprocess(draw(0, torch.arange(16), "held-out").image)
    settings, start = pipeline.recommended(steps=20, guidance=2.0, gradient=0.0), pipeline.noise(range(16))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        pipeline.draw(pipeline.features(pixel_values), settings, start)
        times.append(time.perf_counter() - began)
    times = sorted(times[1:])
    print(
        f"16 images, 20 steps, guidance {settings.guidance}: {times[len(times) // 2]:.2f} s (median of {repeats},"
        f" {times[0]:.2f} to {times[-1]:.2f})"
    )
    print(f"peak memory {peak_memory():.2f} GB, {torch.get_num_threads()} threads")


def world(args: argparse.Namespace, count: int = 4000) -> None:
    """Scenes drawn per second in batches of 64."""
    from featinv_nodes.worlds.drawn.scenes import draw

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
        x, t = (
            torch.randn(args.batch, 4, 32, 32, device=device),
            torch.zeros(args.batch, dtype=torch.long, device=device),
        )
        context = parts.base.text[""].expand(args.batch, -1, -1)
        seconds = real_size.seconds(lambda: parts.model.predict(parts.base.unet, x, t, context, hint), 1, 1)
    print(f"sampling step, float32, batch {args.batch}: {seconds:.2f} s, peak memory {peak_memory():.1f} GB")
    step = real_size.our_step(parts, picture, ("moments",), args.graph)
    report(args, least_gmac(config)[0], "training step, latents cached", real_size.seconds(step, args.repeats, 1))


def training(args: argparse.Namespace) -> None:
    """Images per second of the released recipe (batch 8 or less) and of ours, with what a cache may hold and without;
    and whether the two learn the same at equal settings (batch, float32, no clipping, the same noise)."""
    config, device = args.config, args.device
    (gmac, side), small = least_gmac(config), min(8, args.batch)
    print(f"at least {gmac:.1f} GMAC per image and step")
    torch.manual_seed(1)
    pictures = torch.rand(args.batch, 3, *side, device=device)
    step = real_size.released_step(real_size.build(config, device), pictures[:small])
    first = report(args, gmac, "released recipe, float32", real_size.seconds(step, args.repeats, 1), small)
    del step  # before the next is built
    for what, cached in reversed(real_size.CACHES.items()):
        step = real_size.our_step(real_size.build(config, device), pictures, cached, args.graph)
        rate = report(
            args,
            gmac,
            f"ours, {config.precision}{', compiled' if config.compile else ''}, {what}",
            real_size.seconds(step, args.repeats, 1),
        )
        print(f"    {rate / first:.2f} times the released recipe", flush=True)
        if args.profile:
            print(real_size.costliest(step, args.profile), flush=True)
        del step
    if args.agreement:
        agreement(args, pictures[:small])


def agreement(args: argparse.Namespace, pictures: torch.Tensor) -> None:
    """Prints the losses of both recipes from the same weights, and what a step of each computes."""
    plain = replace(args.config, precision="fp32", compile=False)
    recipes = {
        "released": lambda parts: real_size.released_step(parts, pictures),
        "ours": lambda parts: real_size.our_step(parts, pictures, ("moments",), largest_norm=float("inf")),
    }
    curves = {}
    for name, recipe in recipes.items():
        step = recipe(real_size.build(plain, args.device))
        curves[name] = real_size.losses(step, args.agreement)
        print(
            f"{name}: {gmac_of(step) / len(pictures):.1f} GMAC per image; losses"
            f" {', '.join(f'{x:.6f}' for x in curves[name])}",
            flush=True,
        )
        del step
    apart = max(abs(a - b) / a for a, b in zip(*curves.values()))
    print(f"loss curves of {args.agreement} steps at equal settings: at most {apart:.1e} apart, relatively")


def memory(args: argparse.Namespace) -> None:
    """The configuration's table of GB for batches, optimizers and checkpointing, at args.precision."""
    print(
        "| optimizer | moving average | checkpointing | "
        + " | ".join(f"batch {batch}" for batch in BATCHES)
        + " |\n"
        + "|---" * (3 + len(BATCHES))
        + "|"
    )
    parts = step_memory.without_memory(args.config)
    activations = {
        again: [step_memory.activation_gigabytes(parts, batch, again) for batch in BATCHES] for again in (False, True)
    }
    for optimizer, ema in (("adamw", 0.9995), ("adamw", 0.0), ("adamw8bit", 0.0)):
        others = step_memory.needed(parts, bool(ema), MOMENTS[optimizer])
        for again, row in activations.items():
            print(
                f"| {optimizer} | {ema or 'none'} | {'yes' if again else 'no'} | "
                + " | ".join(f"{others + gb:.1f}" for gb in row)
                + " |"
            )


def least_gmac(config: TrainConfig) -> tuple[float, tuple[int, int]]:
    """step_gmac of a configuration at real size, and its backbone's input size."""
    parts = real_size.build(config, "meta")
    return step_gmac(parts.base, parts.backbone, parts.model, config), parts.backbone.input_size


def report(args: argparse.Namespace, gmac: float, what: str, seconds: float, batch: int = 0) -> float:
    """Prints one timing; returns images per second. gmac: the least per image."""
    batch = batch or args.batch
    rate, peak = batch / seconds, device_peak(torch.device(args.device))
    flops = 2e9 * gmac * rate
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    share = f", {flops / peak:.1%} of the bf16 peak" if peak else ""
    print(
        f"{what}, batch {batch}: {seconds:.3f} s, {rate:.3g} images/s, {flops / 1e12:.3g} TFLOP/s of the least that a"
        f" step needs{share}, peak memory{' so far' if args.device == 'cpu' else ''} {peak_memory():.1f} GB ({name})",
        flush=True,
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # each row has its own
    return rate


PARTS = {
    "reconstruct": reconstruct,
    "world": world,
    "model": model,
    "training": training,
    "memory": memory,
    "sampling": sampling,
    "gpu": gpu,
}
BATCHES = (1, 4, 8, 16, 32, 64)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--config", default="convnext_last", help="a configuration of training/configs, or a file")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="steps to time")
    parser.add_argument("--precision", default="bf16", help="precision of our step")
    parser.add_argument("--agreement", type=int, default=4, help="steps whose losses are compared, 0 for none")
    parser.add_argument("--graph", action="store_true", help="our step as one CUDA graph")
    parser.add_argument(
        "--compile", action="store_true", help="our step through torch.compile, as the *_fast configurations have it"
    )
    parser.add_argument(
        "--profile",
        type=int,
        metavar="ROWS",
        help="training: print this many rows of what our step spends most time in",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="gpu: time for the page; parts that would not end in time are left out",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark"), help="gpu: folder for benchmark.md and benchmark.json"
    )
    parser.add_argument("--parts", help=f"gpu: some of {','.join(GPU_PARTS)}, in the order to take them")
    parser.add_argument(
        "--small", action="store_true", help="gpu: narrow models and few images, to try it out on any computer"
    )
    add_device(parser)
    args = parser.parse_args()
    file = Path(args.config) if args.config.endswith(".yaml") else CONFIGS / f"{args.config}.yaml"
    args.config = read_config(file, {"precision": args.precision} | ({"compile": "true"} if args.compile else {}))
    PARTS[args.part](args)
