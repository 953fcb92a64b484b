"""Ranks feature maps by how much of the image they keep, beside what they cost and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import bootstrap, cosine
from featinv_nodes.worlds import open_backbone

from ..evaluation.evaluator import deepest, reads_last
from ..evaluation.report import Grid, Report
from ..models.flops import gmac_of
from ..models.pipeline import load_pipeline
from ..plots import bars
from ..report import figure_text
from .parts import EVERY, Part
from .probe import assembled, compared, fit_probe, inputs, targets

THUMBNAILS = (4, 8, 16, 32)  # cells a side of shrunk pictures, ranked as maps of three channels
SHRUNK = "image itself, shrunk"


@dataclass
class Ranked:
    """One map. name, layer: of its backbone; channels, grid: its size; share: its values for each of the picture's.
    gmac: 10^9 multiply-accumulates up to the layer; parameters: of the whole backbone; None where nothing is computed.
    figures: measure -> figure. ridge: that its probe chose."""

    name: str
    layer: str
    channels: int
    grid: tuple[int, int]
    share: float
    gmac: float | None = None
    parameters: int | None = None
    figures: dict[str, dict] = field(default_factory=dict)
    ridge: float = 0.0

    def label(self) -> str:
        return f"{self.name} {self.layer}".strip()

    def entry(self) -> dict:
        """For results.json."""
        size = {"channels": self.channels, "grid": list(self.grid), "values_per_pixel_value": self.share}
        return size | {"gmac": self.gmac, "parameters": self.parameters, "ridge": self.ridge} | self.figures


def named_layers(text: str) -> tuple[str, list[str]]:
    """(backbone, layers; none for all) from NAME or NAME@LAYER,LAYER."""
    name, _, layers = text.partition("@")
    return name, [layer for layer in layers.split(",") if layer]


def opened(text: str) -> tuple[Backbone, list[str]]:
    """A backbone and which of its layers are ranked. Raises FeatInvError for one that there is not."""
    name, layers = named_layers(text)
    backbone = open_backbone(name, run_code=True)
    if not layers:
        layers = [layer for layer in backbone.layers if layer != LAST or reads_last(backbone)]
    for layer in layers:
        backbone.source(layer)
    return backbone, layers


Maps = Callable[[Tensor], dict[str, Tensor]]  # preprocessed pictures [B, 3, h, w] to layer -> map [B, C, H, W]


def rank(
    texts: Sequence[str], parts: tuple[Part, Part], per_picture: int, around: int, device: str = "cpu"
) -> list[Ranked]:
    """All maps of the backbones that the texts name, and shrunk pictures, the best first."""
    if around not in (1, 3):
        raise FeatInvError(f"--around {around}: expected 1, the vector alone, or 3, with its neighbours")
    known = [opened(text) for text in texts]
    sizes = [backbone.source(layer).grid for backbone, layers in known for layer in layers]
    most = min(per_picture, *(height * width for height, width in sizes), THUMBNAILS[0] ** 2)
    if most < 1:
        raise FeatInvError(f"--per-picture {per_picture}: expected at least 1")
    ranked: list[Ranked] = []
    for backbone, layers in known:
        backbone.to(device)

        def maps(pixel_values: Tensor, backbone: Backbone = backbone, layers: list[str] = layers) -> dict[str, Tensor]:
            x = pixel_values.to(device)
            if reads_last(backbone):
                return {layer: m.values.cpu() for layer, m in backbone.extract_several(x, layers).items()}
            return {layer: backbone.extract(x, layer).values.cpu() for layer in layers}

        results = probed(maps, backbone.preprocess, parts, most, around, backbone.name)
        blank = torch.zeros(1, 3, *backbone.input_size, device=device)
        parameters = sum(p.numel() for p in backbone.model.parameters())
        pixels = blank.numel()
        for layer, (figures, ridge) in results.items():
            source = backbone.source(layer)
            with torch.inference_mode():
                gmac = gmac_of(lambda layer=layer, b=backbone, x=blank: b.values(x, layer))
            share = source.channels * source.grid[0] * source.grid[1] / pixels
            one = Ranked(backbone.name, layer, source.channels, source.grid, share, gmac, parameters, figures, ridge)
            ranked.append(one)
        backbone.cpu()
    first = known[0][0]
    shrunk = probed(thumbnails, first.preprocess, parts, most, around, SHRUNK)
    pixels = 3 * first.input_size[0] * first.input_size[1]
    for name, (figures, ridge) in shrunk.items():
        side = int(name.split()[0])
        ranked.append(Ranked(SHRUNK, name, 3, (side, side), 3 * side**2 / pixels, figures=figures, ridge=ridge))
    return sorted(ranked, key=lambda one: -one.figures["r2"]["value"])


def thumbnails(pixel_values: Tensor) -> dict[str, Tensor]:
    """The pictures averaged over few cells."""
    return {f"{side} x {side}": F.adaptive_avg_pool2d(pixel_values, side) for side in THUMBNAILS}


def probed(
    maps: Maps, cut: Callable[[Tensor], Tensor], parts: tuple[Part, Part], per_picture: int, around: int, what: str
) -> dict[str, tuple[dict[str, dict], float]]:
    """Layer -> (figures on the second part, ridge) of probes fitted to the first, of which every fourth picture chooses
    the ridge. cut: a picture [1, 3, h, w] to what the backbone reads."""
    vectors: dict[tuple[str, bool], list[tuple[Tensor, Tensor]]] = {}
    colours, number = [], 0
    for _, pictures in parts[0].batches(f"fitting {what}"):
        pixel_values = torch.cat([cut(picture[None]) for picture in pictures])
        colours.append(pixel_values.mean((2, 3)))
        for layer, values in maps(pixel_values).items():
            grid = tuple(values.shape[2:])
            x, y = inputs(values, around), targets(pixel_values, grid)
            for n in range(len(x)):
                picks = torch.Generator().manual_seed(number + n)  # the same cells of every map of a grid
                cells = torch.randperm(x.shape[1], generator=picks)[:per_picture]
                key = layer, (number + n + 1) % EVERY == 0
                vectors.setdefault(key, []).append((x[n, cells], y[n, cells]))
        number += len(pictures)
    probes = {}
    for layer in {layer: None for layer, _ in vectors}:
        own = [[torch.cat(side) for side in zip(*vectors[layer, chooses])] for chooses in (False, True)]
        probes[layer] = fit_probe(*own[0], *own[1])
    colour = torch.cat(colours).mean(0)
    columns: dict[str, dict[str, list[Tensor]]] = {layer: {} for layer in probes}
    for _, pictures in parts[1].batches(f"measuring {what}"):
        pixel_values = torch.cat([cut(picture[None]) for picture in pictures])
        for layer, values in maps(pixel_values).items():
            grid = tuple(values.shape[2:])
            predicted = assembled(probes[layer](inputs(values, around)), grid)
            for name, value in compared(predicted, pixel_values, colour).items():
                columns[layer].setdefault(name, []).append(value)
    return {layer: (figures_of(columns[layer]), probes[layer].ridge) for layer in probes}


def figures_of(columns: dict[str, list[Tensor]]) -> dict[str, dict]:
    """R2 over all pictures, PSNR and SSIM, with their intervals over the pictures."""
    values = {name: torch.cat(parts) for name, parts in columns.items()}
    r2 = bootstrap(values["error"], values["spread"], statistic=lambda a, b, axis: 1 - a.sum(axis) / b.sum(axis))
    return {"r2": r2, "psnr": bootstrap(values["psnr"]), "ssim": bootstrap(values["ssim"])}


def add_models(ranked: list[Ranked], models: Sequence[str], part: Part, count: int, batch: int, device: str) -> None:
    """Adds to the maps that inversion models invert how faithful their pictures are: the cosine, and that by the
    independent backbone where the world has one. Raises FeatInvError for a model whose map is not ranked."""
    for model in models:
        pipeline = load_pipeline(model, device=device)
        source = pipeline.source
        found = [one for one in ranked if (one.name, one.layer) == (source.backbone, source.layer)]
        if not found or source.pooled:
            raise FeatInvError(f"--models {model}: it inverts {source.describe()}, which is not among the ranked maps")
        pictures = [
            pipeline.backbone.preprocess(p[None])
            for _, some in Part(part.source, part.numbers[:count]).batches(f"drawing by {model}")
            for p in some
        ]
        originals = torch.cat(pictures).to(device)
        target = pipeline.features(originals)
        drawn = pipeline.draw(target, pipeline.recommended(), pipeline.noise(range(len(target))), batch)
        found[0].figures["cosine"] = bootstrap(pipeline.score(target, drawn).cpu())
        name = pipeline.world.independent.get(source.backbone) if pipeline.world else None
        if name:
            independent = open_backbone(name)
            layer = deepest(independent)
            maps = [independent.extract(independent.preprocess(x.cpu(), "stretch"), layer) for x in (originals, drawn)]
            found[0].figures["independent"] = bootstrap(cosine(*maps))


HEADER = ("map", "C x H x W", "values / pixels", "GMAC", "M parameters", "R2", "PSNR", "SSIM")


def report_of(ranked: list[Ranked], around: int, fitted: int, measured: int) -> Report:
    """The table, the best map first, and its plot."""
    drawn = [name for name in ("cosine", "independent") if any(name in one.figures for one in ranked)]
    rows = []
    for place, one in enumerate(ranked, 1):
        size = f"{one.channels} x {one.grid[0]} x {one.grid[1]}"
        cost = ["", ""] if one.gmac is None else [f"{one.gmac:.3g}", f"{(one.parameters or 0) / 1e6:.2f}"]
        figures = [figure_text(one.figures["r2"]), figure_text(one.figures["psnr"], 1)]
        figures.append(figure_text(one.figures["ssim"]))
        figures += [figure_text(one.figures[name]) if name in one.figures else "" for name in drawn]
        rows.append([str(place), one.label(), size, f"{one.share:.3g}", *cost, *figures])
    names = {"cosine": "cosine of reconstructions", "independent": "the same, independent backbone"}
    grid = Grid("Maps by what they keep of the image", ["", *HEADER, *(names[n] for n in drawn)], rows)
    read = "the vector of a location" if around == 1 else "the vectors of 3 x 3 locations"
    lines = [
        f"R2, PSNR and SSIM are of images that a ridge regression predicts cell by cell from {read}, at 64 x 64"
        f" pixels; {measured} held-out images, {fitted} for fit and ridge, as many vectors of each map.",
        "The probe is linear: what a map keeps without being read so does not count. Compare layers of one kind, and"
        " where there are inversion models their cosines too.",
        "Values / pixels is the number of values in the map for each value of the image: a map that keeps more may"
        " only be larger. The shrunk images show what so many values keep where they are pixels.",
    ]
    labels = [f"{one.label()} ({one.share:.2g})" for one in ranked]
    plot = bars(labels, [one.figures["r2"] for one in ranked], [one.name for one in ranked], "R2 of the image")
    figures = {one.label(): one.entry() for one in ranked}
    return Report("How much of the image feature maps keep", figures, [grid], lines, panels={"ranking.png": plot})
