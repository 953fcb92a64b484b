"""From noise to latents that have given features, without a trained inversion model: universal guidance (Bansal et al.
2023, arXiv 2302.07121).

At each step the clean latents that the diffusion model predicts are moved toward the features (Sec. 3.2), the step is
taken with what they became, and noise is added back so that the step can be taken again (Sec. 3.3). Not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FeatInvError
from .guidance import DISTANCES


class NotFinite(FeatInvError):
    """Latents with values that are not finite. latents: the last ones without [B, C, H, W], predicted clean; None if
    there were none."""

    def __init__(self, message: str, latents: Tensor | None) -> None:
        super().__init__(message)
        self.latents = latents


@dataclass(frozen=True)
class UniversalGuidance:
    """How to guide. moves: per step, of length `step` each in units of the latents' root mean square, see
    guidance.toward_features. recurrence: how often each step is taken, 1 for once. start, end: share of the steps in
    which guidance acts; recurrence is 1 in the others. distance: one of guidance.DISTANCES.

    Raises FeatInvError for a value out of its range."""

    moves: int = 4
    step: float = 0.1
    recurrence: int = 4
    start: float = 0.0
    end: float = 1.0
    distance: str = "cosine"

    def __post_init__(self) -> None:
        for name, least in (("moves", 0), ("recurrence", 1)):
            if (value := getattr(self, name)) != int(value) or value < least:
                raise FeatInvError(f"universal guidance: {name} {value}; expected a whole number of at least {least}")
        if not 0 <= self.step < math.inf:
            raise FeatInvError(
                f"universal guidance: step {self.step:g}; expected a length from 0 on, as a share of the latents' own"
                " (0.1 is usual)"
            )
        if not 0 <= self.start <= self.end <= 1:
            raise FeatInvError(
                f"universal guidance: start {self.start:g} and end {self.end:g}; expected shares of the steps, 0 <="
                " start <= end <= 1"
            )
        if self.distance not in DISTANCES:
            raise FeatInvError(
                f"universal guidance: distance {self.distance!r}; expected one of {', '.join(DISTANCES)}"
            )

    def acts(self, step: int, steps: int) -> bool:
        """Whether a step of so many, counted from 0, is guided."""
        return self.moves > 0 and self.step > 0 and self.start * steps <= step < self.end * steps

    def gradients(self, steps: int, first: int = 0) -> int:
        """Gradients taken for a picture of so many steps, from the step `first` on."""
        return sum(self.acts(n, steps) for n in range(first, steps)) * self.moves * self.recurrence

    def evaluations(self, steps: int, first: int = 0) -> int:
        """Predictions of the diffusion model for a picture of so many steps, from the step `first` on."""
        return sum(self.recurrence if self.acts(n, steps) else 1 for n in range(first, steps))


#: gradients per picture, and in how many steps they are best taken; by measurement, see docs/without-training.md
COSTS, STEPS = {"quick": 64, "good": 192, "best": 592}, 4


def at_cost(name: str, steps: int) -> UniversalGuidance:
    """The defaults, with as much recurrence as the gradients of COSTS allow in so many steps."""
    moves = UniversalGuidance().moves
    return UniversalGuidance(recurrence=max(1, round(COSTS[name] / (steps * moves))))


#: signal s and noise n of latents s x_0 + n e, e standard normal
Level = tuple[float, float]


def sample_toward(
    clean_of: Callable[[Tensor, int], Tensor],
    x: Tensor,
    levels: Sequence[Level],
    guidance: UniversalGuidance,
    toward: Callable[[Tensor], Tensor],
    noise: Callable[[], Tensor],
    report: Callable[[int, Tensor, Tensor], object] = lambda step, x, clean: None,
    first: int = 0,
) -> Tensor:
    """Latents [B, C, H, W] at the last level, drawn from x [B, C, H, W] at the level `first` by DDIM without further
    noise (Song et al. 2021), which is Euler's method in any parameterisation: one for models of noise, velocity and
    flow.

    clean_of: (x_t, number of its level) -> x0_hat that the diffusion model predicts. levels: one more than the steps.
    toward: x0_hat -> x0_hat moved once, see guidance.toward_features. noise: new standard normal noise [B, C, H, W].
    report: called with step, x_t and the clean latents after their moves. Raises NotFinite with the last clean latents.
    """
    kept, steps = None, len(levels) - 1
    for step in range(first, steps):
        acts = guidance.acts(step, steps)
        for time in range(guidance.recurrence if acts else 1):
            if time:
                x = noise_again(x, levels[step + 1], levels[step], noise())
            clean = _finite(clean_of(x, step), kept, f"the diffusion model's prediction in step {step + 1} of {steps}")
            kept = clean if kept is None else kept
            for _ in range(guidance.moves if acts else 0):
                clean = _finite(toward(clean), kept, f"a move in step {step + 1} of {steps}")
            kept = clean
            report(step, x, clean)
            (signal, spread), (next_signal, next_spread) = levels[step], levels[step + 1]
            x = next_signal * clean + next_spread / spread * (x - signal * clean)
    return x


def noise_again(x: Tensor, here: Level, there: Level, noise: Tensor) -> Tensor:
    """Latents at the level `here` -> at the noisier level `there`: a x + sqrt(n_there^2 - a^2 n_here^2) noise with
    a = s_there / s_here. For s = 1 that is x + sqrt(n_there^2 - n_here^2) noise, for s^2 + n^2 = 1 the forward process
    of Ho et al. 2020 (Eq. 2) over several steps; for a flow, s = 1 - n."""
    factor = there[0] / here[0]
    return factor * x + math.sqrt(max(there[1] ** 2 - (factor * here[1]) ** 2, 0.0)) * noise


def _finite(latents: Tensor, kept: Tensor | None, what: str) -> Tensor:
    if torch.isfinite(latents).all():
        return latents
    if kept is None:  # nothing has moved yet
        way = "compute in float32 where a half precision is in use, or choose another checkpoint"
    else:
        way = "lower step (the length of a move) or moves, or compute in float32 where a half precision is in use"
    raise NotFinite(f"{what} gave values that are not finite; {way}", kept)
