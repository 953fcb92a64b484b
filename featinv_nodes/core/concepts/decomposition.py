"""The decomposition of feature vectors into concepts and a rest: oblique (MCD, Vielhaben et al. 2023), or by a sparse
code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from ..errors import FeatInvError
from ..feature_map import FeatureMap, FeatureSource
from .sparse import SparseEncoder

REST = "rest"
ROWS = 1024  # vectors encoded at once by a sparse encoder


@dataclass(frozen=True)
class Concepts:
    """Concepts of feature space and a rest: phi = sum of z_i U_i + rest, with coefficients z_i of phi - mean.

    bases: U, one [d_i, C] per concept, rows of unit length (a user's own dictionary: of any). Without an encoder the
    sum of the subspaces is direct, z = (phi - mean) E with E the pseudo-inverse of all bases, and the rest is
    orthogonal to every concept. With one, each basis is one row, as many as you like, and z = encoder(phi - mean).
    labels: one per concept. source: the features they belong to. mean: [C], counted with the rest, or None.
    method, settings: how they were found.
    """

    bases: Sequence[Tensor]
    labels: Sequence[str]
    source: FeatureSource
    mean: Tensor | None = None
    method: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    encoder: SparseEncoder | None = None

    def __post_init__(self) -> None:
        if not self.bases or len(self.bases) != len(self.labels):
            raise FeatInvError(
                f"{len(self.bases)} concept bases and {len(self.labels)} labels; expected as many, at least one"
            )
        for label, basis in zip(self.labels, self.bases):
            if basis.ndim != 2 or basis.shape[1] != self.source.channels or not basis.isfinite().all():
                raise FeatInvError(
                    f"concept {label!r}: basis of shape {tuple(basis.shape)}; expected [d, {self.source.channels}],"
                    " finite"
                )
        if self.mean is not None and tuple(self.mean.shape) != (self.source.channels,):
            raise FeatInvError(f"a mean of shape {tuple(self.mean.shape)}; expected [{self.source.channels}]")
        if self.encoder is not None and self.encoder.bias.shape != self.encoder.weight.shape[:1]:
            raise FeatInvError(
                f"an encoder with a bias of shape {tuple(self.encoder.bias.shape)}; expected [{len(self)}], one number"
                " for each concept"
            )
        if self.encoder is not None and tuple(self.encoder.weight.shape) != tuple(self._stacked.shape):
            raise FeatInvError(
                f"an encoder of shape {tuple(self.encoder.weight.shape)} for {len(self)} concepts; expected"
                f" {tuple(self._stacked.shape)}"
            )

    def __len__(self) -> int:
        return len(self.bases)

    @property
    def names(self) -> list[str]:
        """The labels and, last, the rest."""
        return [*self.labels, REST]

    @cached_property
    def _stacked(self) -> Tensor:
        """U [D, C], all bases one below the other, in float32."""
        return torch.cat([b.float() for b in self.bases])

    @cached_property
    def _inverse(self) -> Tensor:
        """E [C, D], the pseudo-inverse of U."""
        return torch.linalg.pinv(self._stacked.double()).float()

    @cached_property
    def _rows(self) -> list[Tensor]:
        """Which rows of U belong to each concept."""
        return list(torch.arange(len(self._stacked)).split([len(b) for b in self.bases]))

    def index(self, name: str | int) -> int:
        """A concept by label or number; the rest comes after the last. Raises FeatInvError, listing what there is."""
        names = self.names
        if str(name) in names:
            return names.index(str(name))
        if str(name).strip().isdigit() and int(name) < len(names):
            return int(name)
        listed = [f"{i} {n}" for i, n in enumerate(names)]
        listed = listed if len(listed) <= 24 else [*listed[:12], "...", listed[-1]]
        raise FeatInvError(f"there is no concept {name!r}; there are {len(names)}: {', '.join(listed)}")

    def _split(self, features: FeatureMap) -> tuple[Tensor, Tensor]:
        """phi [N, C] at all N = B H W locations and its coefficients z [N, D], a sparse tensor where the code is
        sparse."""
        features.source.require(self.source, "the feature map", "the concepts")
        phi = rearrange(features.values, "b c h w -> (b h w) c")
        centred = phi if self.mean is None else phi - self.mean.to(phi)
        if self.encoder is None:
            return phi, centred @ self._inverse.to(phi)
        encoder = self.encoder.to(phi.device)
        return phi, torch.cat([encoder(part).to_sparse() for part in centred.split(ROWS)]).coalesce()

    def _of(self, code: Tensor, number: int) -> Tensor:
        """z_i [N, d_i] out of z [N, D]."""
        return code.index_select(1, self._rows[number].to(code.device)).to_dense()

    def coefficients(self, features: FeatureMap, name: str | int) -> Tensor:
        """[B, d_i, H, W]: z_i of one concept at each location; of the rest the rest itself, d = C.

        Raises FeatInvError for a concept that there is not, and for a map of another source.
        """
        number = self.index(name)
        phi, code = self._split(features)
        values = phi - code @ self._stacked.to(phi) if number == len(self) else self._of(code, number)
        return _as_map(values, features)

    def part(self, features: FeatureMap, name: str | int) -> Tensor:
        """[B, C, H, W]: phi_i = z_i U_i of one concept, or the rest. Raises as coefficients does."""
        number, values = self.index(name), self.coefficients(features, name)
        return values if number == len(self) else torch.einsum("bdhw,dc->bchw", values, self.bases[number].to(values))

    def each_part(self, features: FeatureMap) -> Iterator[Tensor]:
        """phi_1, ..., phi_n and the rest, [B, C, H, W] one after the other; their sum is phi."""
        phi, code = self._split(features)
        for number, basis in enumerate(self.bases):
            yield _as_map(self._of(code, number) @ basis.to(phi), features)
        yield _as_map(phi - code @ self._stacked.to(phi), features)

    def parts(self, features: FeatureMap) -> Tensor:
        """[n + 1, B, C, H, W]: all of each_part at once, n + 1 times the memory of the map."""
        return torch.stack(list(self.each_part(features)))

    def scale(self, features: FeatureMap, factors: Mapping[str | int, float]) -> FeatureMap:
        """phi + sum over the named concepts of (a_i - 1) phi_i: each scaled by its factor (paper Algorithm 1: 0.25).

        The class token, if there is one, is dropped: it no longer belongs to the map. Memory: a few copies of the map.
        """
        phi, code = self._split(features)
        bases = self._stacked.to(phi)
        changes = {self.index(name): factor - 1 for name, factor in factors.items()}
        rest = changes.pop(len(self), None)
        weights = bases.new_zeros(len(bases), 1)
        for number, change in changes.items():
            weights[self._rows[number]] = change
        values = phi + code @ (weights * bases)
        if rest is not None:
            values = values + rest * (phi - code @ bases)
        return features.with_values(_as_map(values, features))

    def lengths(self, features: FeatureMap) -> Tensor:
        """[n + 1, B, H, W]: |phi_i| at each location, the rest last."""
        phi, code = self._split(features)
        lengths = []
        for number, basis in enumerate(self.bases):
            triangle = torch.linalg.qr(basis.float().T, mode="r")[1].to(phi)  # U_i = R^T Q^T, so |z_i U_i| = |z_i R^T|
            lengths.append((self._of(code, number) @ triangle.T).norm(dim=1))
        lengths.append((phi - code @ self._stacked.to(phi)).norm(dim=1))
        batch, _, height, _ = features.values.shape
        return rearrange(torch.stack(lengths), "n (b h w) -> n b h w", b=batch, h=height)

    def activation(self, features: FeatureMap) -> Tensor:
        """[n + 1, B, H, W] in 0..1 or little above: |phi_i| at each location over the largest |phi| of the picture."""
        return self.lengths(features) / features.values.norm(dim=1).amax((1, 2))[:, None, None].clamp(min=1e-8)


def _as_map(rows: Tensor, features: FeatureMap) -> Tensor:
    """[N, d] at the locations of a map to [B, d, H, W]."""
    batch, _, height, _ = features.values.shape
    return rearrange(rows, "(b h w) d -> b d h w", b=batch, h=height)


def completeness(bases: Sequence[Tensor], weights: Tensor) -> Tensor:
    """eta [classes] in 0..1: |P w| / |w|, P onto the span of bases [d_i, C]; the rest keeps what is missing.

    weights: [C, classes], from relevance.class_weights. (MCD; a dictionary that spans the space is complete: 1.)
    """
    rows, values, _ = torch.linalg.svd(torch.cat([b.double() for b in bases]).T, full_matrices=False)
    span = rows[:, values > 1e-6 * values.max()]  # [C, rank]
    weights = weights.double().cpu()
    return ((span.T @ weights).norm(dim=0) / weights.norm(dim=0).clamp(min=1e-12)).float()
