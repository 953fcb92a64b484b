"""results.json, report.md and index.html of an evaluation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..files import write_json, write_text
from ..report import FEW_NOTE, figure_text, page, save_image
from ..report import panel as draw_panel
from .metrics import mean_entry, set_entries
from .shards import Table, room

Figures = dict[str, dict]  # measure -> {"value", "low", "high", "n", ...}


@dataclass
class Grid:
    """A table of a report: cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Report:
    """What a suite found. figures: condition -> figures, for results.json. extra: further entries there. panels: file
    name -> picture, the first one also the page's."""

    title: str
    figures: dict[str, Figures]
    grids: list[Grid] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    extra: dict = field(default_factory=dict)
    panels: dict[str, Image.Image] = field(default_factory=dict)


def figures_of(table: Table, originals: Table) -> Figures:
    """Means of a condition's columns over the pictures, and the distances of its pictures as a set from the originals,
    or from the set that the condition recorded as its own reference."""
    names = sorted(table.columns, key=lambda name: (not name.startswith("cosine"), not name.startswith("top"), name))
    figures = {name: mean_entry(table.columns[name]) for name in names if table.columns[name].ndim == 1}
    for name, vectors in table.columns.items():
        if name.startswith("vectors/"):
            space = name.removeprefix("vectors/")
            reference = table.columns.get(f"reference/{space}", originals.columns.get(name))
            figures |= set_entries(space, reference, vectors)
    return {name: entry for name, entry in figures.items() if entry["n"]}


def cell(figures: Figures, name: str, interval: bool = True) -> str:
    """A figure as text, with its interval."""
    if name not in figures:
        return ""
    entry = figures[name]
    digits = 4 if name.startswith("kid") or "variance" in name else 3
    text = figure_text(entry, digits) if interval else f"{entry['value']:.{digits}f}"
    return text + (" biased" if entry.get("biased") else "")


def rounded(value: float, digits: int) -> str:
    """A number with so many digits that count: 1230, 0.0282."""
    return f"{float(f'{value:.{digits}g}'):g}"


def by_measure(title: str, figures: dict[str, Figures], columns: Sequence[str]) -> Grid:
    """A row per measure, a column per condition."""
    names = list(dict.fromkeys(name for condition in columns for name in figures[condition]))
    rows = [[name, *(cell(figures[condition], name) for condition in columns)] for name in names]
    return Grid(title, ["measure", *columns], rows, marks({condition: figures[condition] for condition in columns}))


def by_condition(
    title: str, figures: dict[str, Figures], conditions: Sequence[str], names: Sequence[str], what: str = ""
) -> Grid:
    """A row per condition, a column per measure."""
    names = [name for name in names if any(name in figures[condition] for condition in conditions)]
    rows = [[condition, *(cell(figures[condition], name) for name in names)] for condition in conditions]
    return Grid(
        title,
        [what, *names],
        rows,
        marks(
            {
                condition: {n: figures[condition][n] for n in names if n in figures[condition]}
                for condition in conditions
            }
        ),
    )


def set_measures(figures: Figures) -> list[str]:
    """The names of a condition's figures of sets: Frechet distances, KID and paired KID."""
    return [name for name in figures if name == "fid" or name.startswith(("frechet_distance", "kid"))]


def paired_kids(figures: Figures) -> list[str]:
    """The names of a condition's paired KIDs, by which settings are chosen."""
    return [name for name in figures if name.startswith("kid_paired")]


def marks(figures: dict[str, Figures]) -> str:
    """What the marks beside a table's figures mean; "" where there are none."""
    entries = [entry for of_condition in figures.values() for entry in of_condition.values()]
    lines = []
    if any(entry.get("biased") for entry in entries):
        lines.append(
            "Biased: a Frechet distance of so few images is too large, by as much as depends on their number; compare"
            " it at equal n, or read KID."
        )
    if any(entry.get("few") for entry in entries):
        lines.append(FEW_NOTE[0].upper() + FEW_NOTE[1:])
    return " ".join(lines)


def condition_panel(
    tables: dict[str, Table],
    conditions: Sequence[str],
    heading: str,
    scored: str | Mapping[str, str] = "cosine",
    most: int | None = None,
) -> Image.Image:
    """A panel with a row of pictures per condition, `most` of them, with the column `scored` under each where the
    condition has it; scored: one column for all, or each condition's own."""
    rows = []
    for condition in conditions:
        column = scored if isinstance(scored, str) else scored.get(condition, "")
        pictures, values = tables[condition].pictures[:most], tables[condition].columns.get(column)
        rows.append([(x, "" if values is None else f"cos {values[k]:.2f}") for k, x in enumerate(pictures)])
    return draw_panel(rows, [condition.replace(", ", ",\n") for condition in conditions], heading)


def to_markdown(report: Report, notes: Sequence[str], made: Sequence[Grid] = ()) -> str:
    """made: how the figures were made, the last tables."""
    lines = [f"# {report.title}", ""]
    for grid in (*report.grids, *made):
        lines += [f"## {grid.title}", "", _row(grid.header), "|" + "---|" * len(grid.header), *map(_row, grid.rows), ""]
        lines += [grid.note, ""] if grid.note else []
    lines += [text for line in [*report.lines, *notes] for text in (line, "")]
    lines += [text for name in report.panels for text in (f"![{Path(name).stem}]({name})", "")]
    return "\n".join(lines)


def to_html(report: Report, notes: Sequence[str], made: Sequence[Grid] = ()) -> str:
    """One page with all pictures inside it. made: how the figures were made, the last tables."""
    body = ""
    for grid in (*report.grids, *made):
        head = "".join(f"<th>{html.escape(text)}</th>" for text in grid.header)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in grid.rows)
        body += f"<h2>{html.escape(grid.title)}</h2><table><tr>{head}</tr>{rows}</table><p>{html.escape(grid.note)}</p>"
    return page(report.title, _stack(list(report.panels.values())), [*report.lines, *notes], body)


def how_made(about: dict) -> list[Grid]:
    """Number of pictures, data, seeds, sampling, digests and command of a report, from the entries of its
    results.json: a table of what holds for all conditions, and of what differs between them."""
    sampling = about.get("sampling", {})
    fields = list(dict.fromkeys(name for one in sampling.values() for name in one))  # methods differ in what they have
    differing = [name for name in fields if len({str(one.get(name, "")) for one in sampling.values()}) > 1]
    common = ", ".join(
        f"{name} {sampled[name]}" for sampled in list(sampling.values())[:1] for name in fields if name not in differing
    )
    rows = {
        "n": f"{about['count']} image{'s' * (about['count'] != 1)}",
        "data": about.get("data"),
        "seeds": about.get("seeds"),
        "sampling": common,
        "sets": about.get("sets"),
        "digests": ", ".join(f"{name} {value}" for name, value in about.get("digests", {}).items()),
        "command": about.get("command"),
    }
    grids = [Grid("How the figures were made", ["", ""], [[name, str(value)] for name, value in rows.items() if value])]
    if differing:
        own = [[condition, *(str(one.get(name, "")) for name in differing)] for condition, one in sampling.items()]
        grids.append(Grid("Sampling that differs", ["condition", *differing], own))
    return grids


def write(folder: Path, report: Report, about: dict, notes: Sequence[str]) -> str:
    """Writes the report's files, each whole or not at all; returns the Markdown text. about: entries of results.json
    beside the figures."""
    made = how_made(about)
    text = to_markdown(report, notes, made)
    with room(folder):
        for name, image in report.panels.items():
            save_image(image, folder / name)
        write_json(folder / "results.json", about | {"notes": list(notes)} | report.extra | report.figures)
        write_text(folder / "report.md", text)
        write_text(folder / "index.html", to_html(report, notes, made))
    return text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def _stack(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, on white."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet
