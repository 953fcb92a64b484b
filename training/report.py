"""Pictures that people look at: panels with the cosine similarity under each reconstruction, as in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.metrics import cosine
from featinv_nodes.tiny_world.scenes import draw

from .config import TrainConfig
from .pipeline import BaseModel, Inversion, Sampling, noise, sample

TILE, GAP, CAPTION = 144, 8, 20
INK, PAPER = (30, 30, 34), (255, 255, 255)
Cell = tuple[Tensor, str]


def to_image(picture: Tensor, side: int | None = None) -> Image.Image:
    """[3, H, W] in 0..1 to a Pillow image; enlarged pixel by pixel, reduced smoothly."""
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array)
    if side and image.size != (side, side):
        smooth = Image.Resampling.LANCZOS if max(image.size) > side else Image.Resampling.NEAREST
        image = image.resize((side, side), smooth)
    return image


def panel(rows: Sequence[Sequence[Cell]], titles: Sequence[str], heading: str = "", note: str = "") -> Image.Image:
    """A grid of pictures with captions: rows of (picture, caption), a title to the left of each row."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    left = 12 + max((round(font.getlength(line)) for title in titles for line in title.split("\n")), default=0)
    width = left + GAP + max(len(row) for row in rows) * (TILE + GAP)
    top = 36 if heading else GAP
    height = top + len(rows) * (TILE + CAPTION + GAP) + (26 if note else 0)
    sheet = Image.new("RGB", (max(width, round(small.getlength(note)) + 20), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 9), heading, INK, ImageFont.load_default(18))
    for r, (row, title) in enumerate(zip(rows, titles)):
        y = top + r * (TILE + CAPTION + GAP)
        pen.multiline_text((8, y + TILE / 2), title, INK, font, anchor="lm")
        for c, (picture, caption) in enumerate(row):
            x = left + GAP + c * (TILE + GAP)
            sheet.paste(to_image(picture, TILE), (x, y))
            pen.text((x + TILE / 2, y + TILE + 2), caption, INK, small, anchor="ma")
    pen.text((10, height - 22), note, INK, small)
    return sheet


def save_image(image: Image.Image, file: Path) -> None:
    """Writes an image whole or not at all, in the format of the file's suffix."""
    part = file.with_name(f"{file.stem}.part{file.suffix}")
    image.save(part)
    part.replace(file)


def held_out(config: TrainConfig, count: int) -> Tensor:
    """[count, 3, h, w] pictures that training does not see: held-out scenes, or the first files of the folder,
    centre-cropped, whose augmented versions it does see."""
    if config.data == "tiny":
        return draw(config.seed, torch.arange(count), "held-out").image
    from .data import ImageFolder
    from .images import read_image

    files = ImageFolder(Path(config.data), 0, "none", 0).files[:count]
    return torch.cat([read_image(f, square=512) for f in files])


@torch.inference_mode()
def sample_panel(file: Path, base: BaseModel, backbone: Backbone, model: Inversion, config: TrainConfig) -> float:
    """Draws 8 held-out pictures from their features with fixed noise, writes the panel, returns the mean cosine."""
    device = base.unet.device
    framed = backbone.frame(held_out(config, 8).to(device))
    features = backbone(framed, config.layer, config.pooled)
    how = Sampling(**config.recommended)
    start = torch.cat([noise(base, seed) for seed in range(len(framed))])
    pictures = base.decode(sample(base, model, features, start, how, config.prompt))
    again = backbone(backbone.frame(pictures, "stretch"), config.layer, config.pooled)
    score = cosine(features, again)
    rows = [[(x, "") for x in framed], [(x, f"cos {c:.2f}") for x, c in zip(pictures, score.tolist())]]
    save_image(panel(rows, ["original", "reconstruction"], f"{config.name}, mean cosine {score.mean():.3f}"), file)
    return score.mean().item()
