"""A page that shows concepts: where each is strongest, where it is on example images, and what it is worth."""

from __future__ import annotations

import html

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.concepts import REST, Concepts
from featinv_nodes.core.concepts.collect import Collected
from featinv_nodes.core.concepts.statistics import Statistics, dimensions, remarks
from featinv_nodes.core.pictures import heat_map

from ..report import digests_text, document, picture_tag

CROPS, EXAMPLES, MOST = 5, 4, 40  # of a concept; pictures with heat maps; concepts shown in pictures
CONTEXT, SIDE = 4, 160  # a crop's side in grid cells; a picture's side on the page in pixels


def page(concepts: Concepts, collected: Collected, stats: Statistics) -> str:
    """One HTML file, pictures inside, that opens without a server. Concepts by relevance, or by share of the norm where
    that is not known, 40 of them in pictures at most. Memory: a picture per crop, of the pictures judged."""
    lengths = concepts.lengths(collected.maps)  # [n + 1, B, H, W]
    worth = stats.relevance or stats.share
    order = sorted(range(len(concepts)), key=lambda i: -worth[i])
    examples = covering(lengths[order[:MOST]])
    listed = [*order[:MOST], len(concepts)]
    others = (
        f"<section><h2>{len(order) - MOST} more, without"
        f" images</h2>{summary(concepts, stats, order[MOST:], False)}</section>"
        if order[MOST:]
        else ""
    )
    cards = "".join(card(i, concepts, collected, stats, lengths[i], examples) for i in listed)
    title = f"Concepts of {collected.maps.source.describe()}"
    lines = [
        f"{len(concepts)} concepts by {concepts.method}, from {collected.describe()}.",
        (
            f"The images below are among {len(collected.names)} of these. A feature map is the sum of its concepts"
            " and a rest: relevance is a concept's share of what the map adds to the logits of the image's own"
            " classes, norm its length against that of the map (concepts overlap, so these sum to more than one)."
            " Crops are centred on the place where it is longest."
        ),
        digests_text({"backbone": concepts.source.weights}),
    ]
    originals = "".join(_picture(collected.pictures[b], collected.names[b]) for b in examples)
    rejected = "".join(f"<li>{html.escape(line)}</li>" for line in remarks(concepts, stats))
    body = [f"<p>{html.escape(line)}</p>" for line in lines if line]
    body += [f"<ul>{rejected}</ul>", summary(concepts, stats, listed)]
    body += [f'<section><div class="strip"><span>the examples</span><div>{originals}</div></div></section>']
    return document(title, "\n".join([*body, cards, others]))


def summary(concepts: Concepts, stats: Statistics, numbers: list[int], linked: bool = True) -> str:
    """What is known of some concepts as a table. linked: to their pictures."""
    sizes, widest = dimensions(concepts), max(abs(v) for v in [*stats.relevance, *stats.share])
    rows = []
    for i in numbers:
        name = f'<a href="#c{i}">{html.escape(concepts.names[i])}</a>' if linked else html.escape(concepts.names[i])
        bars = [_bar(values[i], widest) if values else "-" for values in (stats.relevance, stats.share)]
        classes = html.escape(stats.classes_of(i))
        rows.append(
            f'<tr><td class="n">{i}<td>{name}<td class="n">{sizes[i]}<td>{bars[0]}<td>{bars[1]}<td'
            f' class="dim">{classes}'
        )
    head = '<tr><th class="n">no.<th>concept<th class="n">dim.<th>relevance<th>norm<th>adds most to the logits of'
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def card(
    number: int, concepts: Concepts, collected: Collected, stats: Statistics, lengths: Tensor, examples: list[int]
) -> str:
    """A concept in pictures. lengths: [B, H, W] its |phi_i|."""
    facts = [f"dimension {dimensions(concepts)[number]}", f"{stats.share[number]:.1%} of the norm"]
    if stats.relevance:
        facts.insert(0, f"relevance {stats.relevance[number]:.1%}")
    classes = stats.classes_of(number)
    facts += [f"adds most to {classes}"] if classes else []
    crops = "".join(_picture(crop(collected, lengths, b), collected.names[b]) for b in strongest(lengths))
    brightest = lengths.amax()
    maps = "".join(
        _picture(overlay(collected.pictures[b], lengths[b] / brightest.clamp(min=1e-8)), collected.names[b])
        for b in examples
    )
    name = (
        "the rest, which no concept explains"
        if concepts.names[number] == REST
        else f"{number} &nbsp; {html.escape(concepts.names[number])}"
    )
    return (
        f'<section id="c{number}"><h2>{name}</h2><p class="dim">{html.escape(" · ".join(facts))}</p><div'
        f' class="row"><div class="strip"><span>strongest in</span><div>{crops}</div></div><div'
        ' class="strip"><span>where, in the examples (yellow: its largest length, grey:'
        f" none)</span><div>{maps}</div></div></div></section>"
    )


def strongest(lengths: Tensor) -> list[int]:
    """The five pictures with the largest |phi_i| [B, H, W] anywhere."""
    return lengths.amax((1, 2)).topk(min(CROPS, len(lengths))).indices.tolist()


def covering(lengths: Tensor) -> list[int]:
    """Four pictures in which, together, as many as possible of the concepts [n, B, H, W] are strong: one after the
    other, what adds most to the sum over concepts of the largest share."""
    peaks = lengths.amax((2, 3))
    peaks = peaks / peaks.amax(1, keepdim=True).clamp(min=1e-8)  # [n, B]
    chosen, reached = [], torch.zeros(len(peaks))
    for _ in range(min(EXAMPLES, peaks.shape[1])):
        gains = torch.maximum(peaks, reached[:, None]).sum(0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        reached = torch.maximum(reached, peaks[:, chosen[-1]])
    return chosen


def crop(collected: Collected, lengths: Tensor, number: int) -> Tensor:
    """[3, h, w] 0..255 around the cell of picture `number` where |phi_i| [B, H, W] is largest, four cells a side."""
    picture, (rows, columns) = collected.pictures[number], lengths.shape[1:]
    row, column = divmod(int(lengths[number].argmax()), columns)
    (height, top), (width, left) = (
        _window(picture.shape[axis], cells, cell) for axis, cells, cell in ((1, rows, row), (2, columns, column))
    )
    return picture[:, top : top + height, left : left + width]


def _window(side: int, cells: int, cell: int) -> tuple[int, int]:
    """(length, start) of four cells about the middle of one, inside the picture; pixels."""
    length = round(side * min(1, CONTEXT / cells))
    return length, min(max(round((cell + 0.5) * side / cells - length / 2), 0), side - length)


def overlay(picture: Tensor, values: Tensor) -> Tensor:
    """[3, h, w] 0..255: a grey picture under the colours of values [H, W] in 0..1, cell by cell, thinner where they are
    small."""
    size = picture.shape[1:]
    grey = 64 + 0.6 * picture.float().mean(0, keepdim=True)
    heat = F.interpolate(heat_map(values[None]), size, mode="nearest")[0] * 255
    cover = 0.9 * F.interpolate(values[None, None], size, mode="nearest")[0].clamp(0, 1)
    return ((1 - cover) * grey + cover * heat).byte()


def _picture(picture: Tensor, name: str) -> str:
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    resample = Image.Resampling.LANCZOS if max(image.size) > SIDE else Image.Resampling.NEAREST
    scale = SIDE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
    return picture_tag(image, name, "JPEG")


def _bar(value: float, widest: float) -> str:
    return f'<i class="bar" style="width:{max(0.0, value) / widest * 5:.2f}rem"></i>{value:.1%}'
