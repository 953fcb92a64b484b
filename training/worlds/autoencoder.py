"""Trains a world's autoencoder: of the drawn world both halves, of photographs the decoder of principal components."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.core.patch_autoencoder import PatchAutoencoder
from featinv_nodes.worlds.drawn.scenes import draw

from .backbones import normalise
from .loop import train_stage

IMAGES, BATCH, LR = 240_000, 64, 2e-3
STOP = 54_528  # it ends early on its schedule: by then it is better than the rest needs
DECODER_IMAGES = 112_000
DECODER_NOISE = (0.6, 0.8)  # largest standard deviation in the first quarter, and after it
PERCEPTUAL_FROM = 40_000  # pictures seen before the backbone's features join the loss


class RoundTrip(nn.Module):
    """Encodes, adds a little noise so that the decoder forgives the diffusion model's own errors, and decodes."""

    def __init__(self, vae: PatchAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.vae.encode(x)
        return self.vae.decode(z + 0.05 * noise * z.detach().float().std()), z


def pixel_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 and squared error on pixels, L1 on their horizontal and vertical differences (edges)."""
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges


def feature_loss(maps_of: Callable[[Tensor], list[Tensor]], y: Tensor, x: Tensor) -> Tensor:
    """Mean of 1 - cosine over a backbone's stages and locations; x, y in -1..1, maps_of: pictures -> maps of every
    stage."""
    with torch.no_grad():
        target = maps_of(x)
    return cosine_distance(target, maps_of(y))


def cosine_distance(target: list[Tensor], maps: list[Tensor]) -> Tensor:
    """Mean of 1 - cosine over maps [B, C, H, W] and their locations."""
    distances = [1 - F.cosine_similarity(a.float(), b.float(), dim=1).mean() for a, b in zip(target, maps)]
    return torch.stack(distances).mean()


def stages_of(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """What feature_loss asks, of a timm model that reads the autoencoder's pictures as they are."""
    return partial(model.forward_intermediates, intermediates_only=True)


def train_autoencoder(
    work: Path, backbone: nn.Module, device: str = "cpu", seed: int = 0, compile: bool = True
) -> PatchAutoencoder:
    """Trains on scenes drawn on the fly: pixels first, then pixels and the features of the CNN."""
    torch.manual_seed(seed)
    vae = PatchAutoencoder()
    vae.start_from_patches(normalise(draw(seed, torch.arange(500)).image))
    model = RoundTrip(vae).to(device, memory_format=torch.channels_last)
    backbone = backbone.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    forward = torch.compile(model) if compile else model

    def loss_of(indices: Tensor) -> Tensor:
        x = normalise(draw(seed, indices).image).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            y, z = forward(x, torch.randn(len(x), vae.latents, 8, 8, device=device))
            y = y.float()
            loss = pixel_loss(y, x) + 1e-3 * z.float().square().mean()
            if indices[0] >= PERCEPTUAL_FROM:
                loss = loss + 0.3 * feature_loss(stages_of(backbone), y, x)
        return loss

    average = train_stage(
        "autoencoder",
        model,
        loss_of,
        images=IMAGES,
        stop=STOP,
        batch=BATCH,
        lr=LR,
        work=work,
        ema=0.998,
        decay=0.01,
        device=device,
    )
    return standardise(average.vae.cpu(), normalise(draw(seed, torch.arange(500)).image))


def train_decoder(
    work: Path,
    vae: PatchAutoencoder,
    pictures: Callable[[Tensor], Tensor],
    maps_of: Callable[[Tensor], list[Tensor]],
    device: str = "cpu",
    batch: int = BATCH,
    noise: tuple[float, float] = DECODER_NOISE,
    later: int = DECODER_IMAGES // 4,
    compile: bool = True,
    **stage,  # of train_stage
) -> PatchAutoencoder:
    """Trains the decoder alone to forgive noisy latents, as those that a diffusion model draws are (RAE, Zheng et al.
    2025, trains its decoder so). The latents stay as they are, so models trained on them stay valid.

    pictures: image numbers [B] -> pictures [B, 3, h, w] in -1..1. maps_of: as in feature_loss. noise: its largest
    standard deviation in the first `later` images, and after them; one level per picture, in units of the latents' own
    standard deviation.
    """
    vae.requires_grad_(False).to(device, memory_format=torch.channels_last)
    for part in (vae.expand, vae.decoder):
        part.requires_grad_(True)
    decode = torch.compile(vae.decode) if compile else vae.decode

    def loss_of(indices: Tensor) -> Tensor:
        x = pictures(indices).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).float()
            largest = torch.where(indices[:1] >= later, noise[1], noise[0])
            level = largest * torch.rand(len(z), 1, 1, 1, device=device)
            y = decode(z + level * torch.randn_like(z)).float()
            return pixel_loss(y, x) + 0.3 * feature_loss(maps_of, y, x)

    return train_stage(
        "decoder", vae, loss_of, batch=batch, lr=LR, work=work, ema=0.998, decay=0.01, device=device, **stage
    ).cpu()


@torch.no_grad()
def standardise(vae: PatchAutoencoder, pictures: Tensor) -> PatchAutoencoder:
    """Gives the latents of pictures [B, 3, h, w] in -1..1 zero mean per channel and unit variance over all, exactly
    undone by decode.

    The channels keep the square root of their ratio of deviations: a compromise between weighing fine detail like
    the rest and hardly at all.
    """
    z = vae.encode(pictures) * vae.deviation + vae.mean
    vae.mean.copy_(z.mean((0, 2, 3))[:, None, None])
    vae.deviation.copy_(z.std((0, 2, 3)).sqrt()[:, None, None])
    vae.deviation *= ((z - vae.mean) / vae.deviation).std()
    return vae
