"""Feature maps and their agreement as images: principal components as colours, heat maps, captions."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .errors import FeatInvError
from .feature_map import FeatureMap

SIDE = 256  # pixels that a small map is enlarged to at least, so that it can be looked at
#: dark to bright, equal steps in lightness (colours of matplotlib's viridis)
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
#: blue by way of near white to red, both ends equally dark
DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))


def principal_components(features: FeatureMap) -> Tensor:
    """[B, 3, H, W] in 0..1: the three directions of largest variance over all locations of the batch as red, green
    and blue, each from its 1st to its 99th percentile. Raises FeatInvError for a single vector."""
    x = rearrange(features.values.float(), "b c h w -> (b h w) c")
    if len(x) < 2:
        raise FeatInvError("one pooled vector has no principal components; give a spatial feature map or a batch")
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    colours = x @ directions[:3].T
    sign = torch.where(colours.pow(3).sum(0) < 0, -1.0, 1.0)  # that does not depend on the solver; never 0
    colours = F.pad(colours * sign, (0, 3 - colours.shape[1]))
    low, high = colours.quantile(0.01, 0), colours.quantile(0.99, 0)
    colours = ((colours - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    batch, _, height, _ = features.values.shape
    return rearrange(colours, "(b h w) c -> b c h w", b=batch, h=height)


def bars(features: FeatureMap, side: int = SIDE) -> Tensor:
    """[B, 3, side, side] in 0..1: feature vectors without a place, their channels from left to right as bars from the
    middle line, red up for positive values and blue down for negative ones; the longest of the batch reaches the edge.

    features: pooled, or of a 1 x 1 grid. Channels that share a column of pixels show their most extreme values.
    """
    values = features.values.float().flatten(1)[:, None]  # [B, 1, C]
    columns, half = min(values.shape[2], side), side // 2
    ends = [F.adaptive_max_pool1d((sign * values).clamp(min=0), columns) for sign in (1, -1)]
    ends = [F.interpolate(end, side)[:, 0] for end in ends]  # [B, side] each
    longest = torch.stack(ends).amax().clamp(min=1e-8)
    up, down = ((end / longest * half).round()[:, None] for end in ends)
    place = torch.arange(half, device=values.device)[:, None]
    bar = torch.cat([(half - 1 - place < up).float(), -(place < down).float()], 1)  # [B, side, side], 1, 0 or -1
    return diverging(F.pad(bar, (0, 0, 0, side - 2 * half)))


def preview(features: FeatureMap, side: int = SIDE) -> Tensor:
    """[B, 3, h, w] in 0..1: principal components as colours where there are locations, bars where there are none."""
    if features.values.shape[2:].numel() == 1:
        return bars(features, side)
    return enlarge(principal_components(features), side)


def heat_map(values: Tensor) -> Tensor:
    """[B, H, W] -> [B, 3, H, W] colours in 0..1, from 0 and below (dark) to 1 and above (bright)."""
    return _coloured(values.float(), HEAT)


def diverging(values: Tensor, limit: float = 1.0) -> Tensor:
    """[B, H, W] -> [B, 3, H, W] colours in 0..1: blue at -limit and below, near white at 0, red at limit and above."""
    return _coloured((values.float() / limit + 1) / 2, DIVERGING)


def _coloured(values: Tensor, scale: tuple[tuple[int, int, int], ...]) -> Tensor:
    """[B, H, W] in 0..1 -> [B, 3, H, W] on a scale of colours at equal steps, mixed linearly between them."""
    colours = torch.tensor(scale, device=values.device) / 255
    place = values.clamp(0, 1) * (len(scale) - 1)
    below = place.floor().long().clamp(max=len(scale) - 2)
    share = (place - below)[..., None]
    return (colours[below] * (1 - share) + colours[below + 1] * share).permute(0, 3, 1, 2)


def spotlight(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures [..., 3, h, w] with a fifth of their brightness left where the mask [..., h, w] in 0..1 is 0."""
    return pictures * (0.2 + 0.8 * mask.unsqueeze(-3))


def enlarge(pictures: Tensor, side: int = SIDE) -> Tensor:
    """Pictures [B, C, h, w] repeated cell by cell until the longer side reaches `side` pixels or little more."""
    factor = max(1, -(-side // max(pictures.shape[2:])))
    return pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def captioned(pictures: Tensor, captions: list[str]) -> Tensor:
    """Pictures [B, 3, h, w] in 0..1, enlarged to at least SIDE, each with its caption on white below it.

    Captions may have several lines; all are set in the largest size in which the longest line fits.
    """
    pictures = enlarge(pictures)
    width = pictures.shape[3]
    lines = [line for text in captions for line in text.splitlines()]
    font = _font(lines, width)
    bar = round(font.size * (0.3 + 1.2 * max(len(text.splitlines()) or 1 for text in captions)))
    strips = []
    for text in captions:
        strip = Image.new("RGB", (width, bar), "white")
        ImageDraw.Draw(strip).text((width / 2, bar / 2), text, (30, 30, 34), font, anchor="mm", align="center")
        strips.append(torch.from_numpy(np.asarray(strip, np.float32) / 255).permute(2, 0, 1))
    return torch.cat([pictures.cpu(), torch.stack(strips)], 2)


def _font(lines: list[str], width: int) -> ImageFont.FreeTypeFont:
    """The largest size, a sixteenth of the width at most, in which every line fits; 8 at least."""
    for size in range(max(12, width // 16), 7, -1):
        font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # at a given size always this kind
        if all(font.getlength(line) <= 0.98 * width for line in lines):
            break
    return font
