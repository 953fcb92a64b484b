"""Memory that a training step takes on a GPU, counted without one.

The step runs on tensors without storage (torch's FakeTensorMode), and each storage counts from its first appearance
until nobody holds it. docs/benchmarks/h100.md compares the count with a GPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import TrainConfig
from ..loop import memory
from ..loop.flops import base_without_storage, without_storage
from ..models.channels_last import ChannelsLastGroupNorm, FusedGEGLU
from . import real_size
from .real_size import Parts

BLOCK = 512  # bytes that CUDA's allocator rounds up to


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most there were: .now and .peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), size)

    def _gone(self, storage: int, size: int) -> None:
        self.alive.discard(storage)
        self.now -= size

    def __torch_dispatch__(
        self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        outputs = operation(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(outputs) if isinstance(x, Tensor)):
            self.count(tensor)
        return outputs


class Kernel(torch.autograd.Function):
    """The memory of a kernel that keeps its input, and writes its result and a gradient of its input's size."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, channels: int, dimension: int) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x.narrow(dimension, 0, channels))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None


def stand_in_for_kernels(module: nn.Module) -> None:
    """Kernel where on a GPU one of training.models's kernels runs."""
    for part in module.modules():
        if isinstance(part, ChannelsLastGroupNorm):
            part.forward = lambda x, silu=False: Kernel.apply(x, x.shape[1], 1)
        elif isinstance(part, FusedGEGLU):
            part.forward = lambda x, proj=part.proj: Kernel.apply(proj(x), proj.out_features // 2, -1)


def without_memory(config: TrainConfig) -> Parts:
    """The parts of a real-size configuration (Stable Diffusion 1.x), laid out as on a GPU, on the meta device."""
    parts = real_size.build(config, "meta")
    real_size.lay_out(parts, "cuda")
    return parts


def activation_gigabytes(parts: Parts, batch: int, checkpointing: bool) -> float:
    """GB that a step of `batch` pictures takes at its peak beyond weights and gradients, which are kept from the part
    before, as where they accumulate; latents and features are there already. parts: of without_memory. What a GPU's
    libraries take for themselves is not in it."""
    source = parts.model.source
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = base_without_storage(parts.base, "cpu")
        backbone, model = (without_storage(part, "cpu") for part in (parts.backbone, parts.model))
        for part in (base.unet, model):
            stand_in_for_kernels(part)
        on_meta = replace(parts, base=base, backbone=backbone, model=model)
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
            model.controlnet.enable_gradient_checkpointing()
        peak = Peak()
        for module in (base.unet, base.vae, backbone, model):
            for parameter in module.parameters():
                peak.count(parameter)
        with peak:
            moments = torch.empty(batch, 2 * base.unet.config.in_channels, base.latent_size, base.latent_size)
            features = torch.empty(batch, source.channels, *((1, 1) if source.pooled else source.grid))
            for _ in range(2):
                real_size.gradients(on_meta, model, {"moments": moments, "features": features})
    return peak.peak / 1e9 - needed(parts, average=False, moments=0)


def needed(parts: Parts, average: bool, moments: int) -> float:
    """memory.needed of the parts."""
    return memory.needed(parts.model, [parts.base.unet, parts.base.vae, parts.backbone], average, moments)


def step_gigabytes(config: TrainConfig) -> float:
    """GB at the peak of a step of a real-size configuration: weights, gradients, moments, average and activations."""
    parts = without_memory(config)
    return needed(parts, bool(config.ema), memory.MOMENTS[config.optimizer]) + activation_gigabytes(
        parts, config.batch, config.checkpointing
    )
