"""Measures scope statistics: do they tell edited feature maps from held-out ones, and do they predict how well a map
can be inverted?

    python training/experiments/measure_scope.py                                      the embedded model
    python training/experiments/measure_scope.py --model FILE --data FOLDER --out DIR

FOLDER holds images that neither training nor fit_scope.py saw. Writes results.json, scope.md and scope.webp.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from featinv_nodes.core.concepts import load_concepts
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.feature_map import FeatureMap, concatenate
from featinv_nodes.core.metrics import bootstrap, cosine
from featinv_nodes.core.mixing import interpolate
from featinv_nodes.core.pictures import heat_map
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.core.scope import VERDICTS, Scope, ScopeReport
from featinv_nodes.core.viz import edit
from featinv_nodes.core.weights import load_scope
from featinv_nodes.worlds import concepts_file, model_file
from training.cli import model_parser, pipeline_from, run
from training.data.scope import pictures
from training.files import make_folder, write_json, write_text
from training.models.pipeline import InversionPipeline
from training.report import digests_text, panel, save_image

FIRST = 200_000  # the first held-out scene measured on
UNEDITED = "unedited"
SHOWN = (
    UNEDITED,
    "object x0.25",
    "background x2",
    "all x1.5",
    "mix 50/50",
    "half/half splice",
    "locations shuffled",
    "Gaussian noise",
    "noise images",
)
DRAWS = 1000  # of the bootstrap
Edit = Callable[[FeatureMap, torch.Generator], FeatureMap]


def others(maps: FeatureMap) -> FeatureMap:
    """For each map another one of the batch."""
    return maps.with_values(maps.values.roll(1, 0))


def spliced(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
    values = maps.values.clone()
    values[..., values.shape[3] // 2 :] = others(maps).values[..., values.shape[3] // 2 :]
    return maps.with_values(values)


def shuffled_locations(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
    flat = maps.values.flatten(2)
    indices = torch.rand(len(flat), 1, flat.shape[2], generator=random).argsort(2).expand_as(flat)
    return maps.with_values(flat.gather(2, indices).view_as(maps.values))


def shuffled_channels(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
    order = torch.rand(maps.values.shape[:2], generator=random).argsort(1)[:, :, None, None].expand_as(maps.values)
    return maps.with_values(maps.values.gather(1, order))


def gaussian(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
    """Vectors from a Gaussian of the maps' own mean and covariance, each location alone."""
    vectors = maps.values.movedim(1, -1)
    flat = vectors.flatten(0, 2).double()
    values, axes = torch.linalg.eigh(torch.cov(flat.T))
    noise = torch.randn(vectors.shape, generator=random, dtype=torch.float64) * values.clamp(min=0).sqrt()
    return maps.with_values((flat.mean(0) + noise @ axes.T).movedim(-1, 1))


def white(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
    return maps.with_values(torch.randn(maps.values.shape, generator=random) * maps.values.std() + maps.values.mean())


def concept_edits(maps: FeatureMap) -> dict[str, Edit]:
    """Backgrounds (each map's own strongest) and objects of the drawn world, turned down and up; none elsewhere."""
    concepts = load_concepts(concepts_file("tiny_cnn_concepts"))
    if concepts.source != maps.source:
        return {}

    def scaled(part: Callable[[Tensor], Tensor], factor: float) -> Edit:
        return lambda maps, random: maps.with_values(maps.values + (factor - 1) * part(concepts.parts(maps)))

    def background(parts: Tensor) -> Tensor:
        strongest = parts[: concepts.index("object")].norm(dim=2).mean((2, 3)).argmax(0)
        return parts[strongest, torch.arange(parts.shape[1])]

    def kept(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
        return edit(maps, concepts, [["object"]], 2.0, keep_length=True).changed

    named = {"background": background, "object": lambda parts: parts[concepts.index("object")]}
    chosen = {
        f"{name} x{factor:g}": scaled(part, factor) for name, part in named.items() for factor in (0.0, 0.25, 0.5, 2.0)
    }
    return chosen | {"object x2, length kept": kept}


def edits(pipeline: InversionPipeline, maps: FeatureMap) -> dict[str, Edit]:
    """label -> what is done to held-out maps."""
    side = pipeline.info.source.input_size

    def noise_pictures(maps: FeatureMap, random: torch.Generator) -> FeatureMap:
        coarse = torch.randn(len(maps), 3, 6, 6, generator=random)
        return pipeline.features(torch.sigmoid(2.5 * F.interpolate(coarse, side, mode="bicubic"))).to("cpu")

    chosen: dict[str, Edit] = concept_edits(maps)
    chosen |= {
        f"all x{factor:g}": lambda maps, random, factor=factor: maps.with_values(factor * maps.values)
        for factor in (0.5, 0.8, 1.25, 1.5)
    }
    chosen |= {
        f"mix {100 * (1 - w):.0f}/{100 * w:.0f}": lambda maps, random, w=w: interpolate(
            [maps, others(maps)], [1 - w, w]
        )
        for w in (0.1, 0.25, 0.5)
    }
    if not maps.source.pooled:
        chosen |= {"half/half splice": spliced, "locations shuffled": shuffled_locations}
    chosen |= {"channels shuffled": shuffled_channels, "Gaussian noise": gaussian, "white noise": white}
    return chosen | {"noise images": noise_pictures}


def auroc(inside: Tensor, edited: Tensor, seed: int = 0) -> dict:
    """The chance that an edited map scores higher than a held-out one (ties count half), with its 95 % bootstrap
    interval over both sets of maps: {"value", "low", "high"}."""
    a, b = (x.double().numpy() for x in (inside, edited))
    random = np.random.default_rng(seed)

    def area(x: np.ndarray, y: np.ndarray) -> float:  # roc_auc_score takes too long a thousand times
        x = np.sort(x)
        return float((np.searchsorted(x, y, "left") + np.searchsorted(x, y, "right")).mean() / (2 * len(x)))

    again = [area(random.choice(a, len(a)), random.choice(b, len(b))) for _ in range(DRAWS)]
    low, high = np.percentile(again, [2.5, 97.5])
    value = roc_auc_score([0] * len(a) + [1] * len(b), np.concatenate([a, b]))
    return {"value": float(value), "low": float(low), "high": float(high)}


def rank_correlation(a: Tensor, b: Tensor, seed: int = 0) -> dict:
    """Spearman's rank correlation of [N] values with its 95 % bootstrap interval: {"value", "low", "high", "n"}."""
    spearman = np.vectorize(lambda x, y: spearmanr(x, y).statistic, signature="(n),(n)->()")
    return bootstrap(a, b, statistic=lambda x, y, axis: spearman(x, y), draws=DRAWS, seed=seed)


def separation(scope: Scope, maps: dict[str, FeatureMap]) -> dict:
    """label -> AUROC of each statistic and of the score against the unedited maps, and the verdicts' shares."""
    reports = {label: scope.evaluate(batch) for label, batch in tqdm(maps.items(), desc="evaluating")}

    def columns(report: ScopeReport) -> dict[str, Tensor]:
        return {**report.surprise, "score": report.score}

    def verdicts(report: ScopeReport) -> dict[str, float]:
        return {name: report.verdict.count(name) / len(report.verdict) for name in VERDICTS}

    inside, separated = columns(reports[UNEDITED]), {}
    for label, report in reports.items():
        areas = (
            {name: auroc(inside[name], values) for name, values in columns(report).items()} if label != UNEDITED else {}
        )
        separated[label] = {"auroc": areas, "verdicts": verdicts(report)}
    return separated


def drawings(
    pipeline: InversionPipeline, scope: Scope, sampling: Sampling, maps: dict[str, FeatureMap], each: int, unedited: int
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """What the score says before rendering against the cycle cosine after it: (figures, label -> pictures [n, 3, h, w],
    label -> cosines [n])."""
    some = {label: batch.select(slice(0, unedited if label == UNEDITED else each)) for label, batch in maps.items()}
    target = concatenate([batch.with_values(batch.values) for batch in some.values()])
    with tqdm(total=len(target), desc="drawing", unit="image") as bar:
        drawn = pipeline.draw(target, sampling, pipeline.noise([0]).expand(len(target), -1, -1, -1), 32, bar.update)
    agreement = cosine(target, pipeline.extract(drawn).to("cpu"))
    score = scope.evaluate(target).score
    sizes = [len(batch) for batch in some.values()]
    directed = torch.cat([torch.full((n,), not label.startswith("all x")) for label, n in zip(some, sizes)])
    cosines, scores, pictures_of = (dict(zip(some, x.split(sizes))) for x in (agreement, score, drawn))
    figures = {
        "rank_correlation": {
            "all maps": rank_correlation(score, agreement),
            "all but scaled maps": rank_correlation(score[directed], agreement[directed]),
            "unedited maps": rank_correlation(scores[UNEDITED], cosines[UNEDITED]),
        },
        "cycle_cosine": {label: x.mean().item() for label, x in cosines.items()},
        "cycle_auroc": {label: auroc(-cosines[UNEDITED], -x) for label, x in cosines.items() if label != UNEDITED},
        "drawn": {"each edit": each, "unedited": unedited},
    }
    return figures, pictures_of, cosines


def figure(text: dict) -> str:
    return f"{text['value']:.2f} ({text['low']:.2f}-{text['high']:.2f})"


def to_markdown(results: dict) -> str:
    """The tables, and what they say in words."""
    statistics = list(next(r for r in results["separation"].values() if r["auroc"])["auroc"])
    head = ["edit", *statistics, "inside / at the edge / outside", "cycle cosine", "its AUROC"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, row in results["separation"].items():
        shares = " / ".join(f"{100 * row['verdicts'][name]:.0f}" for name in VERDICTS)
        areas = (
            [
                figure(row["auroc"][name]) if name == "score" else f"{row['auroc'][name]['value']:.2f}"
                for name in statistics
            ]
            if row["auroc"]
            else [""] * len(statistics)
        )
        cycle = figure(results["cycle_auroc"][label]) if label in results["cycle_auroc"] else ""
        lines.append(
            f"| {' | '.join([label, *areas, f'{shares} %', format(results['cycle_cosine'][label], '.2f'), cycle])} |"
        )
    scores = {label: row["auroc"]["score"]["value"] for label, row in results["separation"].items() if row["auroc"]}
    after = {label: x["value"] for label, x in results["cycle_auroc"].items()}
    missed = [
        f"{label} ({value:.2f}, after sampling {after[label]:.2f})" for label, value in scores.items() if value < 0.9
    ]
    harmless = [f"{label} ({value:.2f})" for label, value in after.items() if value < 0.6 and scores[label] >= 0.9]
    r = {
        name: f"{x['value']:.2f} (95 % interval {x['low']:.2f} to {x['high']:.2f}, n = {x['n']})"
        for name, x in results["rank_correlation"].items()
    }
    return f"""# Does the scope tell edited feature maps from real ones? ({results["model"]})

An edited feature map may be one that no image has. Its *scope* says so before the map is inverted. This page explains
the scope to users of the nodes and programs, and measures which edits it finds.

A weights file can hold statistics of held-out feature maps (`python training/fit_scope.py` adds them). They rate a map
as *inside*; *at the edge*, more unusual than 95 % of held-out maps; or *outside*, more unusual than 99 %. The rating is
that of the most unusual of four statistics:

- **direction** of each feature vector: its distance to the nearest of a bank of held-out ones;
- **magnitude**: its length;
- **distance** from the mean vector (Mahalanobis; both too near and too far count);
- **neighbours**: how well its eight neighbours predict it.

`python training/experiments/measure_scope.py --model {results["model"]}` evaluates {results["count"]} held-out maps of
{results["features"]}. None of them was used to fit the statistics. The columns of the table:

- *direction* to *neighbours*, and *score* (all four together): the AUROC, the probability that an edited map is more
  unusual than an unedited one. At 0.5 the two cannot be told apart.
- *inside / at the edge / outside*: how the edited maps are rated.
- *cycle cosine*: between the features of the reconstruction and the inverted map, and how well it tells edited maps
  from unedited ones (*its AUROC*): one seed, {results["drawn"]["each edit"]} maps of each edit and
  {results["drawn"]["unedited"]} unedited ones.

Intervals are 95 % bootstrap intervals.
{digests_text(results["digests"])}

{chr(10).join(lines)}

Edits that the score misses (AUROC below 0.9): {", ".join(missed) or "none"}.
If their reconstructions differ from the map, the cycle cosine finds them after sampling.

Edits that the score finds, but whose maps are inverted about as well as unedited ones (AUROC of the cycle cosine below
0.6): {", ".join(harmless) or "none"}.
The cosine ignores the length of vectors.

Spearman's rank correlation of the score with the cycle cosine (negative: a high score predicts a bad reconstruction):

{chr(10).join(f"- {name}: {text}" for name, text in r.items())}

![Unedited and edited maps: the scope at each location and the reconstruction](scope.webp)
"""


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__, gradient=0.0)
    parser.add_argument("--data", default="drawn", help='folder of images, or "drawn" for held-out scenes')
    parser.add_argument("--count", type=int, default=500, help="how many held-out maps")
    parser.add_argument("--drawn", type=int, default=24, help="how many maps of each edit are inverted")
    parser.add_argument("--unedited", type=int, default=200, help="how many unedited maps are inverted")
    parser.add_argument("--out", type=Path, default=Path("out/scope"))
    args = parser.parse_args(argv)
    if not 2 <= args.drawn <= args.count or not 2 <= args.unedited <= args.count:
        raise FeatInvError(f"--drawn {args.drawn}, --unedited {args.unedited}: expected 2 to --count {args.count}")
    scope = load_scope(model_file(args.model))
    if scope is None:
        raise FeatInvError(f"{args.model} holds no scope statistics; fit them with training/fit_scope.py")
    make_folder(args.out)
    pipeline, sampling = pipeline_from(args)
    held_out = concatenate(
        [pipeline.features(x).to("cpu") for x in pictures(pipeline, args.data, args.count, args.batch, FIRST)]
    )
    held_out = held_out.with_values(held_out.values)  # without the class token, which no edit keeps
    random = torch.Generator().manual_seed(0)
    maps = {UNEDITED: held_out}
    for label, change in tqdm(edits(pipeline, held_out).items(), desc="editing"):
        changed = change(held_out, random)
        maps[label] = changed.with_values(changed.values)
    separated = separation(scope, maps)
    figures, drawn, cosines = drawings(pipeline, scope, sampling, maps, args.drawn, args.unedited)
    results = {
        "model": args.model,
        "features": scope.source.describe(),
        "digests": pipeline.digests,
        "count": args.count,
        "separation": separated,
        **figures,
    }

    labels = [label for label in SHOWN if label in maps]
    reports = [scope.evaluate(maps[label].select(0)) for label in labels]
    rows = [[(heat_map(report.where / 100)[0], label) for label, report in zip(labels, reports)]]
    rows.append(
        [
            (drawn[label][0], f"{report.verdict[0]}, cos {cosines[label][0]:.2f}")
            for label, report in zip(labels, reports)
        ]
    )
    titles = ["share of held-out\nlocations that are\nless unusual:\ndark 0, bright 100 %", "reconstruction"]
    save_image(panel(rows, titles, f"{args.model}: one scene's map, edited"), args.out / "scope.webp")
    write_json(args.out / "results.json", results)
    text = to_markdown(results)
    write_text(args.out / "scope.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
