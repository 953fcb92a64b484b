"""Compares FeatInv-Viz and other heat maps with the true masks of the drawn world.

    python training/experiments/measure_concepts.py                      200 held-out scenes, as in docs/concepts.md
    python training/experiments/measure_concepts.py --count 20 --out DIR

Uses two kinds of concepts: fitted to the true masks (so that FeatInv-Viz has good concepts), and discovered without
them by MCD and k-means (each object and background gets the one that fits its cells best on training scenes). In each
scene the object and the background are attenuated in turn. Localisation: does the heat map find the pixels?
Faithfulness: when the backbone reads the images again, does the concept have the requested strength, are the others
unchanged, and do the logits move as predicted? Writes results.json, report.md, index.html and panel.webp.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from featinv_nodes.core.concepts import Concepts, discover
from featinv_nodes.core.concepts.relevance import relevance
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.viz import ROUNDS, Visualization, VizSettings, null_difference
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.drawn.scenes import BACKGROUNDS, Scenes, draw
from training.cli import model_parser, pipeline_from, run
from training.concepts import localisation
from training.concepts.report import CLOSED, VIZ, Trial, write_report
from training.concepts.viz import visualize
from training.files import make_folder
from training.models.pipeline import InversionPipeline
from training.worlds.concepts import OBJECT, fit_concepts

TRUE, DISCOVERED = "true masks", {"mcd": "discovered by MCD", "kmeans": "discovered by k-means"}
TRAINING_SCENES, VECTORS, CONCEPTS = 400, 10_000, 8
GROUPS = {"object": "shape", "background": "background"}  # the label group that each kind of concept should speak for


@dataclass(frozen=True)
class Track:
    """Concepts and, by name of what is in a scene ("object", "sky", ...), which of them stands for it."""

    name: str
    concepts: Concepts
    stands_for: dict[str, str]
    notes: list[str] = field(default_factory=list)


def true_track(pipeline: InversionPipeline, layer: str) -> Track:
    concepts = fit_concepts(pipeline.backbone, layer)
    return Track(TRUE, concepts, {name: name for name in concepts.labels})


def discovered_track(pipeline: InversionPipeline, layer: str, method: str) -> Track:
    """Concepts of training scenes; each object and background gets the one whose |phi_c| ranks its cells best there."""
    scenes = draw(0, torch.arange(TRAINING_SCENES))
    maps = pipeline.backbone.extract(pipeline.backbone.preprocess(scenes.image), layer)
    vectors = maps.values.movedim(1, -1).flatten(0, 2)
    picked = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:VECTORS]
    concepts = discover(vectors[picked], maps.source, method, CONCEPTS)
    lengths = torch.stack([concepts.part(maps, name).norm(dim=1) for name in concepts.labels])  # [n, B, H, W]
    cover = F.interpolate(scenes.masks.sum(1, keepdim=True), maps.source.grid, mode="area")[:, 0]
    chosen, notes = (
        {},
        [f"{len(concepts)} concepts discovered in {len(picked):,} vectors of {TRAINING_SCENES} training scenes"],
    )
    for name in (OBJECT, *BACKGROUNDS):
        mask = (
            cover >= 0.5
            if name == OBJECT
            else (cover < 0.5) & (scenes.background == BACKGROUNDS.index(name))[:, None, None]
        )
        scores = [localisation.auroc(length.flatten()[None], mask.flatten()[None]) for length in lengths]
        best = max(range(len(scores)), key=scores.__getitem__)
        chosen[name] = concepts.labels[best]
        notes.append(
            f"{name}: {concepts.labels[best]}, {len(concepts.bases[best])} dimensions, AUROC {scores[best]:.3f} on"
            " training cells"
        )
    return Track(DISCOVERED[method], concepts, chosen, notes)


def trials(
    pipeline: InversionPipeline,
    scene: Scenes,
    pixel_values: Tensor,
    track: Track,
    sampling: Sampling,
    settings: VizSettings,
) -> Iterator[Trial]:
    """The object and the background of one preprocessed scene [3, H, W], with every heat map."""
    features, layer = pipeline.features(pixel_values[None]), pipeline.info.source.layer
    covered = scene.masks[0].sum(0).clamp(max=1) > 0.5
    names = {"object": track.stands_for[OBJECT], "background": track.stands_for[BACKGROUNDS[scene.background[0]]]}
    asked = visualize(
        pipeline, features, track.concepts, [[n] for n in names.values()], replace(settings, rounds=1), sampling
    )
    for (kind, name), visualization in zip(names.items(), asked):
        trial = Trial(
            kind, name, pixel_values, covered if kind == "object" else ~covered, visualizations={VIZ: visualization}
        )
        if track.name == TRUE:
            trial.visualizations[CLOSED] = (
                visualization
                if visualization.slope.passed
                else visualize(
                    pipeline, features, track.concepts, [[name]], replace(settings, rounds=ROUNDS), sampling
                )[0]
            )
            random = localisation.random_subspace(track.concepts, name, int(scene.centre.sum() * 1000))
            trial.heats["random subspace"] = visualize(
                pipeline, features, random, [["random"]], replace(settings, rounds=1), sampling
            )[0].distance
        trial.heats |= {method: one.distance for method, one in trial.visualizations.items()}
        if (null := null_difference(visualization.original)) is not None:
            trial.heats["seeds alone"] = null
        trial.heats |= _other_maps(pipeline, track.concepts, name, features, pixel_values, GROUPS[kind])
        trial.logit = {m: _logit_change(pipeline, s, features, GROUPS[kind]) for m, s in trial.visualizations.items()}
        trial.curves = {
            m: localisation.deletion(pipeline.backbone, track.concepts, name, pixel_values, heat, layer)
            for m, heat in trial.heats.items()
        }
        trial.visualizations = {  # one seed is enough to look at
            m: replace(s, original=s.original[:1], changed=s.changed[:1]) for m, s in trial.visualizations.items()
        }
        yield trial


def _other_maps(
    pipeline: InversionPipeline, concepts: Concepts, name: str, features: FeatureMap, picture: Tensor, group: str
) -> dict[str, Tensor]:
    size = picture.shape[1:]
    active = localisation.activation(concepts, name, features, size)
    return {
        "activation, enlarged": active,
        "activation, guided filter": localisation.guided(active, picture),
        "GradCAM": localisation.grad_cam(pipeline.backbone, features, _top(pipeline, features, group), size),
        "occlusion of the concept": localisation.occlusion(
            pipeline.backbone, concepts, name, picture, features.source.layer
        ),
        "edges": localisation.edges(picture),
    }


def _top(pipeline: InversionPipeline, features: FeatureMap, group: str) -> int:
    """The number of the label group's top logit."""
    part = pipeline.backbone.groups[group]
    return part.start + int(pipeline.backbone.logits(features)[0, part].argmax())


def _logit_change(
    pipeline: InversionPipeline, visualization: Visualization, features: FeatureMap, group: str
) -> tuple[float, float]:
    """(predicted, actual) change of the top logit of a label group: (factor - 1) times the concepts' relevance, and
    what the head makes of the reconstructions, read again, of the changed and of the original map."""
    top, change = _top(pipeline, features, group), visualization.change
    contributions, _ = relevance(pipeline.backbone, change.concepts, features)
    concept = sum(contributions[change.concepts.index(name), 0, top] for name in change.groups[0])
    again, before = (
        pipeline.backbone.logits(pipeline.extract(pictures))[:, top].mean()
        for pictures in (visualization.changed, visualization.original)
    )
    return float((visualization.slope.asked - 1) * concept), float(again - before)


_mine: dict[str, object] = {}  # what a worker process keeps


def open_in_worker(args: argparse.Namespace, tracks: Sequence[Track]) -> None:
    if args.workers > 1:
        torch.set_num_threads(1)
    pipeline, sampling = pipeline_from(args)
    _mine.update(pipeline=pipeline, sampling=sampling, tracks=tracks, settings=VizSettings(args.factor, args.seeds))


def trials_of_scene(row: int) -> bytes:
    """All trials of a held-out scene per track, pickled by value: shared memory would take a file handle for each
    tensor."""
    pipeline, scenes = _mine["pipeline"], draw(0, torch.tensor([row]), "held-out")
    pixel_values = pipeline.backbone.preprocess(scenes.image)[0]
    return pickle.dumps(
        {
            t.name: list(trials(pipeline, scenes, pixel_values, t, _mine["sampling"], _mine["settings"]))
            for t in _mine["tracks"]
        }
    )


def in_workers(args: argparse.Namespace, tracks: Sequence[Track], rows: Sequence[int]) -> Iterator[bytes]:
    """trials_of_scene of each row, in order; one worker is this process."""
    if args.workers == 1:
        open_in_worker(args, tracks)
        yield from map(trials_of_scene, rows)
        return
    with ProcessPoolExecutor(args.workers, get_context("spawn"), open_in_worker, (args, tracks)) as pool:
        yield from pool.map(trials_of_scene, rows)


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__, gradient=0.0)
    parser.add_argument("--count", type=int, default=200, help="held-out scenes to report on")
    parser.add_argument(
        "--validation", type=int, default=40, help="further ones, on which each map's threshold is chosen"
    )
    parser.add_argument("--seeds", type=int, default=5, help="reconstructions of each map")
    parser.add_argument("--factor", type=float, default=0.25, help="what the concept is multiplied by")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("out/concepts"))
    args = parser.parse_args(argv)
    make_folder(args.out)
    pipeline, sampling = pipeline_from(args)
    _require_world(pipeline, args)
    layer = pipeline.info.source.layer
    tracks = [true_track(pipeline, layer), *(discovered_track(pipeline, layer, method) for method in DISCOVERED)]
    trials_of: dict[str, list[Trial]] = {track.name: [] for track in tracks}
    rows = range(args.count + args.validation)
    for pickled in tqdm(in_workers(args, tracks, rows), total=len(rows), desc="scenes"):
        for name, own in pickle.loads(pickled).items():
            trials_of[name] += own
    about = {
        "model": args.model,
        "source": pipeline.info.source.describe(),
        "digests": pipeline.digests,
        "count": args.count,
        "validation": args.validation,
        "seeds": args.seeds,
        "factor": args.factor,
        "sampling": asdict(sampling),
        "notes": {t.name: t.notes for t in tracks},
    }
    print(write_report(args.out, about, trials_of))


def _require_world(pipeline: InversionPipeline, args: argparse.Namespace) -> None:
    if pipeline.world is not DRAWN or pipeline.info.source.pooled or pipeline.info.source.layer != "last":
        raise FeatInvError(
            f"{args.model} inverts {pipeline.info.source.describe()}; true masks are known for the drawn world, the"
            " head for its last layer alone"
        )
    if args.count < 2 or args.validation < 2 or args.seeds < 1 or args.workers < 1:
        raise FeatInvError(
            f"--count {args.count} --validation {args.validation} --seeds {args.seeds} --workers {args.workers}:"
            " expected at least 2, 2, 1 and 1"
        )


if __name__ == "__main__":
    run(main)
