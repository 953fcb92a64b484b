"""From noise and a feature map to latents: the sampling loop (paper Sec. 2 and 4.1), with any solver.

A solver is a scheduler as diffusers has them: what core.prediction takes, with `set_timesteps(steps)`, `timesteps` and
`step(prediction, t, x).prev_sample`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import FeatInvError
from .guidance import NEGATIVES, guidance_weights
from .prediction import UNet, controlled_prediction, noised, predicted_clean, prediction, prediction_of

#: Solvers, all at the base model's own timesteps. ComfyUI's KSampler gives the pictures of the first two with samplers
#: "ddim" and "dpmpp_2m" and scheduler "simple": second order in the logarithm of the signal-to-noise ratio but for the
#: first step and the last, to no noise (Lu et al. 2022b). UniPC: Zhao et al. 2023, second order, B2(h) = e^h - 1.
SOLVERS = ("ddim", "dpmpp_2m", "unipc")
#: Which of the base model's timesteps a solver takes, in diffusers' words, and the scheduler of ComfyUI's KSampler that
#: takes the same. "trailing" begins at the last timestep, with pure noise; "leading" ends at the second, 1: as the
#: official code of Stable Diffusion, ControlNet and the paper does, wherever the steps divide the timesteps.
SPACINGS = {"trailing": "simple", "leading": "ddim_uniform"}

#: the paper's settings, of unpooled and of pooled features (Table 3's caption)
PAPER_SAMPLING = {"strength": 1.0, "guidance": 1.75, "negative": "text", "steps": 50}
PAPER_POOLED = PAPER_SAMPLING | {"strength": 1.5, "guidance": 8.0}


@dataclass(frozen=True)
class Sampling:
    """How to draw. steps: of the solver. strength: factor on the control residuals. guidance: classifier-free guidance
    scale, 1 for none. negative: see guidance.NEGATIVES. start, end: share of the steps in which control acts. solver:
    one of SOLVERS. text_guidance: the text's own scale, guidance being that of the features then; None for one scale of
    both.
    gradient: step of guidance.toward_features, 0 for none, in the last gradient_steps steps. best_of: so many pictures
    are drawn of each map, and the one of the highest cosine similarity is kept. timestep_spacing: one of SPACINGS.
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
    timestep_spacing: str = "trailing"

    def __post_init__(self) -> None:
        if self.negative not in NEGATIVES:
            raise FeatInvError(f"negative {self.negative!r}: expected one of {NEGATIVES}")
        if self.solver not in SOLVERS:
            raise FeatInvError(f"solver {self.solver!r}: expected one of {', '.join(SOLVERS)}")
        if self.timestep_spacing not in SPACINGS:
            raise FeatInvError(f"timestep spacing {self.timestep_spacing!r}: expected one of {', '.join(SPACINGS)}")
        for name in ("steps", "best_of", "gradient_steps"):
            if (value := getattr(self, name)) < (least := int(name != "gradient_steps")):
                raise FeatInvError(f"{name.replace('_', ' ')} {value}: expected at least {least}")
        for name in ("guidance", "gradient"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise FeatInvError(f"{name} {value}: expected a finite number of at least 0")
        if not math.isfinite(self.strength):
            raise FeatInvError(f"strength {self.strength}: expected a finite number")
        if not 0 <= self.start <= self.end <= 1:
            raise FeatInvError(f"control from start {self.start} to end {self.end}: expected 0 <= start <= end <= 1")
        if self.text_guidance is not None and not 0 <= self.text_guidance < math.inf:
            raise FeatInvError(
                f"text guidance {self.text_guidance}: expected a scale of at least 0, or None for one scale of features"
                " and text"
            )
        if self.text_guidance is not None and self.negative == "text":
            raise FeatInvError(
                f"text guidance {self.text_guidance} with negative 'text': separate guidance scales start from"
                " neither text nor features; set negative to 'features', or leave out the text guidance"
            )

    @classmethod
    def chosen(cls, recommended: Mapping, changes: Mapping) -> Sampling:
        """A weights file's settings with the changes, of which None leaves a setting alone. Changing to negative "text"
        lets go of a recommended text guidance, which means nothing there."""
        changes = {name: value for name, value in changes.items() if value is not None}
        dropped = {"text_guidance": None} if changes.get("negative") == "text" else {}
        return cls(**(dict(recommended) | dropped | changes))

    def weights(self, controlled: bool = True) -> dict[tuple[bool, bool], float]:
        """guidance.guidance_weights of these settings."""
        return guidance_weights(self.guidance, self.negative, self.text_guidance, controlled)

    @property
    def evaluations(self) -> int:
        """Evaluations of the controlled model for a picture."""
        return self.steps * len(self.weights()) * self.best_of

    def controls(self, step: int) -> bool:
        """Whether the ControlNet acts in a step, counted from 0."""
        return self.start * self.steps <= step < self.end * self.steps and self.strength != 0

    def moves(self, step: int) -> bool:
        """Whether a step, counted from 0, ends with guidance by the gradient."""
        return self.gradient > 0 and step >= self.steps - self.gradient_steps


@dataclass(frozen=True)
class PartWay:
    """Begins in the middle of the schedule, with noise on a picture instead of noise alone (SDEdit: Meng et al. 2022,
    Sec. 3; diffusers' image-to-image pipelines call the share strength, ComfyUI's KSampler denoise).

    clean: the picture's latents [B, C, H, W]. share: of the steps that are taken, the last ones, rounded to whole steps
    and at least one; above 0 and up to 1, which takes them all from noise alone. Raises FeatInvError for another share.
    """

    clean: Tensor
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise FeatInvError(
                f"share {self.share:g} of the steps to begin from an image with; expected a number above 0 and up to 1"
            )

    def first(self, steps: int) -> int:
        """The first of so many steps that is taken, counted from 0."""
        return steps - max(1, round(self.share * steps))

    def select(self, rows: slice) -> PartWay:
        """Some of the batch."""
        return PartWay(self.clean[rows], self.share)


def starting_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise on the CPU, the same numbers that ComfyUI draws for a batch of this shape with this
    seed. Raises FeatInvError for a seed of more than 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise FeatInvError(f"seed {seed}: expected a whole number from -2^63 to 2^64 - 1")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample_latents(
    unet: UNet,
    controlnet: Callable[..., Any] | None,
    hints: Mapping[bool, Tensor],
    solver: Any,
    noise: Tensor,
    text: Mapping[bool, Tensor],
    sampling: Sampling,
    toward: Callable[[Tensor], Tensor] | None = None,
    part_way: PartWay | None = None,
) -> Tensor:
    """Latents [B, C, H, W] drawn from starting noise [B, C, H, W], without further noise: FeatInv(phi, seed) of
    Algorithm 1.

    unet, controlnet: as controlled_prediction calls them; without a controlnet the base model draws alone. hints: the
    encoded feature maps [B, C_d, H, W] under True, the encoded zeros under False; what no branch of the guidance uses
    may be missing. text: embeddings [1, T, D] of the prompt under True, of the empty prompt under False. solver: new,
    since multistep solvers remember earlier steps. toward: x0_hat -> x0_hat moved, in the steps that sampling.moves
    names; see guidance.toward_features. part_way: latents to begin from in the middle of the schedule; the numbers of
    the steps stay those of the whole one. Raises FeatInvError as set_timesteps does.
    """
    x, weights = noise, sampling.weights(controlnet is not None)
    context = torch.cat([text[prompted].expand(len(x), -1, -1) for _, prompted in weights])
    hint = torch.cat([hints[cond] for cond, _ in weights]) if controlnet is not None else None
    set_timesteps(solver, sampling.steps)
    first = part_way.first(sampling.steps) if part_way else 0
    if part_way and first:
        x = noised(solver, part_way.clean, noise, solver.timesteps[first])
    for step, t in list(enumerate(solver.timesteps))[first:]:
        branches = x.repeat(len(weights), 1, 1, 1)
        if controlnet is not None and hint is not None and sampling.controls(step):
            pred = controlled_prediction(unet, controlnet, branches, t, context, hint, sampling.strength)
        else:
            pred = prediction(unet, branches, t, context)
        pred = sum(weight * part for weight, part in zip(weights.values(), pred.float().split(len(x))))
        if toward is not None and sampling.moves(step):
            pred = prediction_of(solver, x, toward(predicted_clean(solver, x, pred, t)), t)
        x = solver.step(pred, t, x).prev_sample
    return x


def set_timesteps(solver: Any, steps: int) -> None:
    """The solver's timesteps, `steps` of them.

    For some numbers diffusers' "trailing" spacing, which counts down in floating point, gives one more, below zero: 61,
    103 and sixty others up to 1000. Raises FeatInvError for more than there are ("leading" leaves the first one out).
    """
    leading = solver.config.timestep_spacing == "leading"
    most = solver.config.num_train_timesteps - leading
    if steps > most:
        raise FeatInvError(
            f"steps {steps}: the base model has {most} timesteps{' of the spacing leading' * leading}; give at most as"
            " many"
        )
    solver.set_timesteps(steps)
    if len(solver.timesteps) > steps:
        solver.timesteps = solver.timesteps[:steps]
        if hasattr(solver, "sigmas"):
            solver.sigmas = torch.cat([solver.sigmas[:steps], solver.sigmas[-1:]])
        solver.num_inference_steps = steps
