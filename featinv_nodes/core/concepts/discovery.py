"""Concepts from feature vectors: multi-dimensional concept discovery (MCD), PCA, NMF, k-means, or a user's directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..feature_map import FeatInvError, FeatureSource
from ..files import read_tensors
from .clustering import Progress, elastic_net_affinity, neighbour_affinity, principal, reduced, spectral_clusters, unit
from .decomposition import Concepts

METHODS = ("mcd", "mcd-elastic-net", "pca", "nmf", "kmeans")
SINGLES = "directions"
SMALLEST_SHARE, SMALLEST_EIGENVALUE, SMALLEST_SINE = 0.02, 0.05, 0.2


def discover(
    vectors: Tensor, source: FeatureSource, method: str = "mcd", concepts: int = 10, seed: int = 0, centred: bool = False, progress: Progress = lambda done, total: None
) -> Concepts:
    """Concepts of feature vectors [N, C]; the same data and seed give the same ones.

    method: "mcd" (multi-dimensional subspaces, Vielhaben et al. 2023, with a fast affinity), "mcd-elastic-net" (with
    the published one: minutes for thousands of vectors), or single directions: "pca" (with a mean), "nmf" (the
    dictionary of CRAFT, Fel et al. 2023, for vectors >= 0), "kmeans" (centres of the unit vectors).
    concepts: clusters or directions. centred: MCD's bases are those of PCA about each cluster's mean, as published,
    instead of the linear subspace through the origin. progress: called with vectors done, of how many.
    Clusters that collapse are not returned but listed in the settings under "rejected".

    Memory: a few copies of the vectors, 512 N numbers for the affinity and 8 C^2: about 1 GB for 20,000 x 1,024.
    Raises FeatInvError for vectors from which these concepts cannot be found.
    """
    vectors = _checked(vectors, source, method, concepts).float().cpu()
    settings: dict[str, object] = {"vectors": len(vectors), "concepts": concepts, "seed": seed}
    if method.startswith("mcd"):
        found, rejected = subspaces(vectors, concepts, seed, method.endswith("elastic-net"), centred, progress)
        settings |= {"centred": centred, "rejected": rejected}
        return Concepts(found, [f"concept {i}" for i in range(len(found))], source, None, method, settings)
    mean = vectors.mean(0) if method == "pca" else None
    rows = _directions(vectors, method, concepts, seed)
    progress(len(vectors), len(vectors))
    rejected = dependent(rows)
    kept = [row[None] for i, row in enumerate(rows) if i not in rejected]
    settings["rejected"] = [f"direction {i}: zero, or in the span of those before it" for i in rejected]
    return Concepts(kept, [f"concept {i}" for i in range(len(kept))], source, mean, method, settings)


def _checked(vectors: Tensor, source: FeatureSource, method: str, concepts: int) -> Tensor:
    if method not in METHODS:
        raise FeatInvError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if vectors.ndim != 2 or vectors.shape[1] != source.channels:
        raise FeatInvError(f"vectors of shape {tuple(vectors.shape)}; expected [N, {source.channels}] from {source.describe()}")
    if not vectors.isfinite().all():
        raise FeatInvError("the feature vectors hold NaN or infinite values; check the pictures and the weights")
    if len(vectors) < vectors.shape[1]:
        raise FeatInvError(f"{len(vectors)} vectors of {vectors.shape[1]} channels; expected at least as many vectors as channels: give more pictures")
    least, most = (2 if method.startswith("mcd") else 1), vectors.shape[1] - 1
    if not least <= concepts <= most:
        raise FeatInvError(f"{concepts} concepts by {method}; expected {least} to {most}")
    if (vectors - vectors.mean(0)).norm() <= 1e-5 * vectors.norm():
        raise FeatInvError("all feature vectors are alike; give pictures that differ, and a layer that sees it")
    if method == "nmf" and (vectors < 0).any():
        raise FeatInvError("NMF needs features without negative values, as after a ReLU; choose another layer or method")
    return vectors


def subspaces(vectors: Tensor, clusters: int, seed: int, published: bool, centred: bool, progress: Progress) -> tuple[list[Tensor], list[str]]:
    """MCD: cluster the unit vectors of [N, C] by subspace; -> a basis [d_i, C] for each cluster, largest first, whose
    sum is direct, and why other clusters gave none.

    A cluster's dimension is the number of eigenvalues above 5 % of its largest.
    """
    points = unit(vectors[vectors.norm(dim=1) > 1e-6 * vectors.norm(dim=1).max()])  # a ReLU leaves vectors without direction
    if published:
        affinity, kept = elastic_net_affinity(reduced(points), progress)
        points = points[kept]
    else:
        affinity = neighbour_affinity(reduced(points), progress)
    labels = spectral_clusters(affinity, clusters, seed)
    bases, rejected = [], []
    for number in labels.bincount(minlength=clusters).argsort(descending=True, stable=True).tolist():
        members = points[labels == number]
        basis = cluster_basis(members, centred) if len(members) > SMALLEST_SHARE * len(points) else members[:0]
        taken = dependent(torch.cat([*bases, basis]))
        start = sum(len(b) for b in bases)
        own = [i for i in range(len(basis)) if start + i not in taken]
        if own:
            bases.append(basis[own])
        else:
            why = "under 2 %" if len(members) <= SMALLEST_SHARE * len(points) else f"{len(basis)} dimensions, all in the span of larger clusters"
            rejected.append(f"cluster of {len(members)} of {len(points)} vectors: {why}")
    if len(bases) < 2:
        raise FeatInvError(f"the vectors fall into a single cluster ({'; '.join(rejected)}); ask for another number of concepts, more varied pictures or method 'pca'")
    return bases, rejected


def cluster_basis(members: Tensor, centred: bool) -> Tensor:
    """[d, C] orthonormal principal directions of a cluster [M, C], about its mean or about the origin; d = 0 if it has none."""
    rows, values = principal(members - members.mean(0) if centred else members)
    dimension = int((values > max(SMALLEST_EIGENVALUE * values[0].item(), 1e-6)).sum())
    return rows[: min(dimension, len(members) - 1)].contiguous()


def dependent(rows: Tensor) -> list[int]:
    """Which of the unit rows [n, C] lie, to within a sine of 0.2, in the span of those before them (or are zero).

    Without these, the oblique decomposition has no subspaces that intersect, and no parts far longer than the whole.
    """
    found, span = [], rows.new_zeros(0, rows.shape[1]).double()
    for i, row in enumerate(rows.double()):
        left = row - (row @ span.T) @ span
        left = left - (left @ span.T) @ span  # twice is enough (Kahan and Parlett)
        if left.norm() <= SMALLEST_SINE:
            found.append(i)
        else:
            span = torch.cat([span, unit(left[None])])
    return found


def _directions(vectors: Tensor, method: str, count: int, seed: int) -> Tensor:
    """[count, C] single directions of unit length, or zero."""
    if method == "pca":
        return principal(vectors - vectors.mean(0))[0][:count].contiguous()
    if method == "nmf":
        from sklearn.decomposition import NMF

        rows = NMF(count, init="nndsvda", random_state=seed, max_iter=400, tol=1e-3).fit(vectors.numpy()).components_
    else:
        from sklearn.cluster import KMeans

        rows = KMeans(count, n_init=4, random_state=seed).fit(unit(vectors).numpy()).cluster_centers_
    return unit(torch.from_numpy(rows).float())


def own_directions(file: str | Path, source: FeatureSource) -> Concepts:
    """Concepts from a safetensors file of vectors: each tensor, [C] or [d, C], is a concept and its key the label;
    "directions" [n, C] alone is n concepts of one direction each.

    Raises FeatInvError for a file or tensors that are no such thing, and for directions that depend on one another.
    """
    try:
        tensors = read_tensors(file)
    except (SafetensorError, OSError) as error:
        raise FeatInvError(f"{file} is missing or no complete safetensors file of directions: {error}") from error
    bases, labels = _own(tensors)
    for label, basis in zip(labels, bases):
        if basis.ndim != 2 or basis.shape[1] != source.channels or not basis.isfinite().all() or not basis.norm(dim=1).all():
            raise FeatInvError(f"{file}: {label!r} has the shape {tuple(basis.shape)}; expected [d, {source.channels}], finite, no row zero, for {source.describe()}")
    bases = [unit(b.float()) for b in bases]
    bad = dependent(torch.cat(bases)) if bases else []
    if bad or not bases:
        raise FeatInvError(f"{file}: expected at least one direction, none in the span of those before it; of {sum(map(len, bases))} rows these are: {bad[:8]}")
    return Concepts(bases, labels, source, None, "own directions", {"file": Path(file).name})


def _own(tensors: dict[str, Tensor]) -> tuple[Sequence[Tensor], list[str]]:
    if list(tensors) == [SINGLES] and tensors[SINGLES].ndim == 2:
        return [row[None] for row in tensors[SINGLES]], [f"concept {i}" for i in range(len(tensors[SINGLES]))]
    return [t[None] if t.ndim == 1 else t for t in tensors.values()], list(tensors)
