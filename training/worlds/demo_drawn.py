"""The demo on drawn scenes: held-out ones and the user's images, with figures; one interpolation and one
composition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import cosine_per_location
from featinv_nodes.core.mixing import at_grid, compose, interpolate
from featinv_nodes.core.sampling import Sampling

from ..evaluation.run import evaluate_in_memory, load_pictures
from ..evaluation.suites.quality import gap_closed
from ..models.pipeline import InversionPipeline, load_pipeline
from ..report import Cell, panel

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN, LEAST = 10, 6


def captions(pictures: Tensor, scores: Tensor) -> list[Cell]:
    return [(x, f"cos {c:.2f}") for x, c in zip(pictures, scores.tolist())]


def inverted(pipeline: InversionPipeline, own: list[tuple[str, Tensor]], sampling: Sampling) -> list[list[Cell]]:
    """Rows of the user's pictures, each beside its reconstruction."""
    pixel_values = torch.cat([pipeline.backbone.preprocess(picture) for _, picture in own])
    target = pipeline.features(pixel_values)
    drawn = pipeline.draw(target, sampling, pipeline.noise(range(len(pixel_values))))
    originals = [(picture, name[:18]) for picture, (name, _) in zip(pixel_values, own)]
    cells = [cell for pair in zip(originals, captions(drawn, pipeline.score(target, drawn))) for cell in pair]
    return [cells[i : i + SHOWN] for i in range(0, len(cells), SHOWN)]


def mixed(pipeline: InversionPipeline, pixel_values: Tensor, sampling: Sampling) -> tuple[list[Cell], list[dict]]:
    """Reconstructions of convex combinations of two pictures' feature maps (paper Fig. 7), one seed."""
    features = pipeline.features(pixel_values[:2])
    maps = [interpolate([features.select(0), features.select(1)], [1 - w, w]) for w in WEIGHTS]
    drawn = [pipeline.draw(m, sampling, pipeline.noise([0])) for m in maps]
    scores = torch.cat([pipeline.score(m, x) for m, x in zip(maps, drawn)])
    cells = [(pixel_values[0], "first"), *captions(torch.cat(drawn), scores), (pixel_values[1], "second")]
    return cells, [{"weight": w, "cosine": c} for w, c in zip(WEIGHTS, scores.tolist())]


def composed(pipeline: InversionPipeline, pixel_values: Tensor, sampling: Sampling) -> tuple[list[Cell], dict]:
    """The left half of one picture's map beside the right half of another's (paper Fig. 8), and how well each half
    of the drawn picture agrees with the map it was given."""
    features = pipeline.features(pixel_values[:2])
    mask = torch.zeros(1, *pixel_values.shape[2:])
    mask[:, :, : pixel_values.shape[3] // 2] = 1
    target = compose(features.select(0), features.select(1), mask)
    drawn = pipeline.draw(target, sampling, pipeline.noise([0]))
    agreement = cosine_per_location(target, pipeline.extract(drawn))
    inside = at_grid(mask, target.source.grid)[:, 0].bool()
    cells = [
        (pixel_values[0], "left half from"),
        (pixel_values[1], "right half from"),
        *captions(drawn, agreement.mean((1, 2))),
    ]
    return cells, {"cosine_inside": agreement[inside].mean().item(), "cosine_outside": agreement[~inside].mean().item()}


def show(
    own: list[tuple[str, Tensor]], say: Callable[[str], None], steps: int | None, model: str, count: int
) -> tuple[Image.Image, list[str], dict]:
    """The panel, what there is to say, and the numbers. own: the user's pictures [1, 3, h, w] by name. steps: of the
    solver, None for the model's own. count: held-out pictures to measure on."""
    if count < LEAST:
        raise FeatInvError(f"--count {count}: the demo shows {LEAST} images; give at least as many")
    say("opening the embedded backbone, diffusion model and inversion model")
    pipeline = load_pipeline(model)
    sampling = pipeline.recommended(steps=steps)
    pixel_values, objects = load_pictures(pipeline, "drawn", count)
    say(
        f"inverting {count} held-out images, then generating as many without features for comparison ({sampling.steps}"
        " steps each)"
    )
    results, drawn = evaluate_in_memory(pipeline, pixel_values, sampling, objects == 1)
    scores = pipeline.score(pipeline.features(pixel_values[:SHOWN]), drawn["reconstruction"][:SHOWN])
    rows = [
        [(x, "") for x in pixel_values[:SHOWN]],
        captions(drawn["reconstruction"][:SHOWN], scores),
        [(x, "") for x in drawn["unconditional"][:SHOWN]],
    ]
    titles = ["original", "reconstruction\nfrom features", "generated without\nfeatures"]
    notes = [pipeline.world.outside] if own else []
    if own:
        say(f"inverting your {len(own)} image(s)")
        rows += inverted(pipeline, own, sampling)
        titles += ["your images,\nas seen"] + [""] * (len(rows) - len(titles) - 1)
    say("interpolating between two feature maps")
    cells, interpolation = mixed(pipeline, pixel_values, sampling)
    rows.append(cells)
    say("composing two feature maps")
    cells, composition = composed(pipeline, pixel_values[[5, 4]], sampling)
    rows.append(cells)
    sheet = panel(
        rows,
        [*titles, "interpolation", "composition"],
        f"FeatInv on the embedded world: {pipeline.info.source.describe()}",
        "\n".join(notes),
    )
    summary, figures = figures_of(results, count)
    return (
        sheet,
        [summary, *notes],
        {
            "model": model,
            "reconstruction": figures,
            "interpolation": interpolation,
            "composition": composition,
            "notes": notes,
        },
    )


def figures_of(results: dict, count: int) -> tuple[str, dict]:
    """A sentence with the figures of the held-out pictures, and the figures."""
    r = {
        condition: {measure: entry["value"] for measure, entry in entries.items()}
        for condition, entries in results.items()
    }
    measured, unconditional, autoencoded = r["reconstruction"], r["unconditional"]["cosine"], r["round trip"]["cosine"]
    summary = (
        f"{count} held-out images: cosine {measured['cosine']:.3f} (without features {unconditional:.3f}, autoencoder"
        f" alone {autoencoded:.3f}: {gap_closed(results):.0%} of the gap); shape match {measured['top1_match']:.0%}"
    )
    return summary, {
        "n": count,
        "cosine_mean": measured["cosine"],
        "cosine_centred": measured["cosine_centred"],
        "top1_match": measured["top1_match"],
        "top5_match": measured["top5_match"],
        "cosine_unconditional": unconditional,
        "cosine_round_trip": autoencoded,
    }
