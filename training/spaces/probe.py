"""How much of the image the vectors of a feature map keep: a linear probe, the same for every map.

Ridge regression from the vector at a location, with its neighbours where asked, to the pixels of its cell. Images are
compared at one resolution, whatever the map's grid: a cell has as many pixels as give at least SIDE along the image,
and the predicted image is averaged to SIDE x SIDE. All maps have as many training vectors, and the strength of the
ridge is chosen on images that are neither fitted to nor measured on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # pixels along the pictures that are compared
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # in units of the mean variance of an input
WINDOW, DEVIATION = 11, 1.5  # pixels of SSIM's Gaussian window (Wang et al. 2004)


def pixels_of(grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels down and along that belong to a cell of a grid."""
    return ceil(SIDE / grid[0]), ceil(SIDE / grid[1])


def targets(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixels of every cell, [B, H W, 3 p q], of pictures [B, 3, h, w]."""
    p, q = pixels_of(grid)
    scaled = F.interpolate(pictures, (grid[0] * p, grid[1] * q), mode="area")
    return rearrange(scaled, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=q)


def assembled(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of targets, at [B, 3, SIDE, SIDE]."""
    p, q = pixels_of(grid)
    whole = rearrange(cells, "b (y x) (c p q) -> b c (y p) (x q)", y=grid[0], p=p, q=q)
    return F.interpolate(whole, (SIDE, SIDE), mode="area")


def inputs(values: Tensor, around: int) -> Tensor:
    """Vectors of a map [B, C, H, W] as the probe reads them, [B, H W, C around^2]: with their neighbours in a square of
    `around` cells, which are zero beyond the edge."""
    if around == 1:
        return rearrange(values, "b c h w -> b (h w) c")
    return F.unfold(values, around, padding=around // 2).transpose(1, 2)


@dataclass(frozen=True)
class Probe:
    """y = (x - mean) weight + offset. ridge: the one chosen."""

    mean: Tensor
    weight: Tensor
    offset: Tensor
    ridge: float

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.double() - self.mean) @ self.weight + self.offset).float()


def fit_probe(x: Tensor, y: Tensor, own_x: Tensor, own_y: Tensor) -> Probe:
    """The ridge regression of y [N, E] on x [N, D], in the primal or the dual form, whichever is smaller, with the
    ridge of RIDGES that errs least on own_x, own_y."""
    mean, offset = x.double().mean(0), y.double().mean(0)
    x, y = x.double() - mean, y.double() - offset
    primal = x.shape[1] <= len(x)
    products = x.T @ x if primal else x @ x.T
    levels, axes = torch.linalg.eigh(products)
    along = axes.T @ (x.T @ y if primal else y)
    unit = max(levels.clamp(min=0).sum().item() / x.shape[1], 1e-12)

    def made(ridge: float) -> Probe:
        weight = axes @ (along / (levels.clamp(min=0) + ridge * unit)[:, None])
        return Probe(mean, weight if primal else x.T @ weight, offset, ridge)

    def error(probe: Probe) -> float:
        return (probe(own_x) - own_y).square().mean().item()

    return min((made(ridge) for ridge in RIDGES), key=error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """[B] structural similarity of pictures [B, 3, h, w] in 0..1 (Wang et al. 2004), the mean over colours and pixels
    whose window lies inside."""
    a, b = a.double(), b.double()  # variances are differences of nearly equal numbers
    along = torch.exp(-((torch.arange(WINDOW).double() - WINDOW // 2) ** 2) / (2 * DEVIATION**2))
    window = (along[:, None] * along / along.sum() ** 2).expand(3, 1, WINDOW, WINDOW)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    both = local(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.mean((1, 2, 3)).float()


def compared(predicted: Tensor, pictures: Tensor, colour: Tensor) -> dict[str, Tensor]:
    """Values per picture [B] of predicted pictures [B, 3, SIDE, SIDE]: squared error, and that of one mean `colour`
    [3] everywhere; PSNR in dB; SSIM."""
    true = F.interpolate(pictures, (SIDE, SIDE), mode="area")
    predicted = predicted.clamp(0, 1)
    error = (predicted - true).square().mean((1, 2, 3))
    return {
        "error": error,
        "spread": (true - colour[:, None, None]).square().mean((1, 2, 3)),
        "psnr": -10 * error.clamp(min=1e-10).log10(),
        "ssim": ssim(predicted, true),
    }
