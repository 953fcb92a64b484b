"""Pictures that people look at: panels with the cosine similarity under each reconstruction, as in the paper."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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
    """A grid of pictures with captions: rows of (picture, caption), a title to the left of each row; note: lines below."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    notes = note.splitlines()
    left = 12 + max((round(font.getlength(line)) for title in titles for line in title.split("\n")), default=0)
    width = left + GAP + max(len(row) for row in rows) * (TILE + GAP)
    top = 36 if heading else GAP
    height = top + len(rows) * (TILE + CAPTION + GAP) + (8 + 18 * len(notes) if notes else 0)
    sheet = Image.new("RGB", (max([width, *(round(small.getlength(line)) + 20 for line in notes)]), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 9), heading, INK, ImageFont.load_default(18))
    for r, (row, title) in enumerate(zip(rows, titles)):
        y = top + r * (TILE + CAPTION + GAP)
        pen.multiline_text((8, y + TILE / 2), title, INK, font, anchor="lm")
        for c, (picture, caption) in enumerate(row):
            x = left + GAP + c * (TILE + GAP)
            sheet.paste(to_image(picture, TILE), (x, y))
            pen.text((x + TILE / 2, y + TILE + 2), caption, INK, small, anchor="ma")
    for n, line in enumerate(reversed(notes)):
        pen.text((10, height - 22 - 18 * n), line, INK, small)
    return sheet


def page(title: str, image: Image.Image, paragraphs: Sequence[str], body: str = "") -> str:
    """One HTML file with the picture inside it, which opens without a server. body: HTML between paragraphs and picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = "".join(f"<p>{html.escape(p)}</p>" for p in paragraphs)
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:1700px;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
        "table{border-collapse:collapse;font-size:14px;margin:1rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
    )
    picture = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f'<!doctype html><html lang="en">{head}<title>{html.escape(title)}</title><style>{style}</style><h1>{html.escape(title)}</h1>{text}{body}{picture}</html>\n'


def save_image(image: Image.Image, file: Path) -> None:
    """Writes an image whole or not at all, in the format of the file's suffix."""
    part = file.with_name(f"{file.stem}.part{file.suffix}")
    image.save(part)
    part.replace(file)
