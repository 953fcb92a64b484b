"""A feature map and its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch import Tensor

from .errors import FeatInvError


@dataclass(frozen=True)
class FeatureSource:
    """Where feature vectors come from; two maps can be compared or mixed only if their sources are equal.

    backbone: timm name, architecture.tag. layer: "last" or a name from the backbone's feature_info.
    pooled: averaged over the locations. channels: C. grid: (H, W) of the unpooled map. input_size: (height,
    width) in pixels that the backbone reads. mean, std: per colour channel, for pictures in 0..1. definition: of a
    backbone that is not timm's, what the layer's name means and how pictures are cut and scaled. weights: digest of the
    backbone's weights (digests.digest), empty where it is not known; it takes no part in `==`, see fits and require.
    """

    backbone: str
    layer: str
    pooled: bool
    channels: int
    grid: tuple[int, int]
    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    definition: str = ""
    weights: str = field(default="", compare=False)

    def describe(self) -> str:
        """One line for messages and captions."""
        size = "pooled" if self.pooled else f"{self.grid[0]}x{self.grid[1]}"
        return f"{self.backbone}, layer {self.layer}, {self.channels} channels, {size}"

    def to_dict(self) -> dict:
        """The fields by name; without the definition and the digest of the weights where there are none."""
        optional = ("definition", "weights")
        return {name: value for name, value in asdict(self).items() if name not in optional or value}

    def fits(self, other: FeatureSource) -> bool:
        """Whether maps of both can be compared: the sources are equal, and the backbones' weights where both are
        known."""
        return self == other and not self.other_weights(other)

    def other_weights(self, other: FeatureSource) -> bool:
        """Whether the backbones' weights are known to differ."""
        return bool(self.weights and other.weights) and self.weights != other.weights

    def require(self, other: FeatureSource, mine: str, theirs: str, way: str = "") -> None:
        """Raises FeatInvError, naming both sides and each differing field, unless the sources fit. way: how to go on
        with other weights of the same backbone, where there is a way."""
        differing = [f.name for f in fields(self) if f.compare and getattr(self, f.name) != getattr(other, f.name)]
        if differing:
            pairs = "; ".join(f"{n}: {getattr(self, n)} against {getattr(other, n)}" for n in differing)
            raise FeatInvError(
                f"{mine} ({self.describe()}) and {theirs} ({other.describe()}) do not fit together. {pairs}. "
                "Use the same backbone, layer, pooling and input size for both."
            )
        if self.other_weights(other):
            raise FeatInvError(
                f"{mine} and {theirs} are of {self.backbone} with other weights (digest {self.weights} against"
                f" {other.weights}): the name is the same, the network is not. Open the same weights on both sides, or"
                f" make one side again with the other's weights{way and f'. {way}'}"
            )


@dataclass(frozen=True)
class FeatureMap:
    """Feature vectors on a grid.

    values: float32 [B, C, H, W]; a pooled map has H = W = 1. prefix: class and register tokens [B, P, C] of a
    transformer's last layer, which its classifier head may read, or None.
    """

    values: Tensor
    source: FeatureSource
    prefix: Tensor | None = None

    def __post_init__(self) -> None:
        s = self.source
        expected = (s.channels, *((1, 1) if s.pooled else s.grid))
        if self.values.ndim != 4 or tuple(self.values.shape[1:]) != expected:
            raise FeatInvError(
                f"feature map of shape {tuple(self.values.shape)}; expected [B, {expected}] from {s.describe()}"
            )
        if not self.values.isfinite().all():
            raise FeatInvError(
                f"feature map from {s.describe()} holds NaN or infinite values; check the image and the weights"
            )

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> FeatureMap:
        """The same map on another device."""
        return FeatureMap(self.values.to(device), self.source, None if self.prefix is None else self.prefix.to(device))

    def pool(self) -> FeatureMap:
        """Averages over the locations (paper Sec. 2, pooled features): values [B, C, 1, 1]."""
        if self.source.pooled:
            return self
        return FeatureMap(self.values.mean((2, 3), keepdim=True), replace(self.source, pooled=True), self.prefix)

    def with_values(self, values: Tensor, keep_prefix: bool = False) -> FeatureMap:
        """The same source with other values; the prefix tokens are dropped unless they still hold."""
        return FeatureMap(values.float(), self.source, self.prefix if keep_prefix else None)

    def select(self, index: int | slice | Tensor) -> FeatureMap:
        """One map (still a batch), or some of the batch."""
        index = slice(index, index + 1 or None) if isinstance(index, int) else index
        return FeatureMap(self.values[index], self.source, None if self.prefix is None else self.prefix[index])

    def repeat(self, times: int) -> FeatureMap:
        """Each map `times` times in a row: [B * times, C, H, W]."""
        prefix = None if self.prefix is None else self.prefix.repeat_interleave(times, 0)
        return FeatureMap(self.values.repeat_interleave(times, 0), self.source, prefix)

    def in_turn(self, count: int) -> FeatureMap:
        """`count` maps: fewer than these are the first of them, more repeat them in turn, [0, 1, 2, 0, 1, ...]."""
        return self.select(torch.arange(count, device=self.values.device) % len(self))


def concatenate(maps: Sequence[FeatureMap]) -> FeatureMap:
    """Joins batches of one source. Raises FeatInvError if the sources differ."""
    first = maps[0]
    for other in maps[1:]:
        first.source.require(other.source, "the first feature map", "another one")
    prefixes = [m.prefix for m in maps if m.prefix is not None]
    prefix = torch.cat(prefixes) if len(prefixes) == len(maps) else None
    return FeatureMap(torch.cat([m.values for m in maps]), first.source, prefix)
