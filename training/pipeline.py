"""The diffusion side of the method in diffusers' classes: the steered model and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, FeatureSource
from featinv_nodes.core.weights import InversionInfo, load_inversion, save_inversion

from .base_model import BaseModel

#: What guidance pushes away from: the same features with empty text (the paper), or zero features with empty text,
#: the combination that training drops to.
NEGATIVES = ("text", "features")


class Inversion(nn.Module):
    """ControlNet and conditional encoder for one FeatureSource; what training trains."""

    def __init__(self, controlnet: ControlNetModel, encoder: nn.Module, source: FeatureSource) -> None:
        super().__init__()
        controlnet.controlnet_cond_embedding = nn.Identity()  # the hint is encoded once per run, outside
        self.controlnet, self.encoder, self.source = controlnet, encoder, source

    @classmethod
    def start(cls, base: BaseModel, source: FeatureSource, width: int = 512, kind: str = "conv") -> Inversion:
        """A copy of the base model's encoder with zero convolutions: at first the output equals the base model's."""
        controlnet = ControlNetModel.from_unet(base.unet)
        settings = {"kind": kind, "channels": source.channels, "out_channels": base.describe()["width"], "width": width}
        if kind == "perceiver":
            settings |= {"tokens": [1, 1] if source.pooled else list(source.grid), "queries": [base.latent_size] * 2}
        model = cls(controlnet, build_encoder(settings), source)
        return model.train().requires_grad_(True)

    @classmethod
    def load(cls, file: str | Path, base: BaseModel) -> tuple[Inversion, InversionInfo]:
        """Reads a weights file for a base model. Raises FeatInvError if the base model is another or keys differ."""
        info, tensors, encoder = load_inversion(file)
        found = base.describe()
        wrong = [f"{k}: {info.base[k]} in the weights file, {found[k]} in the base model" for k in found if k != "name" and info.base[k] != found[k]]
        if wrong:
            raise FeatInvError(f"{file} was trained on {info.base['name']} and does not fit {base.name}. {'; '.join(wrong)}")
        model = cls(ControlNetModel.from_unet(base.unet, load_weights_from_unet=False), encoder, info.source)
        try:
            model.controlnet.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise FeatInvError(f"{file}: ControlNet tensors do not fit the base model. {error}") from error
        return model.eval().requires_grad_(False), info

    def save(self, file: str | Path, info: InversionInfo, dtype: torch.dtype = torch.float32) -> None:
        save_inversion(file, info, self.controlnet.state_dict(), self.encoder, dtype)

    def hint(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Feature values [B, C, h, w] -> hint for latents of grid `size`."""
        return self.encoder(values, size)

    def forward(self, unet: UNet2DConditionModel, noisy: Tensor, t: Tensor, context: Tensor, values: Tensor) -> Tensor:
        """The steered base model's prediction from feature values [B, C_f, h, w], as training calls it."""
        return self.steer(unet, noisy, t, context, self.hint(values, noisy.shape[2:]))

    def steer(self, unet: UNet2DConditionModel, noisy: Tensor, t: Tensor, context: Tensor, hint: Tensor, strength: float = 1.0) -> Tensor:
        """The steered base model's prediction [B, C, H, W] for noisy latents at timesteps t, the hint encoded before."""
        down, mid = self.controlnet(noisy, t, context, hint, conditioning_scale=strength, return_dict=False)
        return unet(noisy, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


@dataclass(frozen=True)
class Sampling:
    """How to draw. steps: DDIM steps. strength: factor on the control residuals. guidance: classifier-free guidance
    scale, 1 for none. negative: see NEGATIVES. start, end: share of the steps in which control acts."""

    steps: int = 50
    strength: float = 1.0
    guidance: float = 1.75
    negative: str = "text"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.negative not in NEGATIVES:
            raise FeatInvError(f"negative {self.negative!r}: expected one of {NEGATIVES}")
        if self.steps < 1 or self.guidance < 0 or not 0 <= self.start <= self.end <= 1:
            raise FeatInvError(f"{self}: expected steps >= 1, guidance >= 0 and 0 <= start <= end <= 1")


def noise(base: BaseModel, seed: int, samples: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """[samples, C, H, W] starting noise, the same numbers that ComfyUI draws for a batch with this seed."""
    size = size or (base.latent_size,) * 2
    return torch.randn(samples, base.unet.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample(base: BaseModel, model: Inversion | None, features: FeatureMap | None, start_noise: Tensor, how: Sampling, prompt: str) -> Tensor:
    """Latents [B, C, H, W] drawn by DDIM (eta 0) from starting noise, a feature map per row.

    Without a model the base model draws alone (the floor of every table). Raises FeatInvError if the features are
    not of the model's source.
    """
    device = base.unet.device
    x = start_noise.to(device)
    hints = None
    if model is not None:
        features.source.require(model.source, "the feature map", "the inversion model")
        values = features.values.to(device)
        hints = model.hint(values, x.shape[2:])
        if how.guidance != 1:
            null = model.hint(torch.zeros_like(values), x.shape[2:]) if how.negative == "features" else hints
            hints = torch.cat([hints, null])
    positive, empty = (base.text[p].expand(len(x), -1, -1) for p in (prompt, ""))
    context = positive if how.guidance == 1 else torch.cat([positive, empty])
    base.scheduler.set_timesteps(how.steps, device=device)
    for number, t in enumerate(base.scheduler.timesteps):
        doubled = x if how.guidance == 1 else torch.cat([x, x])
        if hints is not None and how.start * how.steps <= number < how.end * how.steps and how.strength:
            out = model.steer(base.unet, doubled, t, context, hints, how.strength)
        else:
            out = base.unet(doubled, t, context).sample
        if how.guidance != 1:
            steered, away = out.chunk(2)
            out = away + how.guidance * (steered - away)
        x = base.scheduler.step(out, t, x).prev_sample
    return x


@torch.inference_mode()
def round_trip(base: BaseModel, pictures: Tensor) -> Tensor:
    """The autoencoder's reconstruction at the base model's resolution: the ceiling of every table."""
    side = (base.resolution,) * 2
    if tuple(pictures.shape[2:]) != side:
        pictures = F.interpolate(pictures, side, mode="bilinear", antialias=True)
    return base.decode(base.encode(pictures))
