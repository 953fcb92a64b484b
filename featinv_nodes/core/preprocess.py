"""Preprocessing as in a backbone's own evaluation: timm's create_transform on tensors, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .errors import FeatInvError

INTERPOLATIONS = ("bilinear", "bicubic")
#: How timm evaluates: "center" scales the short side, "squash" both sides, "border" the long side, with borders of the
#: mean colour; of the result the middle is cut out, a share crop_pct of what was scaled. "crop_first" is ours: "center"
#: with the cut before the scaling, as which the world of photographs was measured.
CROP_MODES = ("center", "squash", "border", "crop_first")


def require_known(name: str, interpolation: str, crop_mode: str) -> None:
    """Raises FeatInvError for a preprocessing that is not reproduced here. name: the backbone's."""
    for what, value, known in (("interpolation", interpolation, INTERPOLATIONS), ("crop_mode", crop_mode, CROP_MODES)):
        if value not in known:
            raise FeatInvError(f"{name} is evaluated with {what} {value!r}; expected one of {', '.join(known)}")


def evaluation_view(
    images: Tensor, size: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str, mean: Sequence[float]
) -> Tensor:
    """Pictures [B, C, h, w] in 0..1 as timm's evaluation transform cuts and scales them: [B, C, *size] in 0..1.

    crop_pct, crop_mode, interpolation, mean: timm's, of the model. Geometry and arithmetic are timm's, but for the
    8 bits to which Pillow rounds after each of the two passes: at most 1.5 levels of 255 apart, 0.0015 of the range on
    the average. Newer Pillow squashes the height before the width where that is cheaper; with bicubic overshoot single
    pixels are a few levels apart then. The border of a picture of one channel, a mask, is 0.
    """
    if crop_mode == "crop_first":
        return stretched(_region(images, size, crop_pct), size, interpolation)
    height, width = _scaled_size(images.shape[2:], size, crop_pct, crop_mode)
    x = _middle(_resized(images.float(), 3, width, interpolation), 3, size[1])
    x = _middle(_resized(x, 2, height, interpolation), 2, size[0])
    missing = size[0] - x.shape[2], size[1] - x.shape[3]
    if not any(missing):
        return x
    colour = x.new_tensor([round(255 * value) / 255 for value in mean] if x.shape[1] == len(mean) else [0.0])
    bordered = colour.view(1, -1, 1, 1).expand(len(x), x.shape[1], *size).clone()
    top, left = (side // 2 for side in missing)
    bordered[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    return bordered


def stretched(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """The whole pictures [B, C, h, w] in 0..1, whatever their aspect, at another size: [B, C, *size] in 0..1."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), size, mode=interpolation, antialias=True).clamp(0, 1)


def _region(images: Tensor, size: tuple[int, int], crop_pct: float) -> Tensor:
    """The largest centred region of the aspect of `size`, times crop_pct."""
    height, width = images.shape[2:]
    scale = min(height / size[0], width / size[1]) * crop_pct
    h, w = (max(1, round(side * scale)) for side in size)
    top, left = (height - h) // 2, (width - w) // 2
    return images[:, :, top : top + h, left : left + w]


def _scaled_size(sides: Sequence[int], size: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """(height, width) to which timm scales a picture of these sides before it cuts `size` out."""
    target = math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
    if crop_mode == "squash":
        return target
    if crop_mode == "center" and target[0] == target[1]:  # torchvision's Resize, which rounds down
        height, width = (int(target[0] * side / min(sides)) for side in sides)
        return height, width
    choose = max if crop_mode == "border" else min
    ratio = choose(side / wanted for side, wanted in zip(sides, target))
    height, width = (max(1, round(side / ratio)) for side in sides)
    return height, width


def _resized(x: Tensor, axis: int, length: int, interpolation: str) -> Tensor:
    """One pass of a resize, which Pillow clips to 0..1 like the result."""
    if x.shape[axis] == length:
        return x
    size = [length if a == axis else x.shape[a] for a in (2, 3)]
    return F.interpolate(x, size, mode=interpolation, antialias=True).clamp(0, 1)


def _middle(x: Tensor, axis: int, length: int) -> Tensor:
    """The middle of an axis, from where torchvision's CenterCrop begins; all of a shorter one."""
    spare = x.shape[axis] - length
    return x.narrow(axis, round(spare / 2), length) if spare > 0 else x
