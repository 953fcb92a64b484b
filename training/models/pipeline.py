"""The diffusion side of the method in diffusers' classes: the steered model and sampling."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, FeatureSource
from featinv_nodes.core.guidance import leave_inference, toward_features
from featinv_nodes.core.prediction import controlled_prediction
from featinv_nodes.core.sampling import SOLVERS, Sampling, sample_latents, starting_noise
from featinv_nodes.core.weights import InversionInfo, load_inversion, save_inversion

from .base_model import BaseModel

Solver = DDIMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler
#: sampling.SOLVERS in diffusers' classes
SOLVER_CLASSES = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}),
}
assert set(SOLVER_CLASSES) == set(SOLVERS)


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
        if kind == "conv_at_map" and source.pooled:
            settings |= {"kernel": 1}  # of a 1 x 1 map, a larger one sees the padding
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
        return controlled_prediction(unet, self.controlnet, noisy, t, context, hint, strength)


def noise(base: BaseModel, seed: int, samples: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """[samples, C, H, W] starting noise, the same numbers that ComfyUI draws for a batch with this seed."""
    return starting_noise((samples, base.unet.config.in_channels, *(size or (base.latent_size,) * 2)), seed)


@torch.inference_mode()
def sample(
    base: BaseModel, model: Inversion | None, features: FeatureMap | None, start_noise: Tensor, how: Sampling, prompt: str, backbone: Backbone | None = None
) -> Tensor:
    """Latents [B, C, H, W] drawn from starting noise, a feature map per row: core.sampling.sample_latents.

    Without a model the base model draws alone (the unconditional baseline of every table). backbone: where the features come from, for
    how.gradient. Each call has a solver of its own. Raises FeatInvError if the features are not of the model's source,
    or the backbone that the gradient needs is missing.
    """
    x, text = start_noise.to(base.unet.device), {True: base.text[prompt], False: base.text[""]}
    if model is None:
        return sample_latents(base.unet, None, {}, solver_of(base, how), x, text, how)
    if how.gradient and backbone is None:
        raise FeatInvError(f"gradient {how.gradient:g}: guidance by the gradient needs the backbone of the features")
    features.source.require(model.source, "the feature map", "the inversion model")
    features = features.to(x.device)
    given = {True: features.values, False: torch.zeros_like(features.values)}
    hints = {cond: model.hint(given[cond], x.shape[2:]) for cond in dict.fromkeys(cond for cond, _ in how.weights())}
    toward = partial(toward_features, picture_of=base.decode, backbone=backbone, target=features, step=how.gradient) if how.gradient else None
    if how.gradient:
        leave_inference(base.vae)
    return sample_latents(base.unet, model.controlnet, hints, solver_of(base, how), x, text, how, toward)


def solver_of(base: BaseModel, how: Sampling) -> Solver:
    """A new solver with the base model's noise schedule, prediction and spacing of timesteps; multistep ones remember
    earlier steps, so none is used twice."""
    kind, settings = SOLVER_CLASSES[how.solver]
    return kind.from_config(base.scheduler.config, **settings)


@torch.inference_mode()
def round_trip(base: BaseModel, pictures: Tensor) -> Tensor:
    """The autoencoder's reconstruction at the base model's resolution: what every table sets beside the reconstructions."""
    side = (base.resolution,) * 2
    if tuple(pictures.shape[2:]) != side:
        pictures = F.interpolate(pictures, side, mode="bilinear", antialias=True)
    return base.decode(base.encode(pictures))
