"""FeatInv-Viz: what changes in the picture when a concept is turned down (paper Sec. 4.3, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from .feature_map import FeatInvError

THRESHOLD = 0.33


def difference(original: Tensor, attenuated: Tensor) -> Tensor:
    """[H, W] median over the seeds of the Euclidean distance over RGB at each pixel.

    original, attenuated: [n, 3, H, W], row i of both drawn with the same seed, from the feature map and from the one
    with the concept attenuated. Raises FeatInvError for batches of different shapes.
    """
    if original.shape != attenuated.shape:
        raise FeatInvError(
            f"{tuple(original.shape)} original and {tuple(attenuated.shape)} attenuated reconstructions; "
            "draw both with the same seed, size and number of pictures"
        )
    return (original - attenuated).norm(dim=1).quantile(0.5, dim=0)


def normalised(distance: Tensor) -> Tensor:
    """A difference map [H, W] scaled to 0..1 by its extremes; zeros where nothing changes."""
    low, high = distance.amin(), distance.amax()
    return (distance - low) / (high - low).clamp(min=1e-8)


def affected(distance: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """[H, W] 1.0 where the normalised difference reaches the threshold (Fig. 6: below 0.33 counts as unaffected)."""
    return (normalised(distance) >= threshold).float()
