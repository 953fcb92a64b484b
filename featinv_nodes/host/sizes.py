"""The size of latents and images that an inversion model was trained at."""

from __future__ import annotations

from typing import NamedTuple

from ..core.weights import InversionInfo
from ..worlds import find_world

MINI, FULL = 32, 64  # sides of the latents of miniSD and of Stable Diffusion 1.x
PIXELS = 8  # a cell of theirs


class Size(NamedTuple):
    """Sides of a square: latent cells, pixels of the picture."""

    cells: int
    pixels: int

    def describe(self) -> str:
        return f"{self.cells} x {self.cells} latent cells, {self.pixels} x {self.pixels} pixels"


def trained_size(info: InversionInfo) -> Size | None:
    """From the weights file, or where an older one does not say, from its base model's name; None for a base model that
    is neither an embedded world's nor of Stable Diffusion's kind."""
    base = info.base
    if base.get("latent_size") and base.get("resolution"):
        return Size(base["latent_size"], base["resolution"])
    if world := find_world(base["name"]):
        return Size(world.latent_size, world.side)
    if base["latent_channels"] != 4:
        return None
    if queries := info.encoder.get("queries"):  # the Perceiver's, one per cell
        return Size(queries[0], queries[0] * PIXELS)
    cells = MINI if "minisd" in base["name"].lower().replace("-", "").replace("_", "") else FULL
    return Size(cells, cells * PIXELS)
