"""Linear maps of feature space: what a change of the image (its colours, its style) does to every feature vector.

A map is fitted to pairs of vectors x, y [C] at equal locations of two images, before a change and after it:

rotation    y = R x with R in SO(C), by Kabsch's solution of the orthogonal Procrustes problem; about the origin, so
            vectors keep their length (colour changes as rotations: arXiv 2506.07803).
affine      y = M x + t, by ridge regression of y - x on x: what the pairs do not determine stays as it is.
direction   y = x + t with t = mean(y) - mean(x), the arithmetic of directions.

Strength s takes a part of the change. A rotation is turned by s times its angles, R^s, the shortest way from no change
to R; it is exact for any s, and -1 undoes the map. The others move s times as far in a straight line, x + s (y - x).
Layers that end in a ReLU have no values below 0, and neither has what a map makes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .errors import FeatInvError
from .feature_map import FeatureMap, FeatureSource
from .metrics import bootstrap, cosine, cosine_per_location

KINDS = ("affine", "rotation", "direction")
HELD_OUT = 4  # every fourth pair is left aside to measure a fit
FOLDS = 4  # parts of the pairs, each of which is left aside once to choose a ridge
RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # in units of the mean variance of a channel
TURNING = 1e-4  # how far the product of a stored rotation with its transpose may be from the identity, in float32


@dataclass(frozen=True)
class LinearMap:
    """phi -> M phi + t at every location.

    kind: one of KINDS. matrix: M [C, C], None for a direction. shift: t [C], None for a rotation. source: of the
    feature maps that it belongs to. low: values below it do not occur in the layer and are raised to it; None where
    there is no such limit. settings: how it was fitted. measured: figures on pictures that the fit did not see.
    """

    kind: str
    matrix: Tensor | None
    shift: Tensor | None
    source: FeatureSource
    low: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    measured: Mapping[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FeatInvError(f"a linear map of kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        c = self.source.channels
        wanted = {
            "matrix": None if self.kind == "direction" else (c, c),
            "shift": None if self.kind == "rotation" else (c,),
        }
        for name, expected in wanted.items():
            value = getattr(self, name)
            shape = None if value is None else tuple(value.shape)
            if shape != expected or (value is not None and not value.isfinite().all()):
                raise FeatInvError(
                    f"a linear map of kind {self.kind} with a {name} of shape {shape}; expected {expected}, finite, for"
                    f" {self.source.describe()}"
                )
        if self.kind == "rotation" and self.matrix is not None:
            r = self.matrix.double()
            off = (r @ r.T - torch.eye(c, dtype=r.dtype)).abs().max().item()
            if off > TURNING or torch.linalg.slogdet(r).sign < 0:
                reason = (
                    f"times its transpose it differs from the identity by {off:.2g}" if off > TURNING else "it flips"
                )
                raise FeatInvError(f"a linear map of kind rotation, whose matrix is not a rotation: {reason}")

    def describe(self) -> str:
        """One line for messages and reports: kind, change, source."""
        change = self.settings.get("change")
        return f"{self.kind}{f', {change}' if change else ''}, of {self.source.describe()}"

    def report(self) -> str:
        """Lines about the fit and its measurements, which nodes and programs show."""
        lines = [self.describe(), f"fitted to {self.settings.get('maps', '?')} pairs of feature maps"]
        if not {"cosine_before", "cosine_mapped", "explained"} <= self.measured.keys():
            return "\n".join([*lines, f"not measured: give at least {HELD_OUT} pairs to see what the map is worth"])
        value = {name: entry["value"] for name, entry in self.measured.items()}
        n = self.measured["cosine_mapped"]["n"]
        return "\n".join(
            [
                *lines,
                f"on {n} held-out pairs: cosine with the map after the change {value['cosine_before']:.3f} before,"
                f" {value['cosine_mapped']:.3f} mapped",
                f"share of the change that it makes: {value['explained']:.2f}",
            ]
        )

    @cached_property
    def _planes(self) -> tuple[Tensor, Tensor]:
        """A rotation as R = Z^T T Z: Z [C, C], whose rows 2i and 2i + 1 span a plane, and the angle of each plane
        [C // 2]; a last row without a partner stays."""
        from scipy.linalg import schur

        assert self.matrix is not None
        t, z = schur(self.matrix.double().numpy(), output="real")
        turned: list[tuple[int, int, float]] = []
        still: list[int] = []
        flipped: list[int] = []
        k = 0
        while k < len(t):
            if k + 1 < len(t) and abs(t[k + 1, k]) > 1e-9:
                turned.append((k, k + 1, np.arctan2(t[k + 1, k], t[k, k])))
                k += 2
            else:
                (still if t[k, k] > 0 else flipped).append(k)
                k += 1
        turned += [(a, b, np.pi) for a, b in zip(flipped[::2], flipped[1::2])]  # half a turn in any plane of two
        turned += [(a, b, 0.0) for a, b in zip(still[::2], still[1::2])]
        rows = [row for a, b, _ in turned for row in (a, b)] + still[len(still) // 2 * 2 :]
        return torch.from_numpy(z.T[rows].copy()), torch.tensor([angle for _, _, angle in turned], dtype=torch.float64)

    def at(self, strength: float) -> tuple[Tensor | None, Tensor | None]:
        """(matrix, shift) at a strength: 0 changes nothing, 1 is the whole map."""
        shift = None if self.shift is None else strength * self.shift
        if self.matrix is None or strength == 1:
            return self.matrix, shift
        eye = torch.eye(self.source.channels)
        if strength == 0:
            return eye, shift
        if self.kind == "affine":
            return eye + strength * (self.matrix - eye), shift
        z, angles = self._planes
        cos, sin = (strength * angles).cos()[:, None], (strength * angles).sin()[:, None]
        paired = 2 * len(angles)
        a, b = z[0:paired:2], z[1:paired:2]
        turned = torch.stack([cos * a - sin * b, sin * a + cos * b], 1).flatten(0, 1)
        return (z.T @ torch.cat([turned, z[paired:]])).float(), None

    def apply(self, features: FeatureMap, strength: float = 1.0) -> FeatureMap:
        """The map of every feature vector; prefix tokens are dropped, since they are not mapped. Raises FeatInvError
        for maps of another source."""
        features.source.require(self.source, "the feature map", "the linear map")
        values = features.values
        matrix, shift = self.at(strength)
        if matrix is not None:
            values = torch.einsum("dc,bchw->bdhw", matrix.to(values), values)
        if shift is not None:
            values = values + shift.to(values)[:, None, None]
        if self.low is not None and strength:
            values = values.clamp(min=self.low)
        return features.with_values(values)


class Moments(NamedTuple):
    """What a fit needs of the pairs, in float64. vectors: how many. x, y: their sums [C]. xx, yx: sums of x x^T and
    y x^T [C, C]. yy: sum of |y|^2. low: the smallest value in any."""

    vectors: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: float
    low: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Of pairs of vectors [N, C]."""
        low = min(x.min().item(), y.min().item())
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ x, y.square().sum().item(), low)

    def plus(self, other: Moments) -> Moments:
        """Of both sets of pairs together."""
        x, y, xx, yx = (a + b for a, b in zip(self[1:5], other[1:5]))
        return Moments(self.vectors + other.vectors, x, y, xx, yx, self.yy + other.yy, min(self.low, other.low))

    def error(self, matrix: Tensor, shift: Tensor) -> float:
        """Sum of |y - M x - t|^2."""
        mapped = ((matrix @ self.xx) * matrix).sum() + 2 * shift @ matrix @ self.x + self.vectors * shift @ shift
        return (self.yy + mapped - 2 * (matrix * self.yx).sum() - 2 * shift @ self.y).item()


class Pairs:
    """Gathers pairs of feature maps, before a change and after it, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.source: FeatureSource | None = None
        self.maps = 0
        self._folds: dict[int, Moments] = {}

    def add(self, before: FeatureMap, after: FeatureMap) -> None:
        """Raises FeatInvError for other sources than the first pair's and for batches of two sizes."""
        self.source = self.source or before.source
        before.source.require(self.source, "the feature map before the change", "the first one")
        after.source.require(self.source, "the feature map after the change", "that before it")
        if len(before) != len(after):
            raise FeatInvError(
                f"{len(before)} feature maps before the change and {len(after)} after it; give pairs, in equal order"
            )
        for fold in range(FOLDS):
            chosen = (torch.arange(len(before)) + self.maps) % FOLDS == fold
            if chosen.any():
                new = Moments.of(*(_vectors(m.select(chosen.to(m.values.device))) for m in (before, after)))
                self._folds[fold] = self._folds[fold].plus(new) if fold in self._folds else new
        self.maps += len(before)

    def fit(self, kind: str = "affine", ridge: float | None = None, **settings: object) -> LinearMap:
        """The map of a kind. ridge: of an affine one, in units of the mean variance of a channel; None for that of
        RIDGES which errs least on a fourth of the pairs when fitted to the others. settings: noted in the map beside
        these. Raises FeatInvError without pairs, for equal vectors and for an unknown kind."""
        if kind not in KINDS:
            raise FeatInvError(f"a linear map of kind {kind!r}; expected one of {', '.join(KINDS)}")
        if self.source is None:
            raise FeatInvError("no feature maps to fit a linear map to; give pairs, before a change and after it")
        if ridge is not None and not ridge > 0:
            raise FeatInvError(f"ridge {ridge}: expected a number above 0")
        sums = _total(self._folds.values())
        matrix = shift = None
        if kind == "rotation":
            matrix = _rotation(sums.yx)
        elif kind == "direction":
            shift = (sums.y - sums.x) / sums.vectors
        else:
            ridge = _chosen_ridge(list(self._folds.values())) if ridge is None else ridge
            matrix, shift = _affine(sums, ridge)
            settings = {"ridge": ridge, **settings}
        return LinearMap(
            kind,
            None if matrix is None else matrix.float(),
            None if shift is None else shift.float(),
            self.source,
            0.0 if sums.low >= 0 else None,
            {"maps": self.maps, "vectors": sums.vectors, **settings},
        )


def _vectors(features: FeatureMap) -> Tensor:
    """[B * H * W, C] in float64, on the CPU."""
    return rearrange(features.values.cpu().double(), "b c h w -> (b h w) c")


def _total(parts: Iterable[Moments]) -> Moments:
    return reduce(Moments.plus, parts)


def _affine(sums: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """(M, t) of the ridge regression of y - x on x. Raises FeatInvError for equal vectors."""
    x, y = sums.x / sums.vectors, sums.y / sums.vectors
    own = sums.xx / sums.vectors - torch.outer(x, x)
    change = sums.yx / sums.vectors - torch.outer(y, x) - own
    eye, scale = torch.eye(len(own), dtype=own.dtype), own.trace() / len(own)
    if not scale > 0:
        raise FeatInvError("constant features: all vectors before the change are equal; check the images")
    matrix = eye + torch.linalg.solve(own + ridge * scale * eye, change.T).T
    return matrix, y - matrix @ x


def _chosen_ridge(folds: list[Moments]) -> float:
    """Of RIDGES that of the least error on each fold when fitted to the others; the largest where there is one fold."""
    if len(folds) < 2:
        return RIDGES[-1]
    rest = [_total(other for other in folds if other is not fold) for fold in folds]
    return min(RIDGES, key=lambda ridge: sum(fold.error(*_affine(other, ridge)) for fold, other in zip(folds, rest)))


def _rotation(products: Tensor) -> Tensor:
    """[C, C] the rotation R of the largest trace(R^T products), products = sum of y x^T: Kabsch 1976. Without a
    reflection, so that every part of the way from no change to R is a rotation."""
    u, _, v = torch.linalg.svd(products)
    signs = torch.ones(len(u), dtype=u.dtype)
    signs[-1] = torch.sign(torch.linalg.det(u @ v))
    return (u * signs) @ v


def measure(linear: LinearMap, before: FeatureMap, after: FeatureMap, centre: Tensor) -> dict[str, Tensor]:
    """Values per map [B], of pairs that the fit did not see: cosine with the map after the change, of the map before
    it ("before") and of what the linear map makes of that ("mapped"), with `centre` [C] removed too; squared distances
    to the map after the change, by whose sums the explained share of the change is 1 - mapped / before."""
    values = {}
    for name, maps in (("before", before), ("mapped", linear.apply(before))):
        values[f"cosine_{name}"] = cosine(maps, after)
        values[f"centred_{name}"] = cosine_per_location(maps, after, centre).mean((1, 2))
        values[f"distance_{name}"] = (maps.values - after.values).square().sum((1, 2, 3))
    return values


def figures(values: Mapping[str, Tensor]) -> dict[str, dict]:
    """Figures with their 95 % intervals of what `measure` gave, for LinearMap.measured: means over the maps, and
    "explained", the share of the change that the linear map makes."""
    entries = {name: bootstrap(x) for name, x in values.items() if not name.startswith("distance")}
    distances = values["distance_mapped"], values["distance_before"]
    return entries | {"explained": bootstrap(*distances, statistic=lambda a, b, axis: 1 - a.sum(axis) / b.sum(axis))}


def from_pairs(before: FeatureMap, after: FeatureMap, kind: str = "affine", ridge: float | None = None) -> LinearMap:
    """A linear map fitted to all pairs of two batches; of four and more, measured by another fit on every fourth pair,
    which that one did not see. Raises FeatInvError as Pairs does."""
    everything = Pairs()
    everything.add(before, after)
    linear = everything.fit(kind, ridge)
    held_out = torch.arange(len(before)) % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        return linear
    seen = Pairs()
    seen.add(before.select(~held_out), after.select(~held_out))
    centre = after.select(~held_out).values.mean((0, 2, 3))
    values = measure(seen.fit(kind, ridge), before.select(held_out), after.select(held_out), centre)
    return replace(linear, measured=figures(values))


def arithmetic(
    features: FeatureMap, plus: FeatureMap, minus: FeatureMap, strength: float = 1.0, per_location: bool = False
) -> FeatureMap:
    """features + strength (mean of plus - mean of minus), in units of that difference's own length.

    per_location: the means are over the maps of each set, location by location; else over their locations too, one
    direction [C] for all. Values are kept from falling below 0 where none of the maps has such. Prefix tokens are
    dropped. Raises FeatInvError for maps of other sources.
    """
    for other, name in ((plus, "the feature maps to add"), (minus, "the feature maps to take away")):
        features.source.require(other.source, "the feature map", name)
    over = (0,) if per_location else (0, 2, 3)
    direction = plus.values.mean(over, keepdim=True) - minus.values.mean(over, keepdim=True)
    values = features.values + strength * direction.to(features.values)
    if min(m.values.min().item() for m in (features, plus, minus)) >= 0:
        values = values.clamp(min=0)
    return features.with_values(values)
