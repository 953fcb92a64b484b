"""Subspace clustering: which feature vectors lie in a common linear subspace (the first half of MCD)."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..waiting import Progress, attended

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NEIGHBOURS, CHUNK, REDUCED = 20, 512, 128
GAMMA, DROPPED = 10.0, 0.25  # of the elastic net, as published with MCD


def principal(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors of [N, C] as rows [C, C] and their eigenvalues [C], largest first; not centred.

    Through the C x C matrix of second moments, so that N does not matter. The largest entry of each row is positive.
    """
    values, rows = torch.linalg.eigh(vectors.T.double() @ vectors.double() / len(vectors))
    rows, values = rows.T.flip(0), values.flip(0).clamp(min=0)
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return (rows * signs).float(), values.float()


def reduced(vectors: Tensor) -> Tensor:
    """Unit vectors [N, C] along their 128 principal directions, of unit length again [N, 128]: subspaces stay
    subspaces."""
    rows, _ = principal(vectors)
    return F.normalize(vectors @ rows[:REDUCED].T)


def neighbour_affinity(points: Tensor, progress: Progress) -> csr_array:
    """Thresholded |cosine| [N, N] (Heckel and Boelcskei 2015, "Robust subspace clustering via thresholding").

    Each of the unit vectors [N, C] is joined with the 20 of largest |cosine|, with the weight exp(-2 arccos |cosine|).
    Memory: 512 rows of the N x N cosines at a time. progress: called with vectors done, of how many.
    """
    from scipy.sparse import csr_array

    total, weights, columns = len(points), [], []
    for start in range(0, total, CHUNK):
        largest, where = attended(partial(_nearest, points, start), partial(progress, start, total))
        weights.append(torch.exp(-2 * torch.arccos(largest.clamp(max=1))))
        columns.append(where)
        progress(start + len(where), total)
    weight, column = torch.cat(weights), torch.cat(columns)
    ends = range(0, weight.numel() + 1, weight.shape[1])
    return csr_array((weight.flatten().double().numpy(), column.flatten().numpy(), list(ends)), shape=(total, total))


def _nearest(points: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The largest |cosine| of 512 of the unit vectors, from number `start` on, and with which others."""
    cosine = (points[start : start + CHUNK] @ points.T).abs()
    cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = 0
    return cosine.topk(min(NEIGHBOURS, len(points) - 1))


def elastic_net(points: Tensor, progress: Progress) -> csr_array:
    """Coefficients [N, N] of each unit vector of [N, C] in all the others, zero for itself (You et al. 2016).

    min over c of |c|_1 + a / 2 |x - X c|^2 with a = gamma / largest |cosine| to x: gamma times the smallest a whose
    solution is not zero. (The published mixing weight tau = 1 leaves no |c|^2.) One path of least angles per vector;
    the coefficients are kept sparse. progress: called with vectors done, of how many.
    """
    from scipy.sparse import csr_array, vstack
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path

    columns = points.double().T.numpy().copy(order="F")  # [C, N], each vector contiguous
    size, total = columns.shape
    rows = []
    for i in range(total):
        x = columns[:, i].copy()
        columns[:, i] = 0  # a vector may not explain itself
        weakest = abs(x @ columns).max() / GAMMA / size  # 1 / a, in scikit-learn's scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of two equal vectors, one is left out
            rows.append(csr_array(lars_path(columns, x, method="lasso", alpha_min=weakest, return_path=False)[2][None]))
        columns[:, i] = x
        progress(i + 1, total)
    return vstack(rows, format="csr")


def elastic_net_affinity(points: Tensor, progress: Progress) -> tuple[csr_array, Tensor]:
    """The published affinity [M, M] and the numbers [M] of the vectors it is of.

    The quarter of the vectors with the largest coefficient norm (those that others explain badly) is dropped, the rest
    fitted again; |coefficients| with rows of unit length.
    """
    from scipy.sparse.linalg import norm
    from sklearn.preprocessing import normalize

    steps = 2 * len(points)
    lengths = torch.from_numpy(norm(elastic_net(points, lambda done, total: progress(done, steps)), axis=1))
    kept = lengths.argsort(stable=True)[: len(points) - int(DROPPED * len(points))].sort().values
    second = elastic_net(points[kept], lambda done, total: progress(len(points) + done * len(points) // total, steps))
    return abs(normalize(second)), kept


def spectral_clusters(affinity: csr_array, clusters: int, seed: int) -> Tensor:
    """[N] cluster numbers from |coefficients| or weights [N, N], made symmetric (Ng, Jordan and Weiss 2001).

    k-means on the unit rows of the leading eigenvectors of D^-1/2 A D^-1/2.
    """
    import numpy as np
    from scipy.sparse import diags
    from scipy.sparse.linalg import eigsh
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    affinity = (affinity + affinity.T) / 2
    scale = diags(1 / np.sqrt(np.maximum(affinity.sum(1), 1e-12)))
    start = np.random.default_rng(seed).standard_normal(affinity.shape[0])
    # wide: eigenvalues near one crowd together when the clusters are clean
    space = min(len(start), max(4 * clusters, 120))
    _, vectors = eigsh(scale @ affinity @ scale, clusters, which="LA", v0=start, ncv=space, maxiter=3000)
    labels = KMeans(clusters, n_init=10, random_state=seed).fit_predict(normalize(vectors))
    return torch.from_numpy(labels).long()
