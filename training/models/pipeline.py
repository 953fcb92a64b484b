"""The diffusion side of the method in diffusers' classes: the steered model and sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.encoders import build_encoder
from featinv_nodes.core.feature_map import FeatInvError, FeatureMap, FeatureSource
from featinv_nodes.core.guidance import leave_inference, toward_features
from featinv_nodes.core.weights import InversionInfo, load_inversion, save_inversion

from .base_model import BaseModel, in_own_precision

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
        down, mid = self.controlnet(noisy, t, context, hint, conditioning_scale=strength, return_dict=False)
        with in_own_precision(unet) as own:
            down, mid = [own(x) for x in down], own(mid)
            return unet(own(noisy), t, own(context), down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


#: Solvers, all at the base model's own timesteps. ComfyUI's KSampler gives the pictures of the first two with samplers
#: "ddim" and "dpmpp_2m" and scheduler "simple": second order in the logarithm of the signal-to-noise ratio but for the
#: first step and the last, to no noise (Lu et al. 2022b). UniPC: Zhao et al. 2023, second order, B2(h) = e^h - 1.
SOLVERS = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}),
}


@dataclass(frozen=True)
class Sampling:
    """How to draw. steps: of the solver. strength: factor on the control residuals. guidance: classifier-free guidance
    scale, 1 for none. negative: see NEGATIVES. start, end: share of the steps in which control acts. solver: one of
    SOLVERS. text_guidance: the text's own scale, guidance being that of the features then; None for one scale of both.
    gradient: step of toward_features, 0 for none, in the last gradient_steps steps. best_of: see Opened.best.
    """

    steps: int = 50
    strength: float = 1.0
    guidance: float = 1.75
    negative: str = "text"
    start: float = 0.0
    end: float = 1.0
    solver: str = "ddim"
    text_guidance: float | None = None
    gradient: float = 0.0
    gradient_steps: int = 10
    best_of: int = 1

    def __post_init__(self) -> None:
        if self.negative not in NEGATIVES:
            raise FeatInvError(f"negative {self.negative!r}: expected one of {NEGATIVES}")
        if self.solver not in SOLVERS:
            raise FeatInvError(f"solver {self.solver!r}: expected one of {', '.join(SOLVERS)}")
        if self.steps < 1 or not 0 <= self.guidance < math.inf or not 0 <= self.start <= self.end <= 1:
            raise FeatInvError(f"{self}: expected steps >= 1, guidance >= 0 and 0 <= start <= end <= 1")
        if self.text_guidance is not None and self.text_guidance < 0:
            raise FeatInvError(f"text guidance {self.text_guidance}: expected a scale of at least 0, or None for one scale of features and text")
        if self.text_guidance is not None and self.negative == "text":
            raise FeatInvError(
                f"text guidance {self.text_guidance} beside negative 'text': two guidances apart start from neither text nor features; "
                "set negative to 'features', or leave the text guidance out"
            )
        if self.gradient < 0 or self.gradient_steps < 0 or self.best_of < 1:
            raise FeatInvError(f"{self}: expected gradient >= 0, gradient_steps >= 0 and best_of >= 1")

    @classmethod
    def chosen(cls, recommended: Mapping, changes: Mapping) -> Sampling:
        """A weights file's settings with the changes, of which None leaves a setting alone. Changing to negative "text"
        lets go of a recommended text guidance, which means nothing there."""
        changes = {name: value for name, value in changes.items() if value is not None}
        dropped = {"text_guidance": None} if changes.get("negative") == "text" else {}
        return cls(**(dict(recommended) | dropped | changes))

    def weights(self, steered: bool = True) -> dict[tuple[bool, bool], float]:
        """(features shown, text given) -> share of that prediction in the guided one; the shares sum to 1, and what has
        none is not evaluated.

        One scale: e(away) + guidance (e(f, p) - e(away)), away being (f, "") or (0, ""). Two scales, as InstructPix2Pix
        composes two conditions (Brooks et al. 2023, Eq. 3): e(0, "") + guidance (e(f, "") - e(0, ""))
        + text_guidance (e(f, p) - e(f, "")). Not steered: features make no difference and count as not shown.
        """
        g = self.guidance
        if self.text_guidance is not None:
            shares = [(True, True, self.text_guidance), (True, False, g - self.text_guidance), (False, False, 1 - g)]
        else:
            shares = [(True, True, g), (self.negative == "text", False, 1 - g)]
        found: dict[tuple[bool, bool], float] = {}
        for shown, text, share in shares:
            found[shown and steered, text] = found.get((shown and steered, text), 0.0) + share
        return {branch: share for branch, share in found.items() if abs(share) > 1e-9}  # of rounding

    @property
    def evaluations(self) -> int:
        """Evaluations of the steered model for a picture."""
        return self.steps * len(self.weights()) * self.best_of


def noise(base: BaseModel, seed: int, samples: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """[samples, C, H, W] starting noise, the same numbers that ComfyUI draws for a batch with this seed."""
    size = size or (base.latent_size,) * 2
    return torch.randn(samples, base.unet.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample(
    base: BaseModel, model: Inversion | None, features: FeatureMap | None, start_noise: Tensor, how: Sampling, prompt: str, backbone: Backbone | None = None
) -> Tensor:
    """Latents [B, C, H, W] drawn from starting noise, a feature map per row, without further noise.

    Without a model the base model draws alone (the floor of every table). backbone: where the features come from, for
    how.gradient. Each call has a solver of its own. Raises FeatInvError if the features are not of the model's source,
    or the backbone that the gradient needs is missing.
    """
    device = base.unet.device
    x = start_noise.to(device)
    if how.gradient and model is not None and backbone is None:
        raise FeatInvError(f"gradient {how.gradient:g}: guidance by the gradient needs the backbone of the features")
    weights, hints = how.weights(model is not None), None
    if model is not None:
        features.source.require(model.source, "the feature map", "the inversion model")
        features = features.to(device)
        given = {True: features.values, False: torch.zeros_like(features.values)}
        encoded = {shown: model.hint(given[shown], x.shape[2:]) for shown in dict.fromkeys(shown for shown, _ in weights)}
        hints = torch.cat([encoded[shown] for shown, _ in weights])
    context = torch.cat([base.text[prompt if text else ""].expand(len(x), -1, -1) for _, text in weights])
    solver = solver_of(base, how)
    if how.gradient:
        leave_inference(base.vae)
    set_steps(solver, how.steps)
    for number, t in enumerate(solver.timesteps):
        copies = x.repeat(len(weights), 1, 1, 1)
        if hints is not None and how.start * how.steps <= number < how.end * how.steps and how.strength:
            out = model.steer(base.unet, copies, t, context, hints, how.strength)
        else:
            out = base.unet(copies, t, context).sample
        out = sum(share * part for share, part in zip(weights.values(), out.split(len(x))))
        if how.gradient and model is not None and number >= how.steps - how.gradient_steps:
            clean = predicted_clean(base, x, out, t)
            out = prediction_of(base, x, toward_features(clean, base.decode, backbone, features, how.gradient), t)
        x = solver.step(out, t, x).prev_sample
    return x


def set_steps(solver: DDIMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler, steps: int) -> None:
    """The solver's timesteps, `steps` of them. For some numbers diffusers' "trailing" spacing, which counts down in floating
    point, gives one more, below zero: 61, 103 and sixty others up to 1000. Raises FeatInvError for more than there are."""
    if steps > (most := solver.config.num_train_timesteps):
        raise FeatInvError(f"steps {steps}: the base model has {most} timesteps; give at most as many")
    solver.set_timesteps(steps)
    if len(solver.timesteps) > steps:
        solver.timesteps = solver.timesteps[:steps]
        if hasattr(solver, "sigmas"):
            solver.sigmas = torch.cat([solver.sigmas[:steps], solver.sigmas[-1:]])
        solver.num_inference_steps = steps


def solver_of(base: BaseModel, how: Sampling) -> DDIMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler:
    """A new solver with the base model's noise schedule, prediction and spacing of timesteps; multistep ones remember
    earlier steps, so none is used twice."""
    kind, settings = SOLVERS[how.solver]
    return kind.from_config(base.scheduler.config, **settings)


def predicted_clean(base: BaseModel, noisy: Tensor, found: Tensor, t: Tensor) -> Tensor:
    """x0_hat: the clean latents [B, C, H, W] that a prediction `found` amounts to, at a timestep for all or t [B]."""
    signal, spread = _scales(base, noisy, t)
    return signal * noisy - spread * found if _velocity(base) else (noisy - spread * found) / signal


def prediction_of(base: BaseModel, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The prediction at timestep t that amounts to the clean latents: the inverse of predicted_clean."""
    signal, spread = _scales(base, noisy, t)
    return (signal * noisy - clean) / spread if _velocity(base) else (noisy - signal * clean) / spread


def _scales(base: BaseModel, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    kept = base.scheduler.alphas_cumprod.to(noisy.device)[t].reshape(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


def _velocity(base: BaseModel) -> bool:
    return base.scheduler.config.prediction_type == "v_prediction"


@torch.inference_mode()
def round_trip(base: BaseModel, pictures: Tensor) -> Tensor:
    """The autoencoder's reconstruction at the base model's resolution: the ceiling of every table."""
    side = (base.resolution,) * 2
    if tuple(pictures.shape[2:]) != side:
        pictures = F.interpolate(pictures, side, mode="bilinear", antialias=True)
    return base.decode(base.encode(pictures))
