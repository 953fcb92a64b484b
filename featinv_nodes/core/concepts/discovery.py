"""Concepts from feature vectors: multi-dimensional concept discovery (MCD), PCA, NMF, k-means, or a sparse
autoencoder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FeatInvError
from ..feature_map import FeatureSource
from ..waiting import Check, Progress, attended, unchecked
from .clustering import elastic_net_affinity, neighbour_affinity, principal, reduced, spectral_clusters
from .decomposition import Concepts, completeness
from .sparse import fit_dictionary

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_array
    from sklearn.cluster import KMeans

METHODS = ("mcd", "mcd-elastic-net", "pca", "nmf", "kmeans", "sae")
SMALLEST_SHARE, SMALLEST_EIGENVALUE, SMALLEST_SINE = 0.02, 0.05, 0.2
COMPLETE, MOST_CLUSTERS = 0.5, 40  # eta at which the published search ends; where ours does, at the latest
RUNS = 4  # of k-means, of which the best counts
ACTIVE = 16  # atoms of a sparse dictionary in each vector, if not said otherwise


class Request(TypedDict):
    """What to discover. vectors: N. concepts: clusters, directions or atoms; 0 for as many as are complete."""

    vectors: int
    concepts: int
    seed: int


class Settings(Request, total=False):
    """How concepts were found, as Concepts.settings keep it. centred, grown: of MCD; grown: [clusters, eta] of each
    step. active: of sae. rejected: what gave no concept, and why."""

    centred: bool
    active: int
    rejected: list[str]
    grown: list[list[float]]


def discover(
    vectors: Tensor,
    source: FeatureSource,
    method: str = "mcd",
    concepts: int = 10,
    seed: int = 0,
    centred: bool = False,
    progress: Progress = unchecked,
    weights: Tensor | None = None,
    active: int | None = None,
) -> Concepts:
    """Concepts of feature vectors [N, C]; the same data and seed give the same ones.

    method: "mcd" (multi-dimensional subspaces, Vielhaben et al. 2023, with a fast affinity), "mcd-elastic-net" (with
    the published one: minutes for thousands of vectors), single directions: "pca" (with a mean), "nmf" (the dictionary
    of CRAFT, Fel et al. 2023, for vectors >= 0), "kmeans" (centres of the unit vectors), or "sae" (the dictionary of a
    TopK sparse autoencoder, Gao et al. 2024, its atoms by decreasing share, with a mean and an encoder).
    concepts: clusters, directions or atoms; 0: MCD with 2, 3, ... clusters until the completeness eta, the mean over
    the classes of `weights` [C, classes], reaches 0.5. centred: MCD's bases are those of PCA about each cluster's mean,
    as published, instead of the linear subspace through the origin. progress: called with steps done, of how many, ten
    times a second and oftener; what it raises ends the search.
    active: k, the atoms of a sparse dictionary that are active in each vector; an eighth of all and at most 16, if
    None. Clusters that collapse are not returned but listed in the settings under "rejected".

    Memory: a few copies of the vectors, 512 N numbers for the affinity and 8 C^2 (about 1 GB for 20,000 x 1,024), or
    24 n C for n atoms.
    Raises FeatInvError for vectors from which these concepts cannot be found.
    """
    vectors = _checked(vectors, source, method, concepts, weights, active).float().cpu()
    finished = partial(progress, len(vectors), len(vectors))
    settings: Settings = {"vectors": len(vectors), "concepts": concepts, "seed": seed}
    if method.startswith("mcd"):
        points, affinity = affinities(vectors, method.endswith("elastic-net"), progress)
        settings["centred"] = centred
        if concepts == 0 and weights is not None:  # never one without the other, see _checked
            return _grown(points, affinity, source, method, settings, weights, finished)
        found = attended(lambda: subspaces(points, affinity, concepts, seed, centred), finished)
        return _mcd(found, source, method, settings)
    if method == "sae":
        settings["active"] = max(1, min(ACTIVE, concepts // 8)) if active is None else active
        return _sae(vectors, source, settings, progress)
    mean = vectors.mean(0) if method == "pca" else None
    rows = _directions(vectors, method, concepts, seed, progress)
    rejected = attended(lambda: dependent(rows), finished)
    kept = [row[None] for i, row in enumerate(rows) if i not in rejected]
    settings["rejected"] = [f"direction {i}: zero, or in the span of those before it" for i in rejected]
    return Concepts(kept, numbered(len(kept)), source, mean, method, settings)


def numbered(count: int) -> list[str]:
    return [f"concept {i}" for i in range(count)]


def _checked(
    vectors: Tensor, source: FeatureSource, method: str, concepts: int, weights: Tensor | None, active: int | None
) -> Tensor:
    if method not in METHODS:
        raise FeatInvError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if vectors.ndim != 2 or vectors.shape[1] != source.channels:
        raise FeatInvError(
            f"vectors of shape {tuple(vectors.shape)}; expected [N, {source.channels}] from {source.describe()}"
        )
    if not vectors.isfinite().all():
        raise FeatInvError("the feature vectors hold NaN or infinite values; check the images and the weights")
    if len(vectors) < vectors.shape[1]:
        raise FeatInvError(
            f"{len(vectors)} vectors of {vectors.shape[1]} channels; expected at least as many vectors as channels:"
            " give more images"
        )
    if concepts == 0 and (not method.startswith("mcd") or weights is None):
        raise FeatInvError(
            "only mcd, with the weights of classes, can look for concepts until they are complete; give a number of"
            f" them for {method}"
        )
    least, most = (2 if method.startswith("mcd") else 1), (len(vectors) if method == "sae" else vectors.shape[1] - 1)
    if concepts and not least <= concepts <= most:
        raise FeatInvError(f"{concepts} concepts by {method}; expected {least} to {most}")
    if active is not None and (method != "sae" or not 1 <= active <= concepts):
        raise FeatInvError(f"{active} active atoms by {method}; expected 1 to {concepts}, by sae")
    if (vectors - vectors.mean(0)).norm() <= 1e-5 * vectors.norm():
        raise FeatInvError("all feature vectors are alike; give more varied images, or another layer")
    if method == "nmf" and (vectors < 0).any():
        raise FeatInvError(
            "NMF needs features without negative values, as after a ReLU; choose another layer or method"
        )
    return vectors


def affinities(vectors: Tensor, published: bool, progress: Progress) -> tuple[Tensor, csr_array]:
    """MCD, first step: unit vectors [M, C] and which lie in a subspace with which [M, M]."""
    lengths = vectors.norm(dim=1)
    points = F.normalize(vectors[lengths > 1e-6 * lengths.max()])  # a ReLU leaves vectors without direction
    short = attended(lambda: reduced(points), partial(progress, 0, len(points)))
    if not published:
        return points, neighbour_affinity(short, progress)
    affinity, kept = elastic_net_affinity(short, progress)
    return points[kept], affinity


def subspaces(
    points: Tensor, affinity: csr_array, clusters: int, seed: int, centred: bool
) -> tuple[list[Tensor], list[str]]:
    """MCD, second step: spectral clusters of the unit vectors [M, C]; -> a basis [d_i, C] for each, largest first,
    whose sum is direct, and why other clusters gave none.

    A cluster's dimension is the number of eigenvalues above 5 % of its largest.
    """
    labels = spectral_clusters(affinity, clusters, seed)
    bases: list[Tensor] = []
    rejected = []
    for number in labels.bincount(minlength=clusters).argsort(descending=True, stable=True).tolist():
        members = points[labels == number]
        basis = cluster_basis(members, centred) if len(members) > SMALLEST_SHARE * len(points) else members[:0]
        taken = dependent(torch.cat([*bases, basis]))
        start = sum(len(b) for b in bases)
        own = [i for i in range(len(basis)) if start + i not in taken]
        if own:
            bases.append(basis[own])
        else:
            why = (
                "under 2 %"
                if len(members) <= SMALLEST_SHARE * len(points)
                else f"{len(basis)} dimensions, all in the span of larger clusters"
            )
            rejected.append(f"cluster of {len(members)} of {len(points)} vectors: {why}")
    return bases, rejected


def _mcd(result: tuple[list[Tensor], list[str]], source: FeatureSource, method: str, settings: Settings) -> Concepts:
    bases, rejected = result
    if len(bases) < 2:
        why = "; ".join(rejected if len(rejected) <= 3 else [*rejected[:2], f"and {len(rejected) - 2} more"])
        raise FeatInvError(
            f"fewer than two clusters of vectors are large and different enough for a concept ({why}); ask for another"
            " number of concepts, give more varied images, or choose the method 'pca'"
        )
    return Concepts(bases, numbered(len(bases)), source, None, method, {**settings, "rejected": rejected})


def _grown(
    points: Tensor,
    affinity: csr_array,
    source: FeatureSource,
    method: str,
    settings: Settings,
    weights: Tensor,
    check: Check,
) -> Concepts:
    """As many clusters as completeness asks for; the affinity is that of all. The way there goes into the settings."""
    way = []
    for clusters in range(2, MOST_CLUSTERS + 1):
        step = partial(subspaces, points, affinity, clusters, settings["seed"], settings["centred"])
        result = attended(step, check)
        eta = attended(partial(completeness, result[0], weights), check).mean().item() if result[0] else 0.0
        way.append([clusters, round(eta, 4)])
        if len(result[0]) > 1 and eta >= COMPLETE:
            break
    return _mcd(result, source, method, {**settings, "grown": way})


def cluster_basis(members: Tensor, centred: bool) -> Tensor:
    """[d, C] orthonormal principal directions of a cluster [M, C], about its mean or about the origin; d = 0 if it has
    none."""
    rows, values = principal(members - members.mean(0) if centred else members)
    dimension = int((values > max(SMALLEST_EIGENVALUE * values[0].item(), 1e-6)).sum())
    return rows[: min(dimension, len(members) - 1)].contiguous()


def dependent(rows: Tensor) -> list[int]:
    """Which of the unit rows [n, C] lie, to within a sine of 0.2, in the span of those before them (or are zero).

    Without these, the oblique decomposition has no subspaces that intersect, and no parts far longer than the whole.
    """
    chosen, span = [], rows.new_zeros(0, rows.shape[1]).double()
    for i, row in enumerate(rows.double()):
        left = row - (row @ span.T) @ span
        left = left - (left @ span.T) @ span  # twice is enough (Kahan and Parlett)
        if left.norm() <= SMALLEST_SINE:
            chosen.append(i)
        else:
            span = torch.cat([span, F.normalize(left[None])])
    return chosen


def _directions(vectors: Tensor, method: str, count: int, seed: int, progress: Progress) -> Tensor:
    """[count, C] single directions of unit length, or zero."""
    begun = partial(progress, 0, len(vectors))
    if method == "pca":
        return attended(lambda: principal(vectors - vectors.mean(0))[0][:count].contiguous(), begun)
    if method == "nmf":
        rows = attended(lambda: _dictionary(vectors, count, seed), begun)
    else:
        rows = _centres(F.normalize(vectors), count, seed, progress)
    return F.normalize(torch.from_numpy(rows).float())


def _dictionary(vectors: Tensor, count: int, seed: int) -> np.ndarray:
    """[count, C] of NMF."""
    from sklearn.decomposition import NMF

    return NMF(count, init="nndsvda", random_state=seed, max_iter=400, tol=1e-3).fit(vectors.numpy()).components_


def _centres(points: Tensor, count: int, seed: int, progress: Progress) -> np.ndarray:
    """[count, C] the centres that scikit-learn's KMeans(count, n_init=RUNS, random_state=seed) finds, run by run."""
    import numpy as np

    random, data, runs = np.random.RandomState(seed), points.numpy(), []

    def run() -> KMeans:
        from sklearn.cluster import KMeans  # the first import takes seconds

        return KMeans(count, n_init=1, random_state=random).fit(data)

    for done in range(RUNS):
        runs.append(attended(run, partial(progress, done * len(data) // RUNS, len(data))))
    return min(runs, key=lambda run: run.inertia_).cluster_centers_


def _sae(vectors: Tensor, source: FeatureSource, settings: Settings, progress: Progress) -> Concepts:
    mean, atoms = vectors.mean(0), settings["concepts"]
    decoder, encoder = fit_dictionary(vectors - mean, atoms, settings["active"], settings["seed"], progress)
    energy = torch.zeros(atoms)
    for part in vectors.split(1024):
        energy += encoder(part - mean).square().sum(0)
        progress(len(vectors), len(vectors))
    order = energy.argsort(descending=True, stable=True)[: int((energy > 0).sum())]
    settings["rejected"] = [f"{atoms - len(order)} of {atoms} atoms: never active"] if len(order) < atoms else []
    return Concepts(
        list(decoder[order, None]), numbered(len(order)), source, mean, "sae", settings, encoder.select(order)
    )
