"""Plots for reports, drawn by matplotlib without a display or its global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from featinv_nodes.core.errors import FeatInvError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, dict]  # x, and y as {"value", "low", "high"}


def curves(lines: Mapping[str, Sequence[Point]], crosses: Mapping[str, Point], title: str, x_label: str) -> Image.Image:
    """Lines of points with their intervals, and single points as black crosses."""

    def draw(axes: Axes) -> None:
        for name, points in lines.items():
            x, y = zip(*sorted(points, key=lambda point: point[0]))
            value, low, high = (np.array([entry[key] for entry in y]) for key in ("value", "low", "high"))
            axes.errorbar(x, value, [value - low, high - value], marker="o", markersize=4, linewidth=1.2, label=name)
        for name, (x, y) in crosses.items():
            axes.plot(x, y["value"], "kx", markersize=9, label=name)
        axes.set(title=title, xlabel=x_label, xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()

    return _figure(draw, 6.6, 4.2)


def matrix(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, digits: int = 2) -> Image.Image:
    """A matrix [rows, columns] as colours with its numbers, brighter where it is higher, as in the paper's Fig. 10."""

    def draw(axes: Axes) -> None:
        axes.imshow(values, "viridis", aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(title)
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values.numpy()):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=colour)

    return _figure(draw, 2 + 0.8 * len(columns), 1 + 0.45 * len(rows))


def bars(labels: Sequence[str], values: Sequence[dict], groups: Sequence[str], title: str) -> Image.Image:
    """A horizontal bar per label with its interval, the first on top, in one colour for each group."""
    kinds = list(dict.fromkeys(groups))

    def draw(axes: Axes) -> None:
        for kind in kinds:
            rows = [n for n, group in enumerate(groups) if group == kind]
            value, low, high = (
                np.array([values[n]["value" if values[n][key] is None else key] for n in rows])
                for key in ("value", "low", "high")
            )
            axes.barh(rows, value, xerr=[value - low, high - value], label=kind)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(title=title, ylim=(len(labels) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.legend()

    return _figure(draw, 8.0, 1 + 0.28 * len(labels))


def _figure(draw: Callable[[Axes], None], width: float, height: float) -> Image.Image:
    """What `draw` puts on one pair of axes, as an RGB picture; width and height in inches of 100 pixels."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FeatInvError("matplotlib is missing: pip install -r training/requirements.txt") from error
    figure = Figure((width, height), layout="constrained")
    draw(figure.add_subplot())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
