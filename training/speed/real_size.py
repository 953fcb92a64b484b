"""Training at real size on random weights: our step beside that of the paper's released code.

The released recipe, as a plain reference (facts read in its repository): float32, batch 8, features one picture at a
time with a trip over the processor, autoencoder and text encoder inside the step, the base model's decoder collecting
gradients that nobody uses, checkpointing on, gradients not clipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from featinv_nodes.core.backbone_opening import untrained_backbone
from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.objective import latents_from

from ..config import TrainConfig
from ..loop.graph import training_step
from ..loop.objective import cast_frozen, moments_of, observe, sample_noise, training_loss
from ..loop.optimizer import LARGEST_NORM, build_optimizer, fused_step, weights_layout
from ..models.base_model import BaseModel
from ..models.channels_last import keep_channels_last
from ..models.controlnet import FeatureControlNet
from ..models.flops import gmac_of
from ..models.stable_diffusion import CLIP, SCHEDULE, UNET, VAE, build_text_encoder

Step = Callable[[], Tensor]  # one training step, which returns the loss


@dataclass
class Parts:
    """Everything that a training step touches, at random weights."""

    config: TrainConfig
    base: BaseModel
    backbone: Backbone
    model: FeatureControlNet
    text_encoder: torch.nn.Module


def empty_text(device: torch.device | str) -> Tensor:
    """[1, 77] tokens, which stand for any text."""
    return torch.full((1, 77), CLIP["eos_token_id"], device=device)


#: fields of Stable Diffusion's parts that make them narrow, and their latents small, for trying a program out
SMALL = {
    "unet": {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
    },
    "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "text": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
}


def build(config: TrainConfig, device: str, changes: Mapping[str, dict] | None = None) -> Parts:
    """The configuration's backbone, Stable Diffusion 1.x, its ControlNet and encoder, float32 on `device`. changes: of
    fields of its parts, as SMALL has them."""
    torch.manual_seed(0)
    fields = {"unet": {}, "vae": {}, "text": {}} | dict(changes or {})
    with torch.device(device):
        unet, vae, text = (
            UNet2DConditionModel(**UNET | fields["unet"]),
            AutoencoderKL(**VAE | fields["vae"]),
            build_text_encoder(**fields["text"]),
        )
        backbone = untrained_backbone(config.backbone, config.input_size)
        with torch.no_grad():
            embedding = text.eval()(empty_text(device))[0]
        base = BaseModel(
            "random", unet.eval(), vae.eval(), DDIMScheduler(**SCHEDULE), {"": embedding, config.prompt: embedding}
        )
        for module in (unet, vae, text):
            module.requires_grad_(False)
        backbone.to(device)
        model = FeatureControlNet.start(
            base, backbone.source(config.layer, config.pooled), config.encoder_width, config.encoder
        ).to(device)
    return Parts(config, base, backbone, model, text)


def released_step(parts: Parts, pictures: Tensor) -> Step:
    """One step of the released recipe on pictures [B, 3, h, w] in 0..1; it returns the loss."""
    p, device = parts, parts.base.unet.device
    for module in (p.base.unet.up_blocks, p.base.unet.conv_norm_out, p.base.unet.conv_out):
        module.requires_grad_(True)  # its encoder runs without gradients, its decoder is never frozen
    p.base.unet.train().enable_gradient_checkpointing()
    p.model.controlnet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=1e-5, fused=False)
    tokens = empty_text(device)

    def step() -> Tensor:
        maps = [
            p.backbone.values(p.backbone.preprocess(x[None], "stretch"), p.config.layer, p.config.pooled).cpu().numpy()
            for x in pictures
        ]
        features = torch.cat([torch.from_numpy(m) for m in maps]).to(device)
        with torch.no_grad():
            moments = moments_of(
                p.base, F.interpolate(pictures, (p.base.resolution,) * 2, mode="bilinear", antialias=True)
            )
            noise, t, dropped, latent = sample_noise(len(pictures), moments, p.base, p.config)
            context = p.text_encoder(tokens.expand(len(pictures), -1))[0]
            latents = latents_from(moments, latent)
        noisy = p.base.scheduler.add_noise(latents, noise, t)
        cond = features.masked_fill(dropped[:, None, None, None], 0.0)
        loss = F.mse_loss(p.model(p.base.unet, noisy, t, context, cond), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        p.base.unet.zero_grad()
        return loss.detach()

    return step


def lay_out(parts: Parts, device: str, own_blocks: bool = True) -> None:
    """The parts in train.py's layouts for a device and in its precision, in place. own_blocks: with those of
    training.models.channels_last on a CUDA device, as train.py has them."""
    models = (parts.base.unet, parts.base.vae, parts.model)
    for part in (*models, parts.backbone):
        part.to(memory_format=torch.channels_last)
    parts.model.to(memory_format=weights_layout(parts.config, device))
    if own_blocks and device == "cuda":
        for part in models:
            keep_channels_last(part)
    cast_frozen(parts.config, parts.base, parts.backbone)


def in_precision(parts: Parts) -> torch.autocast:
    return torch.autocast(parts.base.unet.device.type, torch.bfloat16, parts.config.precision == "bf16")


def gradients(parts: Parts, trained: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of what observe() is given, and its gradients in the trained part, which may be compiled."""
    with in_precision(parts):
        moments, features = observe(parts.base, parts.backbone, batch, parts.config)
        sample = sample_noise(len(moments), moments, parts.base, parts.config)
        loss = training_loss(
            parts.base, parts.backbone, trained, latents_from(moments, sample.latent), features, parts.config, sample
        )
    loss.backward()
    return loss.detach()


#: what our step finds on the disk
CACHES = {"nothing cached": (), "latents cached": ("moments",), "latents and features cached": ("moments", "features")}


def our_step(
    parts: Parts,
    pictures: Tensor,
    cached: tuple[str, ...] = (),
    graph: bool = False,
    largest_norm: float = LARGEST_NORM,
    own_blocks: bool = True,
) -> Step:
    """train.py's step on pictures [B, 3, h, w] in 0..1: frozen parts in bf16 where the precision is, train.py's
    layouts, fused optimizer, compiled where the configuration says so. cached: a value of CACHES. graph: the step as
    one CUDA graph. own_blocks: see lay_out.
    """
    p, device = parts, parts.base.unet.device.type
    lay_out(p, device, own_blocks)
    optimizer = build_optimizer(p.model, p.config)
    target = F.interpolate(pictures, (p.base.resolution,) * 2, mode="bilinear", antialias=True)
    batch = {"pictures": pictures} | ({} if target.shape == pictures.shape else {"target": target})
    with in_precision(p):
        known = dict(zip(("moments", "features"), observe(p.base, p.backbone, batch, p.config))) if cached else {}
    batch |= {name: known[name] for name in cached}
    trained = torch.compile(p.model) if p.config.compile else p.model

    return training_step(
        lambda: gradients(p, trained, batch), lambda: fused_step(optimizer, largest_norm), optimizer, graph
    )


def losses(step: Callable[[], Tensor], count: int) -> list[float]:
    """Of `count` steps, each with its own seed, so that two recipes draw the same noise and timesteps."""
    values = []
    for number in range(count):
        torch.manual_seed(number)
        values.append(step().item())
    return values


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


def costliest(step: Callable[[], object], rows: int) -> str:
    """A table of the operations, on a GPU the kernels, that a step spends most time in, by torch's profiler."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        step()
    return profiler.key_averages().table(
        sort_by=f"self_{'device' if gpu else 'cpu'}_time_total", row_limit=rows, max_name_column_width=60
    )


def costs(config: TrainConfig) -> dict[str, tuple[float, float]]:
    """part -> (million parameters, forward GMAC per image), by torch's counter on tensors without storage."""
    p = build(config, "meta")
    with torch.device("meta"):
        x, pictures, side = torch.zeros(1, 4, 32, 32), torch.zeros(1, 3, 256, 256), p.backbone.input_size
        t, context, pixel_values = (
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, 77, CLIP["hidden_size"]),
            torch.zeros(1, 3, *side),
        )
        values = torch.zeros(1, p.model.source.channels, *((1, 1) if config.pooled else p.model.source.grid))
        hint, tokens = torch.zeros(1, 320, 32, 32), torch.zeros(1, 77, dtype=torch.long)
    runs = {
        "base model, UNet": (p.base.unet, lambda: p.base.unet(x, t, context)),
        "ControlNet": (p.model.controlnet, lambda: p.model.controlnet(x, t, context, hint)),
        "conditional encoder": (p.model.encoder, lambda: p.model.hint(values, (32, 32))),
        "autoencoder, encode": (p.base.vae.encoder, lambda: p.base.vae.encode(pictures)),
        "autoencoder, decode": (p.base.vae.decoder, lambda: p.base.vae.decode(x)),
        "text encoder": (p.text_encoder, lambda: p.text_encoder(tokens)),
        f"backbone at {side[0]} x {side[1]}": (p.backbone.model, lambda: p.backbone.values(pixel_values, config.layer)),
    }
    return {
        name: (sum(w.numel() for w in module.parameters()) / 1e6, _gmac(run)) for name, (module, run) in runs.items()
    }


def _gmac(run: Callable[[], object]) -> float:
    with torch.no_grad():
        return gmac_of(run)
