"""Changes of an image whose effect on feature vectors a linear map learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.images import read_image

FORMS = "hue:DEGREES, grayscale, channels:ORDER (such as bgr), blur:SIGMA in pixels"
Change = Callable[[Tensor], Tensor]


def change_of(text: str) -> Change:
    """A function of pictures [B, 3, h, w] in 0..1 from its name on the command line. Raises FeatInvError, listing the
    FORMS."""
    from torchvision.transforms import functional as T

    name, _, value = text.partition(":")
    if name == "grayscale" and not value:
        return lambda pictures: T.rgb_to_grayscale(pictures, 3)
    if name == "channels" and sorted(value) == sorted("rgb"):
        order = ["rgb".index(letter) for letter in value]
        return lambda pictures: pictures[:, order]
    try:
        amount = float(value)
    except ValueError:
        amount = float("nan")
    if name == "hue" and amount == amount and abs(amount) <= 360:
        factor = (amount + 180) % 360 / 360 - 0.5
        return lambda pictures: T.adjust_hue(pictures, factor)
    if name == "blur" and 0 < amount <= 50:
        return lambda pictures: T.gaussian_blur(pictures, [2 * _reach(pictures, amount) + 1] * 2, [amount] * 2)
    raise FeatInvError(f"--change {text}: expected {FORMS}")


def _reach(pictures: Tensor, sigma: float) -> int:
    """Pixels on either side that the blur takes in: three sigma, as far as the picture can be mirrored."""
    return max(1, min(round(3 * sigma), min(pictures.shape[2:]) - 1))


def changed_pictures(folder: Path, names: list[str]) -> list[Tensor]:
    """The pictures [3, h, w] of the same names in another folder. Raises FeatInvError for a name that it lacks."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FeatInvError(
            f"--changed {folder} has no {missing[0]}; expected a changed image of the same name for each image"
        )
    return [read_image(folder / name)[0] for name in names]


def paired(
    names: list[str], pictures: list[Tensor], cut: Callable[[Tensor], Tensor], how: Change | Path
) -> list[Tensor]:
    """[pictures, changed pictures], each [B, 3, h, w] as the backbone reads them. cut: a picture [1, 3, h, w] to what
    the backbone reads; how: a function, or a folder of changed pictures."""
    pixel_values = torch.cat([cut(picture[None]) for picture in pictures])
    if isinstance(how, Path):
        return [pixel_values, torch.cat([cut(picture[None]) for picture in changed_pictures(how, names)])]
    return [pixel_values, how(pixel_values).clamp(0, 1)]
