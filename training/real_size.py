"""Training at real size on random weights: our step beside that of the paper's released code.

The released recipe, as a plain reference (facts read in its repository): float32, batch 8, features one picture at a
time with a trip over the processor, autoencoder and text encoder inside the step, the base model's decoder collecting
gradients that nobody uses, checkpointing on.
"""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from featinv_nodes.core.backbones import Backbone, untrained_backbone

from .base_model import BaseModel
from .config import TrainConfig
from .graph import training_step
from .objective import observe, training_loss
from .pipeline import Inversion
from .stable_diffusion import CLIP, SCHEDULE, UNET, VAE, build_text_encoder

#: forward multiply-accumulates of one training step per image that no recipe can avoid (ConvNeXt, last layer): frozen
#: UNet forward, the gradient through its decoder, ControlNet and encoder forward and backward
FLOOR_GMAC = 262.2
#: dense bf16 peak, FLOP/s, by a part of the device's name (NVIDIA's data sheets)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "4090": 165e12}


@dataclass
class Parts:
    """Everything that a training step touches, at random weights."""

    config: TrainConfig
    base: BaseModel
    backbone: Backbone
    model: Inversion
    text_encoder: torch.nn.Module


def build(config: TrainConfig, device: str) -> Parts:
    """The configuration's backbone, Stable Diffusion 1.x, its ControlNet and encoder, float32 on `device`."""
    torch.manual_seed(0)
    with torch.device(device):
        unet, vae, text = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), build_text_encoder()
        backbone = untrained_backbone(config.backbone, config.input_size)
        embeddings = {"": torch.randn(1, 77, CLIP["hidden_size"]), config.prompt: torch.randn(1, 77, CLIP["hidden_size"])}
        base = BaseModel("random", unet.eval(), vae.eval(), DDIMScheduler(**SCHEDULE), embeddings)
        for module in (unet, vae, text):
            module.requires_grad_(False)
        backbone.to(device)
        model = Inversion.start(base, backbone.source(config.layer, config.pooled), config.encoder_width, config.encoder).to(device)
    return Parts(config, base, backbone, model, text)


def released_step(parts: Parts, pictures: Tensor) -> Callable[[], Tensor]:
    """One step of the released recipe on pictures [B, 3, h, w] in 0..1; it returns the loss."""
    p, device = parts, parts.base.unet.device
    for module in (p.base.unet.up_blocks, p.base.unet.conv_norm_out, p.base.unet.conv_out):
        module.requires_grad_(True)  # its encoder runs without gradients, its decoder is never frozen
    p.base.unet.train().enable_gradient_checkpointing()
    p.model.controlnet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=1e-5, fused=False)
    tokens = torch.full((1, 77), CLIP["eos_token_id"], device=device)

    def step() -> Tensor:
        maps = [p.backbone.values(p.backbone.frame(x[None], "stretch"), p.config.layer, p.config.pooled).cpu().numpy() for x in pictures]
        features = torch.cat([torch.from_numpy(m) for m in maps]).to(device)
        with torch.no_grad():
            latents = p.base.encode(F.interpolate(pictures, (p.base.resolution,) * 2, mode="bilinear", antialias=True))
            context = p.text_encoder(tokens.expand(len(pictures), -1))[0]
        t, noise = torch.randint(1000, (len(pictures),), device=device), torch.randn_like(latents)
        noisy = p.base.scheduler.add_noise(latents, noise, t)
        loss = F.mse_loss(p.model(p.base.unet, noisy, t, context, features), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        p.base.unet.zero_grad()
        return loss.detach()

    return step


def our_step(parts: Parts, pictures: Tensor, cached: bool, graph: bool) -> Callable[[], Tensor]:
    """train.py's step on `pictures`: autocast, channels_last, fused optimizer. cached: the latents are there already.
    graph: the step as one CUDA graph."""
    p, device = parts, parts.base.unet.device.type
    p.base.to(device)
    for module in (p.backbone, p.model):
        module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=1e-5, fused=True)
    precision = {"device_type": device, "dtype": torch.bfloat16, "enabled": p.config.precision == "bf16"}
    with torch.autocast(**precision):
        kept = observe(p.base, p.backbone, pictures, p.config)[0] if cached else None

    def gradients() -> Tensor:
        with torch.autocast(**precision):
            if cached:
                with torch.no_grad():
                    features = p.backbone.values(p.backbone.frame(pictures, "stretch"), p.config.layer, p.config.pooled).float()
                latents = kept
            else:
                latents, features = observe(p.base, p.backbone, pictures, p.config)
            loss = training_loss(p.base, p.backbone, p.model, latents, features, p.config)
        loss.backward()
        return loss.detach()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(p.model.parameters(), 1.0)
        optimizer.step()

    return training_step(gradients, update, optimizer, graph)


def seconds(step: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Mean time of a step, after `warm_up` that do not count."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warm_up):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - began) / repeats


def costs(config: TrainConfig) -> dict[str, tuple[float, float]]:
    """part -> (million parameters, forward GMAC per image), by torch's counter on tensors without storage."""
    p = build(config, "meta")
    with torch.device("meta"):
        x, pictures, side = torch.zeros(1, 4, 32, 32), torch.zeros(1, 3, 256, 256), p.backbone.input_size
        t, context, framed = torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, CLIP["hidden_size"]), torch.zeros(1, 3, *side)
        values = torch.zeros(1, p.model.source.channels, *((1, 1) if config.pooled else p.model.source.grid))
        hint, tokens = torch.zeros(1, 320, 32, 32), torch.zeros(1, 77, dtype=torch.long)
    runs = {
        "base model, UNet": (p.base.unet, lambda: p.base.unet(x, t, context)),
        "ControlNet": (p.model.controlnet, lambda: p.model.controlnet(x, t, context, hint)),
        "conditional encoder": (p.model.encoder, lambda: p.model.hint(values, (32, 32))),
        "autoencoder, encode": (p.base.vae.encoder, lambda: p.base.vae.encode(pictures)),
        "autoencoder, decode": (p.base.vae.decoder, lambda: p.base.vae.decode(x)),
        "text encoder": (p.text_encoder, lambda: p.text_encoder(tokens)),
        f"backbone at {side[0]} x {side[1]}": (p.backbone.model, lambda: p.backbone.values(framed, config.layer)),
    }
    return {name: (sum(w.numel() for w in module.parameters()) / 1e6, _gmac(run)) for name, (module, run) in runs.items()}


def _gmac(run: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 2e9


def peak_memory() -> float:
    """GB at most so far: the device's where there is one, else this process's resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
