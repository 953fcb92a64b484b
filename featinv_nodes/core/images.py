"""Finding and reading the user's images, with errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import FeatInvError
from .picture_files import SUFFIXES, look_below

SMALLEST, LARGEST = 8, 16_384  # pixels per side


def find_images(folder: str | Path) -> list[Path]:
    """All pictures below a folder, sorted, through links too. Raises FeatInvError for no folder, and for one without
    pictures."""
    if not Path(folder).is_dir():
        raise FeatInvError(f"{folder} is not a folder")
    found = look_below(folder)
    if not found.pictures:
        tars = f"; unpack its tar files, such as {found.tars[0]}" if found.tars else ""
        raise FeatInvError(no_images(folder) + found.left_out.told() + tars)
    return sorted(Path(folder, name) for name in found.pictures)


def no_images(where: str | Path) -> str:
    """What to say of a place without pictures."""
    return f"no images ({', '.join(sorted(SUFFIXES))}) below {where}"


def as_seen(opened: Image.Image) -> Image.Image:
    """An opened picture as RGB, as a viewer shows it: turned upright, transparency on white, 16 bits scaled to 8.
    Raises whatever the decoder raises, and ValueError for pixels of no known range."""
    if opened.mode == "F" or opened.mode == "I" and opened.format != "PNG":
        raise ValueError(
            f"its pixels are of mode {opened.mode}, whose black and white are unknown; save it with 8 or 16 bits"
        )
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # grey with 16 bits, which convert would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def as_rgb(pictures: Tensor) -> Tensor:
    """[B, 3, h, w] from pictures [B, C, h, w] in 0..1, with transparency on white as in as_seen. C: 1 is grey, 2 grey
    and alpha, 3 RGB, 4 RGB and alpha. Raises FeatInvError for another shape."""
    if pictures.ndim != 4 or not 1 <= pictures.shape[1] <= 4:
        raise FeatInvError(
            f"images of the shape {tuple(pictures.shape)} (batch, channels, height, width); expected 1 to 4 channels:"
            " grey or RGB, with or without alpha"
        )
    pictures, channels = pictures.float(), pictures.shape[1]
    colours = pictures[:, : 1 if channels < 3 else 3]
    if channels in (2, 4):
        alpha = pictures[:, -1:]
        colours = colours * alpha + (1 - alpha)
    return colours.expand(-1, 3, -1, -1)


def as_tensor(image: Image.Image) -> Tensor:
    """[1, 3, h, w] in 0..1 from an RGB picture."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None].contiguous()


def read_image(file: str | Path) -> Tensor:
    """[1, 3, h, w] in 0..1 from any format Pillow reads; turned upright, transparency on white.

    Raises FeatInvError for a missing, unreadable or foreign file and for sides outside 8..16,384 pixels.
    """
    try:
        with Image.open(file) as opened:
            width, height = opened.size
            if not (SMALLEST <= min(width, height) and max(width, height) <= LARGEST):
                raise FeatInvError(
                    f"{file} has {width} x {height} pixels; expected sides between {SMALLEST} and {LARGEST}"
                )
            image = as_seen(opened)
    except FileNotFoundError as error:
        raise FeatInvError(f"{file} does not exist") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        if isinstance(error, FeatInvError):
            raise
        raise FeatInvError(f"{file} is not an image that Pillow can read: {error}") from error
    return as_tensor(image)
