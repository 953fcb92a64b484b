"""Fits linear maps of feature space to images and changed images, measures them, and inverts the mapped maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.feature_map import FeatureMap, FeatureSource
from featinv_nodes.core.linear_maps import KINDS, LinearMap, Pairs, figures, measure
from featinv_nodes.core.metrics import bootstrap, cosine
from featinv_nodes.core.weights import load_scope, read_info
from featinv_nodes.worlds import MODELS, model_file, open_backbone

from ..evaluation.evaluator import deepest
from ..evaluation.report import Grid
from ..models.pipeline import load_pipeline
from ..report import figure_text, panel
from .changes import Change, paired
from .parts import Part

SHOWN = 6  # pictures in the panel
COARSE = 8  # cells a side of the coarse colours that are compared
MEASURES = {
    "cosine_before": "cosine before",
    "cosine_mapped": "cosine mapped",
    "centred_before": "mean removed, before",
    "centred_mapped": "mean removed, mapped",
    "explained": "share of the change",
}


@dataclass
class Fitted:
    """maps: kind -> the linear map with its figures. pictures: some held-out ones and the same changed, [B, 3, h, w]
    each."""

    maps: dict[str, LinearMap]
    pictures: tuple[Tensor, Tensor]


def pairs_of(backbone: Backbone, layer: str, part: Part, how: Change | Path, what: str) -> Iterator[tuple]:
    """((pictures, changed), (maps, changed maps)) of a part, a batch at a time."""
    device = next(backbone.parameters()).device
    for names, pictures in part.batches(what):
        pixel_values = paired(names, pictures, backbone.preprocess, how)
        yield pixel_values, [backbone.extract(x.to(device), layer).to("cpu") for x in pixel_values]


def fit(
    backbone: Backbone, layer: str, parts: tuple[Part, Part], how: Change | Path, keep: int, **settings: object
) -> Fitted:
    """Linear maps of every kind, fitted to the first part and measured on the second. keep: held-out pictures that are
    kept to be drawn. settings: noted in the maps."""
    pairs, total, count = Pairs(), torch.zeros(1), 0
    for _, (before, after) in pairs_of(backbone, layer, parts[0], how, "fitting"):
        pairs.add(before, after)
        total, count = total + after.values.sum((0, 2, 3)), count + after.values[:, 0].numel()
    maps = {kind: pairs.fit(kind, **settings) for kind in KINDS}
    values: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in KINDS}
    kept: list[list[Tensor]] = []
    for pixel_values, (before, after) in pairs_of(backbone, layer, parts[1], how, "measuring"):
        for kind, linear in maps.items():
            values[kind].append(measure(linear, before, after, total / count))
        if sum(len(x) for x, _ in kept) < keep:
            kept.append(pixel_values)
    measured = {}
    for kind, linear in maps.items():
        columns = {name: torch.cat([batch[name] for batch in values[kind]]) for name in values[kind][0]}
        measured[kind] = replace(linear, measured=figures(columns))
    shown = tuple(torch.cat([batch[side] for batch in kept])[:keep] for side in (0, 1))
    return Fitted(measured, (shown[0], shown[1]))


def kinds_table(maps: dict[str, LinearMap]) -> Grid:
    """A row for each kind with its held-out figures."""
    rows = [[kind, *(figure_text(linear.measured[name]) for name in MEASURES)] for kind, linear in maps.items()]
    return Grid(
        "Held-out figures of each kind",
        ["kind", *MEASURES.values()],
        rows,
        "Cosines are with the feature map of the changed image, the mean over the locations; mean removed: of the"
        " changed images' vectors. Share of the change: 1 - |mapped - changed|^2 / |unchanged - changed|^2.",
    )


def fitting_model(source: FeatureSource) -> str | None:
    """The shipped inversion model of a layer, if there is one."""
    return next((name for name in MODELS if read_info(model_file(name)).source.fits(source)), None)


@dataclass
class Drawn:
    """What an inversion model makes of the maps. columns: from which map -> measure -> figure; panel: the pictures."""

    figures: dict[str, dict[str, dict]]
    panel: Image.Image


def draw(model: str, linear: LinearMap, pictures: tuple[Tensor, Tensor], batch: int, device: str) -> Drawn:
    """Reconstructions from the map of the picture, from the mapped one, and from that of the changed picture, with one
    seed for all three. Each is compared with the changed picture: by the cosine of its features, by that of the
    independent backbone where the world has one, and by its colours, averaged over a grid of 8 x 8 cells. Raises
    FeatInvError where the model inverts another layer."""
    pipeline = load_pipeline(model, device=device)
    original, changed = pictures
    before, after = pipeline.features(original.to(device)), pipeline.features(changed.to(device))
    maps = {"unchanged map": before, "mapped map": linear.apply(before), "changed image's map": after}
    start, sampling = pipeline.noise(range(len(original))), pipeline.recommended()
    drawn = {name: pipeline.draw(m, sampling, start, batch) for name, m in maps.items()}
    world = pipeline.world
    name = world.independent.get(pipeline.backbone.name) if world else None
    independent = open_backbone(name) if name else None
    scope = load_scope(model_file(model))
    columns = {}
    for name, x in drawn.items():
        values = {"cosine": cosine(after, pipeline.extract(x)).cpu()}
        if independent:
            values["cosine by the independent backbone"] = cosine(_seen(independent, changed), _seen(independent, x))
        values["colour distance"] = (_coarse(x) - _coarse(changed)).square().mean((1, 2, 3)).sqrt()
        columns[name] = {measure: bootstrap(v) for measure, v in values.items()}
        if scope:
            outside = torch.tensor([verdict == "outside" for verdict in scope.evaluate(maps[name].to("cpu")).verdict])
            columns[name]["maps outside scope"] = bootstrap(outside.float())
    rows = [[(x, "") for x in part[:SHOWN]] for part in (original, changed)]
    for x in drawn.values():
        scores = cosine(after, pipeline.extract(x)).tolist()
        rows.append([(picture, f"cos {score:.2f}") for picture, score in zip(x[:SHOWN], scores)])
    titles = ["image", "changed image", *(f"generated from the\n{name}" for name in drawn)]
    note = "Cosines are with the features of the changed image."
    return Drawn(columns, panel(rows, titles, linear.describe(), note))


def undrawn(linear: LinearMap, pictures: tuple[Tensor, Tensor]) -> Image.Image:
    """The panel without an inversion model: pictures and changed pictures."""
    rows = [[(x, "") for x in part[:SHOWN]] for part in pictures]
    return panel(rows, ["image", "changed image"], linear.describe())


def drawn_table(drawn: Drawn, model: str) -> Grid:
    """A row for each kind of map that pictures were drawn from."""
    names = list(next(iter(drawn.figures.values())))
    rows = [[what, *(figure_text(entries[name]) for name in names)] for what, entries in drawn.figures.items()]
    return Grid(
        f"Images generated by {model}",
        ["generated from", *names],
        rows,
        "Compared with the changed image. Colour distance: root mean square difference of the colours (0 to 1)"
        f" averaged over {COARSE} x {COARSE} cells; lower is nearer. Maps outside scope: the share of them.",
    )


def _seen(backbone: Backbone, pictures: Tensor) -> FeatureMap:
    return backbone.extract(backbone.preprocess(pictures.cpu(), "stretch"), deepest(backbone))


def _coarse(pictures: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pictures.cpu(), COARSE)
