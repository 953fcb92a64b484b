"""The settings of a feature ControlNet: which maps, how strongly, where and when."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..core.errors import FeatInvError
from ..core.feature_map import FeatureMap
from ..core.viz import PairedMaps

#: What guidance pushes away from: the same features with the negative text (the paper), or zero features as well,
#: the combination that training drops to. The node repeats the names: at start-up this module is too heavy for it.
NEGATIVES = ("text and features", "text")
#: What an area of the picture gets of a map: all of it, as it gets all of a stock ControlNet's hint, or its part.
IN_AREAS = ("whole map in each area", "the area's part")
MOST = 10.0  # a factor of the strength


@dataclass(frozen=True)
class Steering:
    """features: the maps [M, C, H, W]. strength: of the control. span: start and end as shares of the sampling process.
    negative, in_areas: one of NEGATIVES and of IN_AREAS. curve: factors of the strength, evenly spaced from start to
    end, with straight lines between them. mask: [B, h, w] in 0..1 over the whole picture, one for all latents or one
    for each, or None. node: the node that shows what there is to say."""

    features: FeatureMap
    strength: float = 1.0
    span: tuple[float, float] = (0.0, 1.0)
    negative: str = NEGATIVES[0]
    in_areas: str = IN_AREAS[0]
    curve: tuple[float, ...] = (1.0,)
    mask: Tensor | None = None
    node: str | None = None

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.negative, NEGATIVES, "guide_away_from"),
            (self.in_areas, IN_AREAS, "in_areas"),
        ):
            if value not in known:
                raise FeatInvError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        start, end = self.span
        if start > end:
            raise FeatInvError(
                f"start_percent {start:g} is after end_percent {end:g}, so that control would act at no step; give a"
                " start below the end"
            )
        if self.mask is not None and (self.mask.ndim != 3 or not self.mask.isfinite().all()):
            raise FeatInvError(f"a mask of shape {tuple(self.mask.shape)}; expected finite values [B, height, width]")

    @property
    def blocked(self) -> str:
        """A line about a mask that is black everywhere; empty for others."""
        if self.mask is None or self.mask.any():
            return ""
        return (
            "The mask is black everywhere, so the features do not steer. Paint it white where they should, or"
            " disconnect it."
        )

    @property
    def shared(self) -> bool:
        """Whether all latents of a batch are steered alike."""
        return len(self.features) == 1 and (self.mask is None or len(self.mask) == 1)

    def strength_at(self, share: float) -> float:
        """The strength when a share of the sampling process is over."""
        start, end = self.span
        place = min(max((share - start) / max(end - start, 1e-6), 0.0), 1.0) * (len(self.curve) - 1)
        before = min(int(place), len(self.curve) - 2)
        if before < 0:
            return self.strength * self.curve[0]
        left, right = self.curve[before : before + 2]
        return self.strength * (left + (right - left) * (place - before))

    def require_pairs(self, latents: Tensor, noise_alone: bool) -> None:
        """Raises FeatInvError if the maps are Paired Latents' and the latents are not. noise_alone: whether the latents
        are at the beginning of the sampling process, where those of a seed must be equal."""
        maps = self.features
        if not isinstance(maps, PairedMaps):
            return
        advice = "Connect the latent output of the Paired Latents that gives the features, as one batch"
        if len(latents) != len(maps):
            raise FeatInvError(
                f"the features are Paired Latents' {len(maps)} maps, and the sampler has {len(latents)} latents, so"
                f" that FeatInv-Viz would compare other maps than it says. {advice}"
            )
        first, *others = latents.unflatten(0, (-1, maps.seeds))
        if noise_alone and not all(other.equal(first) for other in others):
            raise FeatInvError(
                "the features are Paired Latents', and the sampler's latents do not have the same noise for equal"
                f" seeds, so that FeatInv-Viz would show the noise. {advice}"
            )


def read_curve(text: str) -> tuple[float, ...]:
    """ "1, 0.5, 0" -> (1.0, 0.5, 0.0); an empty text -> (1.0,). Raises FeatInvError for anything but numbers in 0..10
    between commas."""
    if not text.strip():
        return (1.0,)
    try:
        curve = tuple(float(number) for number in text.split(","))
    except ValueError:
        curve = (math.nan,)
    if not all(0 <= factor <= MOST for factor in curve):
        raise FeatInvError(
            f"strength_curve is {text!r}; expected factors from 0 to {MOST:g} between commas, such as 1, 0.5, 0 for a"
            " strength that falls to nothing"
        )
    return curve


def share_over(sigma: float, sigma_of: Callable[[float], float]) -> float:
    """How much of the sampling process is over at a noise level, to a thousandth. sigma_of: the host's function from
    that share to the noise level, which falls."""
    return bisect.bisect_left(range(1000), -sigma, key=lambda i: -float(sigma_of(i / 1000))) / 1000


def resized(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Masks [B, 1, h, w] scaled to [B, 1, *size], each cell the mean of what it covers."""
    if tuple(mask.shape[2:]) == tuple(size):
        return mask
    return F.interpolate(mask, tuple(size), mode="bilinear", align_corners=False, antialias=True)
