"""Panels and pages of images, with the cosine similarity under each reconstruction, as in the paper."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from featinv_nodes.core.files import written_whole

TEMPLATE = Path(__file__).with_name("page.html")
TILE, GAP = 144, 8  # pixels: a picture's side, between pictures
CAPTION, LINE = 20, 16  # a caption's first line, each further one
SMALL = 96  # pixels: smaller pictures are enlarged pixel by pixel
INK, GREY, PALE, PAPER = (30, 30, 34), (105, 105, 112), (222, 222, 226), (255, 255, 255)
Cell = tuple[Tensor, str]


#: what the marks of figure_text mean, for below a table
FEW_NOTE = "few: an interval of fewer than 10 images says little; (-): one image has no interval."


def figure_text(entry: dict, digits: int = 3, scale: float = 1.0, sign: str = "") -> str:
    """A figure {"value", "low", "high", ...} with its interval: "0.414 (0.403 to 0.424)"; "(-)" for one picture's, and
    "few" after that of fewer than ten. sign: "+" to show one."""
    form = f"{sign}.{digits}f"
    value, low, high = (None if entry.get(k) is None else entry[k] * scale for k in ("value", "low", "high"))
    if low is None:
        return f"{value:{form}} (-)"
    return f"{value:{form}} ({low:{form}} to {high:{form}}{', few' if entry.get('few') else ''})"


def digests_text(digests: Mapping[str, str]) -> str:
    """Part -> digest of its weights, as a sentence for a page; "" where none is known."""
    known = ", ".join(f"{part} {digest}" for part, digest in digests.items() if digest)
    return f"Digests of the weights: {known}." if known else ""


def to_image(picture: Tensor, side: int | None = None) -> Image.Image:
    """[3, H, W] in 0..1 to a Pillow image; small ones are enlarged pixel by pixel, all others scaled smoothly."""
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array)
    if side and image.size != (side, side):
        smooth = max(image.size) > side or max(image.size) >= SMALL
        image = image.resize((side, side), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    return image


def panel(rows: Sequence[Sequence[Cell]], titles: Sequence[str], heading: str = "", note: str = "") -> Image.Image:
    """A grid of pictures with captions: rows of (picture, caption), a title to the left of each row; note: lines below.
    Captions and titles may have several lines; a caption's first is dark, and what is too long for the picture is cut.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    notes = note.splitlines()
    left = 12 + max((round(font.getlength(line)) for title in titles for line in title.split("\n")), default=0)
    width = left + GAP + max(len(row) for row in rows) * (TILE + GAP)
    top = 36 if heading else GAP
    heights = [
        TILE + CAPTION + LINE * max((caption.count("\n") for _, caption in row), default=0) + GAP for row in rows
    ]
    height = top + sum(heights) + (8 + 18 * len(notes) if notes else 0)
    large = ImageFont.load_default(18)
    lengths = [large.getlength(heading), *(small.getlength(line) for line in notes)]
    sheet = Image.new("RGB", (max(width, round(max(lengths)) + 20), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 9), heading, INK, large)
    y = top
    for row, title, row_height in zip(rows, titles, heights):
        pen.multiline_text((8, y + TILE / 2), title, INK, font, anchor="lm")
        for c, (picture, caption) in enumerate(row):
            x = left + GAP + c * (TILE + GAP)
            pen.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=PALE)  # where a picture is white, too
            sheet.paste(to_image(picture, TILE), (x, y))
            for number, line in enumerate(caption.split("\n")):
                pen.text(
                    (x + TILE / 2, y + TILE + 2 + LINE * number),
                    shortened(line, small),
                    GREY if number else INK,
                    small,
                    anchor="ma",
                )
        y += row_height
    for n, line in enumerate(reversed(notes)):
        pen.text((10, height - 22 - 18 * n), line, INK, small)
    return sheet


def shortened(line: str, font: ImageFont.FreeTypeFont) -> str:
    """The line, or as much of it as fits below a picture with an ellipsis."""
    width = TILE + GAP
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1].rstrip()
    return f"{line}…"


def document(title: str, body: str) -> str:
    """An HTML file of this project's one template. body: HTML."""
    return Template(TEMPLATE.read_text("utf-8")).substitute(title=html.escape(title), body=body)


def picture_tag(image: Image.Image, name: str, form: str = "PNG") -> str:
    """An image as an HTML element with the picture inside it. form: Pillow's name of a format."""
    buffer = io.BytesIO()
    image.save(buffer, form, quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" title="{html.escape(name)}" src="data:image/{form.lower()};base64,{data}">'


def page(title: str, image: Image.Image, paragraphs: Sequence[str], body: str = "") -> str:
    """One HTML file with the picture inside it, which opens without a server. body: HTML between paragraphs and
    picture."""
    text = "\n".join(f"<p>{html.escape(p)}</p>" for p in paragraphs)
    return document(title, f"{text}\n{body}\n{picture_tag(image, title)}")


def save_image(image: Image.Image, file: Path) -> None:
    """Writes an RGB image whole or not at all, in the format of the file's suffix; for .webp, which the pages of docs/
    show, in the smaller of two forms."""
    with written_whole(file) as part:
        if file.suffix == ".webp":
            part.write_bytes(small_webp(image))
        else:
            image.save(part, Image.registered_extensions()[file.suffix])


def small_webp(image: Image.Image) -> bytes:
    """An RGB image as the shorter of two WebP files: without loss in 128 colours, best for plots and drawn scenes, or
    with loss, best for photographs."""
    few = image.quantize(128, dither=Image.Dither.NONE).convert("RGB")
    files = []
    # without loss, method 6 takes twenty times as long as 4 and saves at most one percent
    for picture, settings in ((few, {"lossless": True, "quality": 100, "method": 4}), (image, {"method": 6})):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", **{"quality": 75} | settings)
        files.append(buffer.getvalue())
    return min(files, key=len)
