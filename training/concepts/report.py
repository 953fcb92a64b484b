"""What measure_concepts.py found, as JSON, Markdown, HTML and an image."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.metrics import FEW, bootstrap
from featinv_nodes.core.pictures import heat_map, spotlight
from featinv_nodes.core.viz import LEAST, MOST, Visualization, affected, normalised

from ..files import write_json, write_text
from ..report import FEW_NOTE, Cell, digests_text, figure_text, page, panel, save_image
from .localisation import auroc, best_threshold, boundary_f, iou, measures

TITLE = "Does FeatInv-Viz show the right pixels?"
VIZ, CLOSED, BAR = "FeatInv-Viz", "FeatInv-Viz, closed loop", "occlusion of the concept"
COLUMNS = ("AUROC", "IoU", "IoU at 0.33", "pointing", "boundary F", "boundary F at 0.33", "deletion", "insertion")
SLOPES = (
    "slope",
    "slope, median",
    "within range",
    "other concepts",
    "unedited",
    "times seeds alone",
    "logit predicted",
    "logit actual",
    "logit correlation",
)
Table = list[list[str]]


@dataclass
class Trial:
    """One concept in one scene. kind: "object" or "background", name: the concept. picture: [3, H, W]. mask: [H, W]
    bool, its true pixels.
    heats: method -> heat map [H, W]. curves: method -> (deletion, insertion). visualization: FeatInv-Viz at the asked
    factor and, on the first track, in closed loop. logit: for each of these the (predicted, actual) change of the top
    logit of the concept's label group.
    """

    kind: str
    name: str
    picture: Tensor
    mask: Tensor
    heats: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, tuple[float, float]] = field(default_factory=dict)
    visualizations: dict[str, Visualization] = field(default_factory=dict)
    logit: dict[str, tuple[float, float]] = field(default_factory=dict)


def localise(trials: Sequence[Trial], validation: int) -> dict[str, dict[str, dict]]:
    """method -> measure -> {"value", "low", "high", "n"}, over the trials of the first scenes; each method's
    thresholds are those with the best IoU and the best boundary F on the last `validation` ones."""
    reported, chosen = trials[: len(trials) - validation], trials[len(trials) - validation :]
    figures = {}
    for method in trials[0].heats:
        heats, masks = [t.heats[method] for t in chosen], [t.mask for t in chosen]
        thresholds = best_threshold(heats, masks, iou), best_threshold(heats, masks, boundary_f)
        rows = [measures(t.heats[method], t.mask, *thresholds) for t in reported]
        for row, trial in zip(rows, reported):
            row["deletion"], row["insertion"] = trial.curves[method]
        figures[method] = {name: bootstrap(torch.tensor([row[name] for row in rows])) for name in COLUMNS}
        figures[method] |= {
            "threshold for IoU": {"value": thresholds[0]},
            "threshold for boundary F": {"value": thresholds[1]},
        }
    return figures


def faithful(trials: Sequence[Trial]) -> dict[str, dict[str, dict]]:
    """method -> what its slopes and logits came to, each with an interval where it is a mean."""
    figures = {}
    for method in trials[0].visualizations:
        slopes = [t.visualizations[method].slope for t in trials]
        own = torch.tensor([s.own for s in slopes])
        logits = torch.tensor([t.logit[method] for t in trials])
        nulls = [s.null for s in slopes if s.null is not None]
        figures[method] = {
            "slope": bootstrap(own),
            "slope, median": {"value": own.median().item()},
            "within range": bootstrap(torch.tensor([float(s.passed) for s in slopes])),
            "other concepts": bootstrap(torch.tensor([s.others for s in slopes])),
            "unedited": bootstrap(torch.tensor([s.untouched for s in slopes])),
            "times seeds alone": {"value": torch.tensor(nulls).median().item() if nulls else float("nan")},
            "logit predicted": bootstrap(logits[:, 0]),
            "logit actual": bootstrap(logits[:, 1]),
            "logit correlation": {"value": torch.corrcoef(logits.T)[0, 1].item() if len(logits) > 2 else float("nan")},
            "commanded": {"value": torch.tensor([t.visualizations[method].commanded for t in trials]).mean().item()},
        }
    return figures


def as_table(figures: dict[str, dict[str, dict]], columns: Sequence[str], head: str) -> Table:
    """Rows of texts, the first the head."""
    rows = [[head, *columns]]
    for method, row in figures.items():
        rows.append([method, *(_entry(row[name]) for name in columns)])
    return rows


def _entry(value: dict) -> str:
    return figure_text(value, 2) if "low" in value else f"{value['value']:.2f}"


def verdicts(kind: str, located: dict, true: dict, asked: float) -> list[str]:
    """What the figures say of FeatInv-Viz, whichever way they fall."""
    low, high = 1 - MOST * (1 - asked), 1 - LEAST * (1 - asked)
    lines = []
    for method, row in true.items():
        value = row["slope"]["value"]
        lines.append(
            f"{kind}, {method}: mean slope {value:.2f} for factor {asked:g},"
            f" {'inside' if low <= value <= high else 'OUTSIDE'} {low:.2f} to {high:.2f};"
            f" {row['within range']['value']:.0%} of the images inside."
        )
    for method in true:
        own, bar = located[method]["boundary F"], located[BAR]["boundary F"]
        known = own["low"] is not None  # one picture has no interval
        above, below = known and own["low"] > bar["high"], known and own["high"] < bar["low"]
        word = "above" if above else "below" if below else "not told apart from"
        lines.append(f"{kind}, {method}: boundary F {own['value']:.2f}, {word} that of occlusion, {bar['value']:.2f}.")
    return lines


def cases(trials: Sequence[Trial]) -> tuple[list[list[Cell]], list[str]]:
    """The trials whose FeatInv-Viz is the best, the median and the worst by AUROC, in pictures."""
    ranked = sorted(trials, key=lambda t: -auroc(t.heats[VIZ], t.mask))
    rows, titles = [], []
    for word, trial in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        visualization = trial.visualizations.get(CLOSED, trial.visualizations[VIZ])
        rows.append(
            [
                (trial.picture, trial.name),
                (trial.mask.float().expand(3, -1, -1), "true mask"),
                (visualization.original[0], "reconstruction"),
                (visualization.changed[0], "attenuated"),
                (_heat(trial.heats[VIZ]), f"AUROC {auroc(trial.heats[VIZ], trial.mask):.2f}"),
                (
                    spotlight(visualization.original[0], affected(visualization.distance)),
                    f"slope {visualization.slope.own:.2f}",
                ),
                (_heat(trial.heats["activation, enlarged"]), "activation"),
                (_heat(trial.heats[BAR]), "occlusion"),
            ]
        )
        titles.append(f"{trial.kind},\n{word}")
    return rows, titles


def _heat(values: Tensor) -> Tensor:
    return heat_map(normalised(values)[None])[0]


def markdown(table: Table) -> str:
    rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([rows[0], "|" + "---|" * len(table[0]), *rows[1:]])


def as_html(table: Table) -> str:
    rows = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(table), table)
    ]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def write_report(out: Path, about: dict, trials_of: dict[str, list[Trial]]) -> str:
    """Writes everything to `out` and returns the Markdown. trials_of: the trials of each track, scenes in order."""
    results, lines, body, rows, titles = (
        {**about},
        [f"# {TITLE}", "", summary(about), ""],
        [],
        [],
        [],
    )
    for track, trials in trials_of.items():
        results[track] = {}
        for kind in ("object", "background"):
            own = [t for t in trials if t.kind == kind]
            reported = own[: about["count"]]
            located, true = localise(own, about["validation"]), faithful(reported)
            results[track][kind] = {"localisation": located, "faithfulness": true}
            tables = [as_table(located, COLUMNS, f"{track}: {kind}"), as_table(true, SLOPES, "effect of the edit")]
            said = verdicts(kind, located, true, about["factor"])
            lines += [
                f"## {track}: {kind}",
                "",
                *(f"- {line}" for line in said),
                "",
                markdown(tables[0]),
                "",
                markdown(tables[1]),
                "",
            ]
            body += [
                f"<h2>{track}: {kind}</h2><ul>{''.join(f'<li>{html.escape(x)}</li>' for x in said)}</ul>",
                *map(as_html, tables),
            ]
            more, words = cases(reported)
            rows, titles = rows + more, titles + [f"{track}:\n{word}" for word in words]
        lines += [f"- {note}" for note in about["notes"][track]] + [""]
    picture = panel(rows, titles, "FeatInv-Viz: best, median and worst case by AUROC")
    save_image(picture, out / "panel.webp")
    write_json(out / "results.json", results)
    text = "\n".join(lines) + "\n![best, median and worst cases](panel.webp)\n"
    write_text(out / "report.md", text)
    write_text(out / "index.html", page(TITLE, picture, [summary(about)], "".join(body)))
    return text


def summary(about: dict) -> str:
    return (
        f"{about['count']} held-out scenes, {about['seeds']} seeds, concepts multiplied by {about['factor']:g};"
        f" {about['source']}. Means with 95 % bootstrap intervals; thresholds chosen on {about['validation']} further"
        f" scenes. Low is good for deletion, high for everything else. {digests_text(about['digests'])}"
        + (f" {FEW_NOTE}" if about["count"] < FEW else "")
    )
