"""How faithful a reconstruction is: the paper's measures (Sec. 4.1) and what is needed to read them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import FeatInvError
from .feature_map import FeatureMap

FEW = 10  # values below which an interval is marked
AT_ONCE = 10_000_000  # resampled values in memory


def cosine_per_location(a: FeatureMap, b: FeatureMap, centre: Tensor | None = None) -> Tensor:
    """[B, H, W] cosine similarity of the feature vectors at each location.

    centre: [C], subtracted from both first (the mean vector of a reference set). ReLU features share a large common
    part; without it the cosine of unrelated pictures is near zero.
    """
    a.source.require(b.source, "the original feature map", "the reconstruction's")
    x, y = a.values, b.values
    if centre is not None:
        x, y = x - centre[:, None, None], y - centre[:, None, None]
    return F.cosine_similarity(x, y, dim=1)


def cosine(a: FeatureMap, b: FeatureMap, centre: Tensor | None = None) -> Tensor:
    """[B] mean over the locations of cosine_per_location: the number under the paper's figures."""
    return cosine_per_location(a, b, centre).mean((1, 2))


def best_rows(similarity: Tensor, maps: int, keep: int) -> Tensor:
    """[maps * keep] the rows of similarity [N] with the highest values, `keep` of each map, the best first.

    Row i belongs to map i mod maps: the pictures of several maps repeated in turn. Raises FeatInvError unless there is
    a whole number of rows to a map, and at least `keep`.
    """
    if len(similarity) % maps or not 1 <= keep <= len(similarity) // maps:
        raise FeatInvError(
            f"{len(similarity)} images of {maps} feature maps, {keep} of each to keep: expected a multiple of {maps}"
            " images, and at least as many of each map as are kept"
        )
    best = similarity.unflatten(0, (-1, maps)).topk(keep, dim=0).indices  # [keep, maps]
    return (best * maps + torch.arange(maps, device=best.device)).T.flatten()


def top_k_match(original: Tensor, reconstruction: Tensor, k: int) -> Tensor:
    """[B] bool: the original's top-1 class is among the reconstruction's k best; logits [B, classes]."""
    best = reconstruction.topk(min(k, reconstruction.shape[1]), dim=1).indices
    return (best == original.argmax(1, keepdim=True)).any(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of vectors [N, D] (Heusel et al. 2017), in float64.

    In the feature space of any model but Inception this is no FID, and must not be called so.
    """
    a, b = a.double(), b.double()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))  # covariances a^T a and b^T b
    if max(len(a), len(b)) < a.shape[1]:  # the smaller matrix: tr sqrt(a^T a b^T b) is the nuclear norm of a b^T
        root = torch.linalg.matrix_norm(a @ b.T, "nuc")
    else:
        root = torch.linalg.eigvals(a.T @ a @ b.T @ b).real.clamp(min=0).sqrt().sum()
    return float(gap + a.square().sum() + b.square().sum() - 2 * root)


def bootstrap(
    *samples: Tensor, statistic: Callable[..., np.ndarray] = np.mean, draws: int = 2000, seed: int = 0
) -> dict:
    """Mean of [N] values with its 95 % percentile bootstrap interval, by SciPy: {"value", "low", "high", "n"}.

    samples: several [N] whose rows belong together, row i of each to picture i. statistic(*samples, axis): another one
    than the mean, vectorised. One value has no interval: low and high are None. Of fewer than FEW values an interval
    says little, and the entry has "few": True.
    """
    from scipy import stats

    x = tuple(sample.double().cpu().numpy() for sample in samples)
    entry = {"value": float(statistic(*x, axis=-1)), "low": None, "high": None, "n": len(x[0])}
    if len(x[0]) > 1:
        result = stats.bootstrap(
            x,
            statistic,
            n_resamples=draws,
            batch=max(1, AT_ONCE // len(x[0])),
            vectorized=True,
            paired=True,
            axis=-1,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
        entry |= {"low": float(result.confidence_interval.low), "high": float(result.confidence_interval.high)}
    return entry | ({"few": True} if len(x[0]) < FEW else {})
