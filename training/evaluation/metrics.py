"""Figures with their sample counts and 95 % intervals: of means over images, and of the distance of two sets of
images.

The distances are between sets of feature vectors. In Inception's feature space they are FID (Heusel et al. 2017) and
KID (Binkowski et al. 2018); in any other they are not, and are named after the space.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import FEW, bootstrap, frechet_distance

RESAMPLES = {512: 100, 100_000: 20}  # of the sets' distances, by the vectors' length at most
ENOUGH = 2048  # pictures below which the Frechet distance is marked as biased: FID's number of channels
FEWEST = 8  # pictures of which a set's distance says anything
ROWS = 1024  # of a kernel matrix at once
SUBSETS, SUBSET = 100, 1000  # of KID as published: the mean over so many subsets of so many vectors


def mean_entry(values: Tensor) -> dict:
    """The mean over the pictures [N] for which the measure is defined (not NaN), with a percentile bootstrap interval:
    {"value", "low", "high", "n"}."""
    values = values[~values.isnan()]
    return bootstrap(values) if len(values) else {"value": None, "n": 0}


def set_entries(space: str, originals: Tensor, pictures: Tensor) -> dict[str, dict]:
    """Frechet distance, KID and paired KID between the vectors [N, D] of originals and of the pictures drawn for them,
    named after their space; nothing for fewer than eight pictures.

    The intervals are the value plus and minus 1.96 standard deviations over bootstrap resamples of the pairs;
    percentiles of the Frechet distance would lie above its value, to which drawing with replacement adds. It is marked
    "biased" below max(2048, D) pictures, where it comes out too large (Chong and Forsyth 2020); KID has no such bias.
    """
    n = len(pictures)
    if n < FEWEST:
        return {}
    resamples = next(count for size, count in RESAMPLES.items() if originals.shape[1] <= size)
    picks = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    weights = torch.stack([torch.bincount(p, minlength=n) for p in picks])
    spread = torch.tensor([frechet_distance(originals[p], pictures[p]) for p in picks])
    frechet = _around(frechet_distance(originals, pictures), spread, n) | {
        "biased": n < max(ENOUGH, originals.shape[1])
    }
    published = _around(published_kid(originals, pictures), kid(originals, pictures, False, weights), n)
    paired = _around(kid(originals, pictures, True).item(), kid(originals, pictures, True, weights), n)
    name = "fid" if space == "Inception" else f"frechet_distance ({space})"
    return {name: frechet, f"kid ({space})": published, f"kid_paired ({space})": paired}


def _around(value: float, resampled: Tensor, n: int) -> dict:
    spread = 1.96 * resampled.std().item()
    entry = {"value": value, "low": value - spread, "high": value + spread, "n": n, "resamples": len(resampled)}
    return entry | ({"few": True} if n < FEW else {})


def require_kid() -> None:
    """Raises FeatInvError without torch-fidelity, by which KID is computed."""
    if find_spec("torch_fidelity") is None:
        raise FeatInvError("KID needs the package torch-fidelity: pip install torch-fidelity")


def published_kid(a: Tensor, b: Tensor) -> float:
    """KID of two sets of vectors [N, D] as torch-fidelity computes it: the mean of the unbiased estimate over 100
    random subsets of 1000 vectors, or that of all where there are no more. Raises FeatInvError without torch-fidelity.
    """
    require_kid()
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(SUBSET, len(a), len(b))
    result = kid_features_to_metric(
        a.double(),
        b.double(),
        kid_subsets=SUBSETS if max(len(a), len(b)) > size else 1,
        kid_subset_size=size,
        verbose=False,
    )
    return result["kernel_inception_distance_mean"]


def kid(a: Tensor, b: Tensor, paired: bool = False, weights: Tensor | None = None) -> Tensor:
    """[R] the kernel distance of two sets of vectors [N, D] and [M, D]: the unbiased estimate of the squared maximum
    mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, Sec. 4), over all pairs, in float64.

    paired: a_i and b_i belong together, N = M, and the pairs (a_i, b_i) are left out, which otherwise would make
    reconstructions look closer than any other pictures could be (the U-statistic of Gretton et al. 2012). That is no
    KID as published, and is called paired KID. weights [R, N]: how often each pair occurs in R resamples; a vector is
    not compared with its own copies.
    """
    a, b = a.double(), b.double()
    wa, wb = (torch.ones(1, len(x), dtype=torch.float64) if weights is None else weights.double() for x in (a, b))
    return _mean_kernel(a, a, wa, wa, True) + _mean_kernel(b, b, wb, wb, True) - 2 * _mean_kernel(a, b, wa, wb, paired)


def _mean_kernel(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, without_own: bool) -> Tensor:
    """[R] weighted means of k(x_i, y_j) over all pairs, or over those with i != j; some rows of the matrix at a
    time."""
    total, count = torch.zeros(len(wx), dtype=torch.float64), wx.sum(1) * wy.sum(1)
    for first in range(0, len(x), ROWS):
        rows = slice(first, first + ROWS)
        total += (wx[:, rows] * (wy @ _kernel(x[rows] @ y.T, x.shape[1]).T)).sum(1)
    if without_own:
        own = wx * wy
        total, count = total - own @ _kernel((x * y).sum(1), x.shape[1]), count - own.sum(1)
    return total / count


def _kernel(products: Tensor, size: int) -> Tensor:
    return (products / size + 1) ** 3
