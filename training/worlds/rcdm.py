"""Trains a small RCDM for the drawn world from scratch, to compare as in Table 4 at the same compute."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.worlds.drawn.scenes import draw
from training.evaluation.rcdm import RCDM, SCHEDULE

from .loop import train_stage

#: as large beside the backbone's 64 pixels as the published 128 beside 224
RESOLUTION, WIDTHS = 32, (32, 64, 96)
BATCH, LR, STEPS = 64, 1e-3, 50
#: multiply-accumulates per picture in training, in units of 10^9: three times the network's for its step, and what it
#: is conditioned on. The inversion model of pooled features: control net, frozen base, autoencoder and backbone
COST, INVERSION_COST, INVERSION_IMAGES = 1.513 + 0.047, 0.584 + 0.127, 529_664
#: as much compute as tiny_cnn_pooled had, in whole batches
IMAGES = round(INVERSION_IMAGES * INVERSION_COST / COST) // BATCH * BATCH


def train_rcdm(work: Path, backbone: Backbone, images: int, device: str = "cpu", seed: int = 0) -> RCDM:
    """Trains it to predict the noise in training scenes at 32 pixels (Ho et al. 2020), given the backbone's averaged
    last feature map of the same scenes at its own resolution."""
    torch.manual_seed(seed)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    model = RCDM(backbone.source(LAST, True).channels, WIDTHS, RESOLUTION).to(device, memory_format=torch.channels_last)
    forward, scheduler = torch.compile(model), DDIMScheduler(**SCHEDULE)

    def loss_of(numbers: Tensor) -> Tensor:
        pictures = draw(seed, numbers).image
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                vectors = backbone.values(backbone.preprocess(pictures, "stretch"), LAST, True).flatten(1)
            x = 2 * F.interpolate(pictures, (RESOLUTION,) * 2, mode="bilinear", antialias=True) - 1
            t, noise = torch.randint(1000, (len(x),), device=device), torch.randn_like(x)
            pred = forward(scheduler.add_noise(x, noise, t).to(memory_format=torch.channels_last), t, vectors)
        return F.mse_loss(pred.float(), noise)

    return train_stage("rcdm", model, loss_of, images=images, batch=BATCH, lr=LR, work=work, decay=0.01, device=device)
