"""The tables of docs/evaluation.md, docs/photographs.md and docs/methods.md, each from the results.json of a run of
training/experiments/evaluation_page.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from featinv_nodes.core.weights import read_info
from featinv_nodes.worlds import model_file
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.photo import LITE2

from ..evaluation.context import ROUND_TRIP, UNCONDITIONAL
from ..evaluation.report import cell, rounded, set_measures
from ..evaluation.suites.base import INDEPENDENT
from ..evaluation.suites.corruptions import CLEAN, CORRUPTIONS
from ..evaluation.suites.guidances import PAPER, pair, paired_kids
from ..evaluation.suites.rcdm import COMPETITOR, NATIVE

#: measure -> its name in the page; of those with a longer name the beginning
WORDS = {
    "cosine": "cosine",
    "cosine_centred": "cosine, mean removed",
    "cosine_pooled": "cosine, pooled",
    "top1_match": "top-1 match",
    "top5_match": "top-5 match",
    "frechet_distance": "Frechet distance, biased at this n",
    "kid_paired": "paired KID",
}
#: pictures that the page shows, by run: name among its results, and beside the page
PANELS = {
    "layers": {"panel.png": "evaluation-layers.webp"},
    "rcdm": {"panel.png": "evaluation-rcdm.webp"},
    "cost": {"cost.png": "evaluation-cost.webp", "panel.png": "evaluation-settings.webp"},
}


def text_of(figures: dict, name: str, interval: bool = True) -> str:
    return cell(figures, name, interval).removesuffix(" biased")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def figures_by_condition(
    results: dict, conditions: Sequence[str], names: dict[str, str], interval: bool = True, what: str = "images of"
) -> list[str]:
    """A row per condition. names: heading -> measure."""
    return table(
        [what, *names],
        [
            [condition, *(text_of(results[condition], name, interval) for name in names.values())]
            for condition in conditions
        ],
    )


def named(figures: dict, prefix: str) -> str:
    """The one measure of sets that begins so, at the backbone's resolution."""
    return next(name for name in set_measures(figures) if name.startswith(prefix) and " pixels" not in name)


def models(results: dict) -> list[str]:
    """The conditions of the models that a suite compares."""
    return [condition for condition in results["sampling"] if condition not in (UNCONDITIONAL, COMPETITOR)]


def quality(results: dict) -> list[str]:
    conditions = {UNCONDITIONAL: UNCONDITIONAL, "tiny_cnn_last": "reconstruction", ROUND_TRIP: ROUND_TRIP}
    names = [
        "cosine",
        "cosine_centred",
        "top1_match",
        "top5_match",
        *(named(results[UNCONDITIONAL], kind) for kind in ("frechet_distance", "kid_paired")),
    ]
    rows = [
        [WORDS[name.split(" ")[0]], *(text_of(results[condition], name) for condition in conditions.values())]
        for name in names
    ]
    return [
        *table(["measure", *conditions], rows),
        f"The cosine closes {results['gap_closed']:.1%} of the gap between unconditional and round trip.",
    ]


def layers(results: dict) -> list[str]:
    conditions = [UNCONDITIONAL, *models(results), ROUND_TRIP]
    stages = {
        name.removeprefix("cosine "): name
        for name in results[UNCONDITIONAL]
        if name.startswith("cosine ") and not name.endswith("centred")
    }
    stages |= {"last": stages.pop("last")}  # the last column
    names = {
        "cosine, last layer": "cosine last",
        "top-1 match": "top1_match",
        "top-5 match": "top5_match",
        "paired KID": named(results[UNCONDITIONAL], "kid_paired"),
    }
    return [
        "Cosine at every stage:",
        "",
        *figures_by_condition(results, conditions, stages, False, "model"),
        *figures_by_condition(results, conditions, names, what="model"),
    ][:-1]


def layers_by_another(results: dict) -> list[str]:
    names = {
        "paired KID in the transformer's space": named(results[UNCONDITIONAL], "kid_paired"),
        "Frechet distance there, biased at this n": named(results[UNCONDITIONAL], "frechet_distance"),
    }
    return figures_by_condition(results, [UNCONDITIONAL, *models(results), ROUND_TRIP], names, what="model")[:-1]


def cross_model(results: dict) -> list[str]:
    evaluators = {short: backbone.name for short, backbone in DRAWN.backbones.items()}
    names = {
        f"{word} by {short}": f"{full}: {name}"
        for word, name in (("top-1", "top1_match"), ("cosine", "cosine"))
        for short, full in evaluators.items()
    }
    return figures_by_condition(results, [UNCONDITIONAL, *models(results), ROUND_TRIP], names)[:-1]


def rcdm(results: dict) -> list[str]:
    conditions = [UNCONDITIONAL, COMPETITOR, *models(results), ROUND_TRIP]
    lines = []
    for title, prefix in (
        ("At the backbone's 64 pixels:", ""),
        ("All images scaled to 32 pixels, RCDM's own:", NATIVE),
    ):
        names = {WORDS[name]: prefix + name for name in ("cosine", "cosine_pooled", "top1_match", "top5_match")}
        for kind in ("frechet_distance", "kid_paired"):
            names[WORDS[kind]] = next(
                name
                for name in set_measures(results[UNCONDITIONAL])
                if name.startswith(kind) and (" pixels" in name) == bool(prefix)
            )
        lines += [title, "", *figures_by_condition(results, conditions, names, what="model")]
    return lines[:-1]


def sweep(results: dict) -> list[str]:
    measure = "cosine_unpooled" if "cosine_unpooled" in results[UNCONDITIONAL] else "cosine"
    settings = results["settings"]
    rows = [
        [
            f"{s:g}",
            *(
                text_of(results[f"strength={s:g}, guidance={g:g}"], measure, False)
                for g in sorted(settings["guidances"])
            ),
        ]
        for s in sorted(settings["strengths"])
    ]
    return table(["strength", *(f"guidance {g:g}" for g in sorted(settings["guidances"]))], rows)[:-1]


def mixing(results: dict) -> list[str]:
    weights = sorted(results["settings"]["weights"])
    mixed = {
        name: text_of(results["composed"], f"cosine_{name}")
        for name in ("inside", "outside", "inside_with_other", "outside_with_other")
    }
    return [
        *table(
            ["share of the second map", "cosine with the combined map"],
            [[f"{w:g}", text_of(results[f"weight={w:g}"], "cosine")] for w in weights],
        ),
        "With the next scene's map in the middle quarter:",
        "",
        *table(
            ["cosine", "inside", "outside"],
            [
                ["with the requested map", mixed["inside"], mixed["outside"]],
                ["with the other scene's map", mixed["inside_with_other"], mixed["outside_with_other"]],
            ],
        ),
    ][:-1]


def variability(results: dict) -> list[str]:
    conditions = {UNCONDITIONAL: UNCONDITIONAL, results["model"]: "reconstruction"}
    words = {
        "variance of the pixels": "pixel_variance",
        "variance of the features, share of their squared length": "feature_variance",
    }
    rows = [
        [word, *(text_of(results[condition], name) for condition in conditions.values())]
        for word, name in words.items()
    ]
    return [f"{results['settings']['samples']} samples of each map:", "", *table(["", *conditions], rows)][:-1]


def corruptions(results: dict) -> list[str]:
    names, levels = ("cosine", "top1_match"), (1, 5)
    rows = [
        [
            kind.replace("_", " "),
            *(text_of(results[f"{kind} {level}"], name, False) for name in names for level in levels),
        ]
        for kind in CORRUPTIONS
    ]
    rows = [
        [condition, *(text for name in names for text in (text_of(results[condition], name, False), ""))]
        for condition in (CLEAN, UNCONDITIONAL)
    ] + rows
    return table(["corruption", "cosine, level 1", "level 5", "top-1 match, level 1", "level 5"], rows)[:-1]


def measures_of(results: dict) -> dict[str, str]:
    """Heading -> measure, of both evaluators and of the sets."""
    own, other = ("cosine", "top1_match"), (f"{INDEPENDENT}cosine", f"{INDEPENDENT}top1_match")
    return {
        "cosine": own[0],
        "by the transformer": other[0],
        "top-1 match": own[1],
        "match by the transformer": other[1],
        "paired KID": named(results[UNCONDITIONAL], "kid_paired"),
    }


def guidances(results: dict) -> list[str]:
    settings = results["settings"]
    features, texts = sorted(settings["guidances"]), sorted(settings["text_guidances"])
    head = ["features", *(f"text {t:g}" for t in texts), "against the same features without text"]
    lines = []
    for title, measure in (
        ("Cosine:", "cosine"),
        ("Cosine by the transformer:", f"{INDEPENDENT}cosine"),
        ("Paired KID:", named(results[UNCONDITIONAL], "kid_paired")),
    ):
        rows = [
            [
                f"{f:g}",
                *(
                    text_of(results.get(condition, {}), measure, False)
                    for condition in (*(pair(f, t) for t in texts), f"against text={f:g}")
                ),
            ]
            for f in features
        ]
        lines += [title, "", *table(head, rows)]
    return [
        *lines,
        *figures_by_condition(
            results,
            [UNCONDITIONAL, PAPER, *dict.fromkeys(results["best"].values()), ROUND_TRIP],
            measures_of(results),
            what="setting",
        ),
    ][:-1]


def cost(results: dict) -> list[str]:
    names, costs = measures_of(results), results["costs"]
    rows = [
        [
            condition,
            str(costs[condition]["evaluations"]),
            f"{costs[condition]['gmac']:.1f}",
            *(text_of(results[condition], name) for name in names.values()),
        ]
        for condition in costs
    ]
    return [
        *table(["setting", "passes", "GMAC", *names], rows),
        f"The cheapest within the interval of the highest cosine: {results['recommended']}.",
    ]


def methods(results: dict) -> list[str]:
    """What each method costs and gives."""
    paired = {f"({results['independent']}," in name: name for name in paired_kids(results[UNCONDITIONAL])}
    names = {
        "cosine": "cosine",
        "independent": f"{INDEPENDENT}cosine",
        "top-1 match": "top1_match",
        "top-5 match": "top5_match",
        "independent: top-1": f"{INDEPENDENT}top1_match",
        "paired KID": paired.get(False, ""),
        "independent: paired KID": paired.get(True, ""),
    }
    names = {word: name for word, name in names.items() if name in results[UNCONDITIONAL]}
    intervals = ("cosine", "independent", "paired KID", "independent: paired KID")
    rows = [
        [
            condition,
            str(cost["gradients"]),
            rounded(cost["gmac"], 3),
            rounded(cost["seconds"], 2),
            *(text_of(results[condition], name, word in intervals) for word, name in names.items()),
        ]
        for condition, cost in results["costs"].items()
    ]
    return table(["method", "gradients", "GMAC", "seconds", *names], rows)[:-1]


def photo_depths(results: dict) -> list[str]:
    """Each depth by its own layer's cosine, the match, and the independent backbone."""
    conditions, about = (
        [UNCONDITIONAL, *models(results), ROUND_TRIP],
        {name: read_info(model_file(name)).source for name in models(results)},
    )
    own = [f"cosine {about[condition].layer}" if condition in about else "" for condition in conditions]
    low, high = results[UNCONDITIONAL], results[ROUND_TRIP]
    rows = []
    for condition, measure in zip(conditions, own):
        cells = (
            [text_of(results[condition], measure), *(f"{edge[measure]['value']:.3f}" for edge in (low, high))]
            if measure
            else [""] * 3
        )
        way = (
            (results[condition][measure]["value"] - low[measure]["value"])
            / (high[measure]["value"] - low[measure]["value"])
            if measure
            else None
        )
        rest = (
            "cosine last",
            "top1_match",
            "top5_match",
            *(INDEPENDENT + name for name in ("cosine", "top1_match", "top5_match")),
        )
        kid = next(
            name for name in set_measures(results[condition]) if name.startswith("kid_paired") and LITE2.name in name
        )
        rows.append(
            [
                condition,
                *cells,
                "" if way is None else f"{way:.0%}",
                *(text_of(results[condition], name, False) for name in rest),
                text_of(results[condition], kid),
            ]
        )
    head = [
        "model",
        "cosine at its own layer",
        "unconditional",
        "round trip",
        "gap closed",
        "cosine, last layer",
        "top-1 match",
        "top-5 match",
        "independent: cosine",
        "top-1 match",
        "top-5 match",
        "paired KID in its space",
    ]
    return table(head, rows)[:-1]


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "quality": quality,
    "layers": layers,
    "layers-vit": layers_by_another,
    "cross-model": cross_model,
    "rcdm": rcdm,
    "sweep": sweep,
    "sweep-pooled": sweep,
    "mixing": mixing,
    "variability": variability,
    "variability-pooled": variability,
    "corruptions": corruptions,
    "guidances": guidances,
    "cost": cost,
    "methods": methods,
    "photo-methods": methods,
    "photo-depths": photo_depths,
    "photo-gradient": photo_depths,
    "photo-sweep": sweep,
}
