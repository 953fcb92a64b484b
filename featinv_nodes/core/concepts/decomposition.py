"""The oblique decomposition of feature vectors into concept subspaces and a rest (MCD, Vielhaben et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..feature_map import FeatInvError, FeatureMap, FeatureSource

REST = "rest"


@dataclass(frozen=True)
class Concepts:
    """Linear subspaces of feature space, whose sum is direct, and what is orthogonal to all of them.

    bases: one [d_i, C] per concept, rows of unit length. labels: one per concept. source: the features they belong
    to. mean: [C], taken off before the decomposition and counted with the rest, or None. method, settings: how they
    were found.
    """

    bases: Sequence[Tensor]
    labels: Sequence[str]
    source: FeatureSource
    mean: Tensor | None = None
    method: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.bases or len(self.bases) != len(self.labels):
            raise FeatInvError(f"{len(self.bases)} concept bases and {len(self.labels)} labels; expected as many, at least one")
        for label, basis in zip(self.labels, self.bases):
            if basis.ndim != 2 or basis.shape[1] != self.source.channels or not basis.isfinite().all():
                raise FeatInvError(f"concept {label!r}: basis of shape {tuple(basis.shape)}; expected [d, {self.source.channels}], finite")

    def __len__(self) -> int:
        return len(self.bases)

    @property
    def names(self) -> list[str]:
        """The labels and, last, the rest."""
        return [*self.labels, REST]

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor]:
        """U [D, C], all bases one below the other, and its pseudo-inverse E [C, D], in float32."""
        stacked = torch.cat([b.float() for b in self.bases])
        return stacked, torch.linalg.pinv(stacked.double()).float()

    def index(self, name: str | int) -> int:
        """A concept by label or number; the rest comes after the last. Raises FeatInvError, listing what there is."""
        names = self.names
        if str(name) in names:
            return names.index(str(name))
        if str(name).strip().isdigit() and int(name) < len(names):
            return int(name)
        raise FeatInvError(f"there is no concept {name!r}; there are {len(names)}: {', '.join(f'{i} {n}' for i, n in enumerate(names))}")

    def parts(self, features: FeatureMap) -> Tensor:
        """[n + 1, B, C, H, W]: phi_1, ..., phi_n and the rest; their sum is phi.

        phi_i = (phi E_i) U_i: the part along subspace i of the oblique projection onto the sum of all subspaces. The
        rest is orthogonal to every concept (up to the mean, where there is one). Raises FeatInvError for another source.
        """
        features.source.require(self.source, "the feature map", "the concepts")
        stacked, inverse = (t.to(features.values.device) for t in self._stacked)
        phi = features.values.movedim(1, -1)  # [B, H, W, C]
        centred = phi if self.mean is None else phi - self.mean.to(phi)
        found, start = [], 0
        for basis in self.bases:
            rows = slice(start, start + len(basis))
            found.append(centred @ inverse[:, rows] @ stacked[rows])
            start += len(basis)
        found.append(phi - sum(found))
        return torch.stack(found).movedim(-1, 2)

    def scale(self, features: FeatureMap, factors: Mapping[str | int, float]) -> FeatureMap:
        """phi + sum over the named concepts of (a_i - 1) phi_i: each scaled by its factor (paper Algorithm 1: 0.25).

        The class token, if there is one, is dropped: it no longer belongs to the map.
        """
        parts = self.parts(features)
        change = sum((factor - 1) * parts[self.index(name)] for name, factor in factors.items())
        return features.with_values(features.values + change)

    def activation(self, features: FeatureMap) -> Tensor:
        """[n + 1, B, H, W] in 0..1 or little above: |phi_i| at each location over the largest |phi| of the picture."""
        lengths = self.parts(features).norm(dim=2)
        return lengths / features.values.norm(dim=1).amax((1, 2))[:, None, None].clamp(min=1e-8)
