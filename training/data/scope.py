"""Scope statistics of an inversion model: fits them to images that training did not see, and evaluates maps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, concatenate
from featinv_nodes.core.images import as_seen, as_tensor
from featinv_nodes.core.metrics import cosine
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.scope import FEWEST, Scope, fit_scope, quantiles_of
from featinv_nodes.core.weights import load_scope, read_info, save_scope
from featinv_nodes.worlds import drawing_world, model_file

from ..models.pipeline import InversionPipeline, load_pipeline
from .listing import kept_back as listing_kept_back
from .listing import open_listing

FIRST = 100_000  # the first held-out scene for the fit; reports use those from 0 on
TINY_CENTRES, CENTRES = 512, 2048  # directions in the bank, 2 bytes x channels each
DRAWN = 256  # reconstructions for the cycle cosine


def pictures(
    pipeline: InversionPipeline, data: str, count: int, batch: int, first: int = FIRST, kept_back: bool = False
) -> Iterator[Tensor]:
    """Batches of preprocessed pictures: held-out scenes from number `first` on, or `count` of what open_listing opens,
    in a random order that is always the same, those that cannot be read left out and named. kept_back: only those that
    making a world of photographs leaves aside. Raises FeatInvError where there are fewer."""
    if world := drawing_world(data):
        for numbers in torch.arange(first, first + count).split(batch):
            yield pipeline.backbone.preprocess(world.draw(numbers))
        return
    listing, read, some = open_listing(data, None), 0, []
    listing = listing_kept_back(listing) if kept_back else listing
    indices = list(range(len(listing.names)))
    random.Random(0).shuffle(indices)
    if len(indices) < count:
        raise FeatInvError(f"{data} holds {len(indices)} images; {too_few(count)}")
    for index in indices:
        try:
            with listing.open(index) as opened:
                some.append(pipeline.backbone.preprocess(as_tensor(as_seen(opened))))
        except Exception as error:  # decoders raise whatever they stumble over
            tqdm.write(f"left out: {listing.names[index]} ({type(error).__name__}: {error})")
            continue
        read += 1
        if len(some) == batch or read == count:
            yield torch.cat(some)
            some = []
        if read == count:
            return
    raise FeatInvError(f"{data} holds {read} readable images; {too_few(count)}")


def too_few(count: int) -> str:
    """What to do where there are fewer pictures than are to be read."""
    return f"{count} are to be read. Give a folder with more, or a smaller --count (at least {2 * FEWEST})"


def fit(
    pipeline: InversionPipeline,
    sampling: Sampling,
    data: str,
    count: int,
    drawn: int,
    centres: int,
    batch: int = 32,
    kept_back: bool = False,
) -> Scope:
    """The statistics of `count` pictures and the quantiles of `drawn` reconstructions' cycle cosines (0: none).
    sampling: without guidance by the gradient, which raises the cosine of whatever map it is given. kept_back: as in
    pictures."""
    some: list[FeatureMap] = []

    def maps() -> Iterator[FeatureMap]:
        with tqdm(total=count, desc="reading", unit="image") as bar:
            for pixel_values in pictures(pipeline, data, count, batch, kept_back=kept_back):
                features = pipeline.features(pixel_values).to("cpu")
                if sum(len(m) for m in some) < drawn:
                    some.append(features)
                bar.update(len(features))
                yield features

    scope = fit_scope(maps(), centres=centres)
    if not drawn:
        return scope
    target = concatenate(some).select(slice(0, drawn))
    with tqdm(total=len(target), desc="drawing", unit="image") as bar:
        redrawn = pipeline.draw(target, sampling, pipeline.noise(range(len(target))), batch, bar.update)
    return replace(
        scope, quantiles=scope.quantiles | {"cycle": quantiles_of(cosine(target, pipeline.extract(redrawn).to("cpu")))}
    )


def ship_scope(name: str) -> None:
    """The statistics of a model of the drawn world, written into its file."""
    pipeline = load_pipeline(name)
    save_scope(model_file(name), fit(pipeline, pipeline.recommended(gradient=0.0), "drawn", 4000, 1000, TINY_CENTRES))


def centres_for(data: str) -> int:
    return TINY_CENTRES if drawing_world(data) else CENTRES


def scope_entries(file: Path, maps: FeatureMap, scores: list[float], sampling: Sampling) -> list[dict]:
    """For each map what the scope statistics of the weights file say of it; {} without any. And of its reconstruction
    by its score, where it was drawn as those behind the statistics were: as the file recommends, but without guidance
    by the gradient."""
    scope = load_scope(file)
    if scope is None:
        return [{} for _ in scores]
    report = scope.evaluate(maps)
    entries = [
        {
            "verdict": verdict,
            "off": off,
            "line": line,
            "less_unusual": {name: share[i].item() for name, share in report.share.items()},
        }
        for i, (verdict, off, line) in enumerate(zip(report.verdict, report.off, report.lines()))
    ]
    usual = Sampling.chosen(
        read_info(file).recommended, {"gradient": 0.0, "gradient_steps": sampling.gradient_steps, "best_of": 1}
    )
    if "cycle" in scope.quantiles and sampling == usual:
        shares, verdicts = scope.evaluate_cycle(torch.tensor(scores))
        entries = [
            entry | {"cycle": {"verdict": verdict, "less_unusual": share}}
            for entry, verdict, share in zip(entries, verdicts, shares.tolist())
        ]
    return entries
