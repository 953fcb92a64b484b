"""Measures a GPU, the most important figures first; see benchmark.py gpu."""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.resize import resize_bilinear
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.weights import InversionInfo

from ..config import CONFIGS, TrainConfig
from ..files import make_folder
from ..loop.flops import step_gmac
from ..loop.log import device_peak, peak_memory
from ..models.pipeline import InversionPipeline, set_precision
from . import kernels, real_size
from .blocks import compare_blocks
from .concurrent import run_concurrently
from .page import Page
from .real_size import Parts, Step
from .sampling import one_by_one

TRAIN = Path(__file__).parents[1] / "train.py"
EVALUATION_SIZE = 10_000  # images that an evaluation makes
LOOP_SIZE = 2  # images sampled one at a time


class GpuBenchmark:
    """The models of one configuration, and what is measured on them; each method named in PARTS is one part of the
    page."""

    def __init__(self, config: TrainConfig, device: str, page: Page, small: bool = False) -> None:
        """config: its precision is our step's. small: narrow models and few images, to try the program out."""
        self.config, self.device, self.page, self.small = config, device, page, small
        self.batch, self.large_batch, self.small_batch, self.steps = (
            (2, 3, 1, (2, 3)) if small else (64, 128, 8, (20, 50))
        )
        self.graph = device == "cuda"

    @cached_property
    def parts(self) -> Parts:
        """In our step's layouts and precision."""
        parts = self.build()
        real_size.lay_out(parts, self.device)
        return parts

    def build(self) -> Parts:
        """In float32."""
        return real_size.build(self.config, self.device, real_size.SMALL if self.small else None)

    @cached_property
    def gmac(self) -> float:
        """The least GMAC per image and step, see step_gmac."""
        return step_gmac(self.parts.base, self.parts.backbone, self.parts.model, self.config)

    @cached_property
    def input_size(self) -> tuple[int, int]:
        """(h, w) that the backbone reads."""
        return self.parts.backbone.input_size

    def pictures(self, batch: int) -> Tensor:
        return torch.rand(batch, 3, *self.input_size, device=self.device)

    def build_alone(self) -> Parts:
        """build(), with nothing else on the device."""
        _ = self.gmac, self.input_size
        self.__dict__.pop("parts", None)
        self.free()
        return self.build()

    def free(self) -> None:
        """Frees the device memory of a step."""
        if "parts" in self.__dict__:
            self.parts.model.zero_grad()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def our_step(self, batch: int, graph: bool = False, compiled: bool = False) -> Step:
        """Our step with cached latents."""
        parts = replace(self.parts, config=replace(self.config, compile=compiled))
        return real_size.our_step(parts, self.pictures(batch), ("moments",), graph)

    def step_of_diffusers(self) -> Step:
        """our_step with diffusers' own blocks."""
        return real_size.our_step(
            self.build_alone(), self.pictures(self.batch), ("moments",), self.graph, own_blocks=False
        )

    @contextmanager
    def timed_step(self, what: str, batch: int, make: Callable[[], Step], repeats: int = 10) -> Iterator[Step]:
        """Makes a step, times it, and adds a row; the step is there in the block and gone after it."""
        self.free()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step = make()
        step().item()
        first = time.perf_counter() - began
        seconds = real_size.seconds(step, *((1, 0) if self.small else (repeats, 1)))
        images_per_second, peak = batch / seconds, device_peak(torch.device(self.device))
        share = {"share of bf16 peak, %": 100 * 2e9 * self.gmac * images_per_second / peak} if peak else {}
        self.page.row(
            **{"step": what, "batch": batch, "ms": 1000 * seconds, "images/s": images_per_second}
            | share
            | {"GB": peak_memory(), "s until the first step": first}
        )
        yield step
        del step
        self.free()

    def time_step(self, what: str, batch: int, make: Callable[[], Step], repeats: int = 10) -> None:
        with self.timed_step(what, batch, make, repeats):
            pass

    # Parts

    def step(self) -> None:
        began = time.perf_counter()
        _ = self.parts
        built = time.perf_counter() - began
        parameters = sum(p.numel() for p in self.parts.model.parameters()) / 1e6
        self.page.text(
            f"{parameters:.0f} M trained parameters; at least {self.gmac:.1f} GMAC per image and step; models built in"
            f" {built:.1f} s."
        )
        for graph in dict.fromkeys((self.graph, False)):
            self.time_step(
                "one CUDA graph" if graph else "plain", self.batch, functools.partial(self.our_step, self.batch, graph)
            )

    def upsampling(self) -> None:
        source = self.parts.model.source
        size = (self.parts.base.latent_size,) * 2
        ways = {
            "F.interpolate": lambda x: F.interpolate(x, size, mode="bilinear"),
            "resize_bilinear": lambda x: resize_bilinear(x, size),
        }
        for form in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(self.batch, source.channels, *source.grid, device=self.device).contiguous(
                memory_format=form
            )
            for name, way in ways.items():
                difference = (way(x) - ways["F.interpolate"](x)).abs().max().item()
                ms = 1000 * real_size.seconds(lambda: way(x), 1 if self.small else 20)  # noqa: B023
                self.page.row(
                    **{
                        "upsampling": name,
                        "layout": str(form).removeprefix("torch."),
                        "batch": self.batch,
                        "ms": ms,
                        "largest difference": difference,
                    }
                )

    def profile(self) -> None:
        with self.timed_step("plain", self.batch, lambda: self.our_step(self.batch), 3) as step:
            self.spent(kernels.kernels_of(step))

    def spent(self, profiled: list[kernels.Kernel]) -> None:
        """Adds the time by kind of kernel, and the costliest kernels."""
        total = sum(kernel.ms for kernel in profiled)
        self.page.text(f"{total:.1f} ms in all, {sum(kernel.calls for kernel in profiled)} calls.")
        for kind, ms in kernels.by_kind(profiled).items():
            self.page.row(**{"kind": kind, "ms": ms, "share, %": 100 * ms / total})
        for kernel in profiled[:30]:
            self.page.row(
                **{"the costliest": kernel.name[:120], "calls": kernel.calls, "ms": kernel.ms, "kind": kernel.kind}
            )

    def blocks(self) -> None:
        width, side = self.parts.base.unet.config.block_out_channels[0], self.parts.base.latent_size
        for row in compare_blocks(self.batch, width, side, self.device, 1 if self.small else 10):
            self.page.row(**row)
        self.time_step("diffusers' own blocks", self.batch, self.step_of_diffusers)

    def step_large(self) -> None:
        self.time_step(
            "one CUDA graph" if self.graph else "plain",
            self.large_batch,
            lambda: self.our_step(self.large_batch, self.graph),
            5,
        )

    def sampling(self) -> None:
        pipeline, features = self.pipeline("bf16")
        self.draw(pipeline, features, self.steps[0])
        self.draw_one_by_one(pipeline, features, self.steps[0])

    def sampling_long(self) -> None:
        self.draw(*self.pipeline("bf16"), self.steps[1])

    def sampling_profile(self) -> None:
        pipeline, features = self.pipeline("bf16")
        start = pipeline.noise(range(self.batch))
        self.spent(kernels.kernels_of(lambda: pipeline.draw(features, Sampling(steps=2), start, self.batch)))

    def compiled(self) -> None:
        for graph in dict.fromkeys((self.graph, False)):
            self.time_step(
                f"compiled{', one CUDA graph' if graph else ''}",
                self.batch,
                functools.partial(self.our_step, self.batch, graph, True),
            )

    def released(self) -> None:
        def make() -> Step:
            return real_size.released_step(self.build_alone(), self.pictures(self.small_batch))

        self.time_step("released recipe, float32", self.small_batch, make, 4)
        if ours := self.page.rows("step"):
            (released,) = self.page.rows("released")
            times = ours[0]["images/s"] / released["images/s"]
            self.page.text(f"Per image, the first step of this page is {times:.1f} times as fast.")

    def sampling_float32(self) -> None:
        pipeline, features = self.pipeline("fp32")
        self.draw(pipeline, features, self.steps[0])
        self.draw_one_by_one(pipeline, features, self.steps[0])

    def memory(self) -> None:
        unet, controlnet = self.parts.base.unet, self.parts.model.controlnet
        for checkpointing in (False, True):
            for part in (unet, controlnet):
                (part.enable_gradient_checkpointing if checkpointing else part.disable_gradient_checkpointing)()
            try:
                for batch in sorted({1, self.small_batch, self.batch}):
                    self.time_step(
                        f"plain{', checkpointing' if checkpointing else ''}",
                        batch,
                        functools.partial(self.our_step, batch),
                        2,
                    )
            finally:
                for part in (unet, controlnet):
                    part.disable_gradient_checkpointing()

    def branches(self) -> None:
        fsdp = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(CONFIGS / "accelerate" / "fsdp.yaml"),
            "--num_processes",
            "1",
            str(TRAIN),
        ]
        ways = {"bf16": [str(TRAIN), "--precision", "bf16"]}
        if self.device == "cuda":
            ways |= {
                "bf16, FSDP": [*fsdp, "--precision", "bf16"],
                "fp16": [str(TRAIN), "--precision", "fp16"],
                "bf16, CUDA graph": [str(TRAIN), "--graph", "true"],
            }
        images, batch = (2, 1) if self.small else (2560, 64)
        settings = ["--max-images", str(images), "--batch", str(batch), "--warmup", "0", "--panel-every", "1000000"]
        for what, status, lines in run_concurrently(
            ways, [*settings, *(["--standardise", "false", "--cycle", "0"] if self.small else [])]
        ):
            self.page.row(
                **{
                    "train.py, the drawn world": what,
                    "images": images,
                    "exit status": status,
                    "last line": (lines or [""])[-1],
                }
            )
            if status:
                self.page.text("\n".join(["```", *lines[-25:], "```"]))

    def draw(self, pipeline: InversionPipeline, features: FeatureMap, steps: int) -> None:
        """Adds a row of a batch drawn with guidance."""
        start = pipeline.noise(range(self.batch))
        pipeline.draw(features, Sampling(steps=2), start, self.batch)
        began = time.perf_counter()
        pipeline.draw(features, Sampling(steps=steps), start, self.batch)  # the pictures are on the CPU: all is done
        self.sampling_row(pipeline, "one batch", self.batch, steps, time.perf_counter() - began)

    def draw_one_by_one(self, pipeline: InversionPipeline, features: FeatureMap, steps: int) -> None:
        """Adds a row of images sampled as the paper's released script does."""
        start, few = pipeline.noise(range(LOOP_SIZE)), features.select(slice(0, LOOP_SIZE))
        one_by_one(pipeline, few.select(slice(0, 1)), Sampling(steps=2), start[:1])
        began = time.perf_counter()
        one_by_one(pipeline, few, Sampling(steps=steps), start)
        self.sampling_row(pipeline, "one image at a time", LOOP_SIZE, steps, time.perf_counter() - began)

    def pipeline(self, precision: str) -> tuple[InversionPipeline, FeatureMap]:
        """The models as evaluate.py opens them, and feature maps of a batch of images."""
        parts = replace(self.build_alone(), config=replace(self.config, precision="fp32"))
        real_size.lay_out(parts, self.device)
        parts.model.eval().requires_grad_(False)
        set_precision(precision, parts.base, parts.model)
        info = InversionInfo(parts.model.source, {}, {"name": "random"}, parts.config.prompt)
        pipeline = InversionPipeline(info, parts.base, parts.backbone, parts.model)
        return pipeline, pipeline.features(self.pictures(self.batch))

    def sampling_row(self, pipeline: InversionPipeline, what: str, count: int, steps: int, seconds: float) -> None:
        self.page.row(
            **{
                "sampling": what,
                "precision": str(pipeline.base.unet.dtype).removeprefix("torch."),
                "images": count,
                "steps": steps,
                "seconds": seconds,
                "images/s": count / seconds,
                f"minutes for {EVALUATION_SIZE}": EVALUATION_SIZE * seconds / count / 60,
                "GB": peak_memory(),
            }
        )


#: name -> what runs, its title, and the seconds it is expected to take on an H100 at real size
PARTS = {
    "step": (GpuBenchmark.step, "Training step, bf16, latents cached", 15),
    "upsampling": (GpuBenchmark.upsampling, "The conditional encoder's upsampling alone", 2),
    "profile": (GpuBenchmark.profile, "Where the step spends its time", 8),
    "step_large": (GpuBenchmark.step_large, "Training step, large batch", 8),
    "sampling": (GpuBenchmark.sampling, "Sampling with guidance, as evaluate.py --precision bf16 draws", 15),
    "sampling_long": (GpuBenchmark.sampling_long, "Sampling with guidance, more steps", 12),
    "sampling_profile": (GpuBenchmark.sampling_profile, "Where two steps of sampling and decoding spend their time", 8),
    "blocks": (GpuBenchmark.blocks, "Blocks without copies between layouts, beside diffusers' own", 20),
    "released": (GpuBenchmark.released, "Training step, the released recipe", 12),
    "sampling_float32": (GpuBenchmark.sampling_float32, "Sampling with guidance, float32", 30),
    "memory": (GpuBenchmark.memory, "Memory of a step", 12),
    "branches": (GpuBenchmark.branches, "Branches of train.py that no processor runs", 45),
    "compiled": (GpuBenchmark.compiled, "Training step, compiled", 150),  # last: it may take all the time that is left
}


def gpu(args: argparse.Namespace) -> None:
    """Measures PARTS, or those of args.parts in that order, and writes benchmark.md and benchmark.json to args.out.

    Raises FeatInvError without a GPU, unless args.small, and for unknown parts.
    """
    if args.device != "cuda" and not args.small:
        raise FeatInvError("gpu measures a CUDA device; --small tries the program out on a processor")
    names = args.parts.split(",") if args.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise FeatInvError(f"--parts {', '.join(unknown)}: expected some of {','.join(PARTS)}")
    make_folder(args.out)
    config = replace(args.config, backbone="resnet10t", input_size=64, encoder_width=16) if args.small else args.config
    page = Page(args.out, args.minutes, facts(args.device, config))
    benchmark = GpuBenchmark(config, args.device, page, args.small)
    for name in names:
        run, title, seconds = PARTS[name]
        page.part(name, title, 1 if args.small else seconds, lambda: run(benchmark))  # noqa: B023
        benchmark.free()
    print(page.markdown())


def facts(device: str, config: TrainConfig) -> dict[str, str]:
    """What was measured on and by what, "device" first."""
    name = f"One {torch.cuda.get_device_name()}" if device == "cuda" else f"{torch.get_num_threads()} processor threads"
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "diffusers", "timm", "transformers", "accelerate")
    )
    return {
        "device": name,
        "versions": f"Python {platform.python_version()}, {versions}, CUDA {torch.version.cuda}",
        "models": (
            f"Stable Diffusion 1.x, {config.backbone}, layer {config.layer}, at random weights and on random images"
        ),
        "command": f"`python training/benchmark.py {' '.join(sys.argv[1:])}`",
    }
