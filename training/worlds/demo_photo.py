"""The demo on photographs: reconstructions from four depths of a network, two mixed, and one concept turned down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional as F

from featinv_nodes.core.backbones import Backbone
from featinv_nodes.core.concepts import discover
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, concatenate
from featinv_nodes.core.metrics import cosine_per_location
from featinv_nodes.core.mixing import at_grid, compose, interpolate
from featinv_nodes.core.pictures import heat_map, spotlight
from featinv_nodes.core.viz import FACTOR, Visualization, VizSettings, normalised
from featinv_nodes.worlds.photo import PHOTO

from ..concepts.viz import visualize
from ..models.pipeline import InversionPipeline, load_pipeline
from ..report import Cell, panel
from .inversion import POOLED

SAMPLES = ("china.jpg", "flower.jpg")  # scikit-learn's, installed with it
MIDDLE = "blocks.4"  # the depth that is mixed and steered
WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CLASSES, LONGEST = 3, 15  # shown under each picture; letters of a file's name beside its row
CONCEPTS, SEEDS = 4, 2  # clusters in the maps of two pictures; drawings of each map to see a concept's change


@dataclass(frozen=True)
class Reconstruction:
    """A picture and what the network makes of it. classes: the most probable ones, with probability. cosine: of its
    features with those it was drawn from, None for an original."""

    picture: Tensor
    classes: list[tuple[str, float]]
    cosine: float | None = None

    def cell(self, name: str) -> Cell:
        """The picture with a caption: its name and cosine, then a line for each class."""
        first = name if self.cosine is None else f"{name}, cos {self.cosine:.2f}"
        return self.picture, "\n".join([first, *(f"{probability:.0%} {label}" for label, probability in self.classes)])

    def entry(self) -> dict:
        """For results.json."""
        own = {} if self.cosine is None else {"cosine": self.cosine}
        return own | {"classes": [{"name": label, "probability": probability} for label, probability in self.classes]}


def classify(backbone: Backbone, pixel_values: Tensor) -> list[list[tuple[str, float]]]:
    """The most probable classes of each preprocessed picture, by the first of their names."""
    ranked = backbone.top_classes(backbone.logits(backbone.extract(pixel_values)), CLASSES)
    return [[(name.split(",")[0], probability) for name, probability in row] for row in ranked]


class Depths:
    """The world's inversion models, by the depth that each inverts, all with the same network."""

    def __init__(self, steps: int | None) -> None:
        """steps: of the solver, None for each model's own."""
        pipelines = [load_pipeline(name) for name in PHOTO.models]
        self.models = {o.info.source.layer if not o.info.source.pooled else POOLED: o for o in pipelines}
        self.sampling = {depth: o.recommended(steps=steps) for depth, o in self.models.items()}
        self.backbone: Backbone = pipelines[0].backbone

    @property
    def middle(self) -> InversionPipeline:
        return self.models[MIDDLE]

    def draw(self, depth: str, target: FeatureMap, seed: int = 0) -> list[Reconstruction]:
        """A picture for each feature map, all from the same noise."""
        pipeline = self.models[depth]
        drawn = pipeline.draw(target, self.sampling[depth], pipeline.noise([seed] * len(target)))
        classes, cosines = (
            classify(self.backbone, self.backbone.preprocess(drawn, "stretch")),
            pipeline.score(target, drawn).tolist(),
        )
        return [Reconstruction(*one) for one in zip(drawn, classes, cosines)]

    def legend(self) -> str:
        """What the names of the depths mean, in a line."""
        sources = {depth: o.info.source for depth, o in self.models.items()}
        spatial = [
            f"{depth} ({s.grid[0]} x {s.grid[1]} locations, {s.channels} channels)"
            for depth, s in sources.items()
            if not s.pooled
        ]
        pooled = [f"{depth} (the mean of {s.layer})" for depth, s in sources.items() if s.pooled]
        return ", ".join(spatial + pooled)


def sample_photographs() -> list[tuple[str, Tensor]]:
    """scikit-learn's photographs [1, 3, h, w] in 0..1 by name."""
    return [(name, torch.from_numpy(load_sample_image(name) / 255).float().permute(2, 0, 1)[None]) for name in SAMPLES]


def inverted(depths: Depths, pixel_values: Tensor, names: list[str]) -> tuple[list[list[Cell]], list[dict]]:
    """A row for each picture: the original, what is drawn from its map at each depth, and another seed at the middle
    one."""
    originals = [Reconstruction(*one) for one in zip(pixel_values, classify(depths.backbone, pixel_values))]
    drawn = {depth: depths.draw(depth, pipeline.features(pixel_values)) for depth, pipeline in depths.models.items()}
    again = depths.draw(MIDDLE, depths.middle.features(pixel_values), seed=1)
    rows, entries = [], []
    for i, (name, original) in enumerate(zip(names, originals)):
        row = [original.cell("original")]
        for depth in drawn:
            row.append(drawn[depth][i].cell(depth))
            row += [again[i].cell("other seed")] if depth == MIDDLE else []
        rows.append(row)
        entries.append(
            {
                "name": name,
                **original.entry(),
                "depths": {depth: at_depth[i].entry() for depth, at_depth in drawn.items()},
                "other_seed": again[i].entry(),
            }
        )
    return rows, entries


def interpolated(depths: Depths, features: FeatureMap) -> tuple[list[Cell], list[dict]]:
    """From the first picture's map to the second's (paper Fig. 7), from one noise."""
    maps = [interpolate([features.select(0), features.select(1)], [1 - w, w]) for w in WEIGHTS]
    drawn = depths.draw(MIDDLE, concatenate(maps))
    cells = [one.cell(f"{weight:.0%}") for weight, one in zip(WEIGHTS, drawn)]
    return cells, [{"weight": weight, **one.entry()} for weight, one in zip(WEIGHTS, drawn)]


def composed(depths: Depths, features: FeatureMap, pixel_values: Tensor) -> tuple[list[Cell], list[dict]]:
    """The left half of one picture's map beside the right half of the other's (paper Fig. 8), both ways round, and how
    well each half of what is drawn agrees with the map it was given."""
    left = torch.zeros(1, *pixel_values.shape[2:])
    left[:, :, : pixel_values.shape[3] // 2] = 1
    ways = [(0, 1), (1, 0)]
    target = concatenate([compose(features.select(a), features.select(b), left) for a, b in ways])
    drawn = depths.draw(MIDDLE, target)
    agreement = cosine_per_location(target, depths.middle.extract(torch.stack([one.picture for one in drawn])))
    inside = at_grid(left, target.source.grid)[0, 0].bool()
    cells, entries = [], []
    for (a, b), one, agrees in zip(ways, drawn, agreement):
        cells += [
            (spotlight(pixel_values[a], left[0]), "left half"),
            (spotlight(pixel_values[b], 1 - left[0]), "right half"),
            one.cell("together"),
        ]
        entries.append(
            {"cosine_left": agrees[inside].mean().item(), "cosine_right": agrees[~inside].mean().item(), **one.entry()}
        )
    return cells, entries


def turned_down(depths: Depths, features: FeatureMap, picture: Tensor) -> tuple[list[Cell], dict]:
    """The concept that is strongest in the first picture's map, found in the maps of both, and what is drawn without
    most of it (paper Sec. 4.3). Raises FeatInvError where the maps fall into no concepts."""
    concepts = discover(features.values.movedim(1, -1).flatten(0, 2), features.source, "mcd", CONCEPTS)
    first = features.select(0)
    lengths = concepts.lengths(first)[:-1, 0]  # without the rest
    strongest = int(lengths.sum((1, 2)).argmax())
    name, share = concepts.names[strongest], float(lengths[strongest].sum() / first.values.norm(dim=1).sum())
    [visualization] = visualize(
        depths.middle, first, concepts, [[name]], VizSettings(FACTOR, SEEDS), depths.sampling[MIDDLE]
    )
    where = F.interpolate(normalised(lengths[strongest])[None, None], picture.shape[1:], mode="bilinear")[0, 0]
    kept, changed = pairs(depths, first, visualization)
    cells = [(spotlight(picture, where), "where it is")]
    for title, before, after in zip(("as it is", "other seed"), kept, changed):
        cells += [before.cell(title), after.cell(f"at {FACTOR:g}")]
    cells.append((heat_map(normalised(visualization.distance)[None])[0], "what changes"))
    entry = {
        "found": len(concepts),
        "dimensions": len(concepts.bases[strongest]),
        "share": share,
        "factor": FACTOR,
        "slope": visualization.slope.own,
    }
    return cells, entry | {"as_it_is": [one.entry() for one in kept], "turned_down": [one.entry() for one in changed]}


def pairs(
    depths: Depths, original: FeatureMap, visualization: Visualization
) -> tuple[list[Reconstruction], list[Reconstruction]]:
    """The drawings of the original map and of the changed one, with the same seeds."""
    pictures = torch.cat([visualization.original, visualization.changed])
    target = concatenate([original.repeat(SEEDS), visualization.change.changed.repeat(SEEDS)])
    classes, cosines = (
        classify(depths.backbone, depths.backbone.preprocess(pictures, "stretch")),
        depths.middle.score(target, pictures).tolist(),
    )
    reconstructions = [Reconstruction(*one) for one in zip(pictures, classes, cosines)]
    return reconstructions[:SEEDS], reconstructions[SEEDS:]


def show(
    own: list[tuple[str, Tensor]], say: Callable[[str], None], steps: int | None
) -> tuple[Image.Image, list[str], dict]:
    """The panel, what there is to say, and the numbers. own: the user's pictures [1, 3, h, w] by name, which come
    first.
    steps: of the solver, None for each model's own."""
    say("opening the network and an inversion model for each of its depths")
    depths = Depths(steps)
    pictures = own + sample_photographs()
    names = [name for name, _ in pictures]
    pixel_values = torch.cat([depths.backbone.preprocess(picture) for _, picture in pictures])
    say(f"inverting {len(pixel_values)} photographs at the depths {', '.join(depths.models)}")
    rows, inversions = inverted(depths, pixel_values, names)
    titles, features = (
        [name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in names],
        depths.middle.features(pixel_values[:2]),
    )
    say("interpolating between two feature maps, composing two")
    cells, interpolation = interpolated(depths, features)
    others, composition = composed(depths, features, pixel_values)
    rows, titles = [*rows, cells, others], [*titles, f"from {titles[0]}\nto {titles[1]}", "one half\nof each"]
    say("finding concepts, turning the strongest down")
    notes, concept = [], None
    try:
        cells, concept = turned_down(depths, features, pixel_values[0])
        rows, titles = [*rows, cells], [*titles, f"a concept of\n{titles[0]}\nturned down"]
    except FeatInvError as error:
        notes = [f"No concept was found: {error}"]
    sheet = panel(
        rows,
        titles,
        f"What {depths.backbone.name} still knows of an image, by depth",
        "\n".join([*explained(depths), *notes]),
    )
    models = dict(zip(depths.models, PHOTO.models))
    return (
        sheet,
        [*summaries(inversions, concept), *notes],
        {
            "models": models,
            "pictures": inversions,
            "interpolation": interpolation,
            "composition": composition,
            "concept": concept,
            "notes": notes,
        },
    )


def explained(depths: Depths) -> list[str]:
    """What the panel shows, in sentences."""
    return [
        (
            "Every image but the originals is generated from features alone. What the features leave open is random:"
            " another seed shows it."
        ),
        (
            "Below it: the cosine similarity of its features with the requested ones, and the network's three most"
            " probable classes."
        ),
        f"Depths: {depths.legend()}.",
        f"The rows below the photographs are of {MIDDLE}.",
    ]


def summaries(inversions: list[dict], concept: dict | None) -> list[str]:
    """The numbers in sentences."""
    lines = []
    for one in inversions:
        top = one["classes"][0]
        cosines = ", ".join(f"{depth} {at_depth['cosine']:.2f}" for depth, at_depth in one["depths"].items())
        lines.append(
            f"{one['name']}: {top['name']} {top['probability']:.0%}; cosine of the reconstruction by depth: {cosines}"
        )
    if concept:
        lines.append(
            f"Strongest concept of {inversions[0]['name']}: {concept['share']:.0%} of the features' length; turned down"
            f" to {concept['factor']:g}, its measured slope in the generated image is {concept['slope']:.2f}"
        )
    return lines
