"""Memory that a training step takes on a GPU, counted without one.

The step runs on tensors without storage (torch's FakeTensorMode), and each storage counts from its first appearance until
nobody holds it. docs/benchmarks/h100.md compares the count with a GPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import real_size
from .base_model import BaseModel
from .config import TrainConfig
from .floor import without_storage
from .memory import MOMENTS
from .objective import draw_chance, latents_from, lighten, training_loss

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

    def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        found = operation(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(found) if isinstance(x, Tensor)):
            self.count(tensor)
        return found


def normalise_as_on_cuda(module: nn.Module) -> None:
    """In float32, as CUDA's autocast does it and the processor's does not."""
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            norm.float().register_forward_pre_hook(lambda _, inputs: inputs[0].float())


def step_gigabytes(config: TrainConfig) -> float:
    """GB at the peak of a step of config.batch pictures of a real-size configuration (Stable Diffusion 1.x), latents and
    features there already, with the frozen parts' weights, gradients (kept from the part before, as where they
    accumulate), the optimizer's moments and the moving average. What a GPU's libraries take for themselves is not in it."""
    parts = real_size.build(config, "meta")
    lighten(config, parts.base, parts.backbone)
    for module in (parts.base.unet, parts.base.vae, parts.backbone, parts.model):
        module.to(memory_format=torch.channels_last)
        normalise_as_on_cuda(module)
    source = parts.model.source
    beside = sum(p.numel() for p in parts.model.parameters()) * (MOMENTS[config.optimizer] + 4 * bool(config.ema))
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, vae, backbone, model = (without_storage(m, "cpu") for m in (parts.base.unet, parts.base.vae, parts.backbone, parts.model))
        base = BaseModel("hollow", unet, vae, parts.base.scheduler, {p: torch.empty(v.shape) for p, v in parts.base.text.items()})
        if config.checkpointing:
            unet.enable_gradient_checkpointing()
            model.controlnet.enable_gradient_checkpointing()
        peak = Peak()
        for module in (unet, vae, backbone, model):
            for tensor in (*module.parameters(), *module.buffers()):
                peak.count(tensor)
        with peak:
            moments = torch.empty(config.batch, 2 * unet.config.in_channels, base.latent_size, base.latent_size)
            features = torch.empty(config.batch, source.channels, *((1, 1) if source.pooled else source.grid))
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext():
                    chance = draw_chance(config.batch, moments, base, config)
                    loss = training_loss(base, backbone, model, latents_from(moments, chance.latent), features, config, chance)
                loss.backward()
    return (peak.peak + beside) / 1e9
