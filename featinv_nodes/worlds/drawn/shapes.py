"""Signed distances of the ten shapes, in units of the shape's radius."""

from __future__ import annotations

from math import cos, pi, sin

import torch
from torch import Tensor


def _regular(corners: int, radius: float, start: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when an inner radius is given; y points down."""
    steps = corners if inner is None else 2 * corners
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(steps)]
    return [(r * cos(start + 2 * pi * i / steps), r * sin(start + 2 * pi * i / steps)) for i, r in enumerate(radii)]


def _cross(arm: float, length: float) -> list[tuple[float, float]]:
    quarter = [(arm, -length), (arm, -arm), (length, -arm)]
    turns = [quarter, [(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
    return [corner for turn in turns for corner in turn]


_ARROW = [(-0.95, -0.32), (0.05, -0.32), (0.05, -0.85), (0.98, 0.0), (0.05, 0.85), (0.05, 0.32), (-0.95, 0.32)]
_POLYGONS = {
    "square": _regular(4, 1.08, pi / 4),
    "triangle": [(x, y + 0.16) for x, y in _regular(3, 1.12, -pi / 2)],
    "diamond": [(0.72, 0.0), (0.0, 1.0), (-0.72, 0.0), (0.0, -1.0)],
    "cross": _cross(0.34, 0.95),
    "star": _regular(5, 1.05, -pi / 2, 0.46),
    "arrow": _ARROW,
}


def _disc(x: Tensor, y: Tensor, radius: float, cx: float = 0.0, cy: float = 0.0) -> Tensor:
    return torch.hypot(x - cx, y - cy) - radius


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, 0.70).abs() - 0.26


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disc(x, y, 0.98, 0.05), -_disc(x, y, 0.78, 0.50))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    tip = _polygon(x, y, [(-0.90, -0.06), (0.0, 0.98), (0.90, -0.06), (0.0, -0.45)])
    return torch.minimum(tip, torch.minimum(_disc(x, y, 0.50, -0.47, -0.32), _disc(x, y, 0.50, 0.47, -0.32)))


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Exact signed distance to a closed polygon: nearest edge, sign by the even-odd rule."""
    nearest, inside = torch.full_like(x, 1e9), torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (ex / ey))
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt())


_CURVES = {"circle": lambda x, y: _disc(x, y, 0.95), "ring": _ring, "crescent": _crescent, "heart": _heart}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent", "heart", "arrow")


def signed_distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[N, H, W] distance to shape number `shape` [N] at points (x, y) in units of its radius, negative inside."""
    distance = torch.empty_like(x)
    for number, name in enumerate(SHAPES):
        here = (shape == number).nonzero()[:, 0]
        if not len(here):
            continue
        px, py = x[here], y[here]
        distance[here] = _CURVES[name](px, py) if name in _CURVES else _polygon(px, py, _POLYGONS[name])
    return distance
