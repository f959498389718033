"""How the figures of studies look: read at a glance, in grey too, with legends beside the data and not on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from jbn.studies.intervals import Interval

WIDTH = 9  # inches of a figure
TITLE, NAME, NOTE = 12.5, 10, 8.5  # points of letters


@dataclass(frozen=True)
class Look:
    """What tells a line from the others: each of the first three would do.

    Attributes:
        colour: of Okabe and Ito, distinct for colour-blind readers.
        marker: of its points.
        line: its style.
        hollow: whether its points are white inside: some colours are one grey on paper.
    """

    colour: str
    marker: str
    line: Any
    hollow: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """What matplotlib draws a line and its points by."""
        inside = {"markerfacecolor": "white"} if self.hollow else {}
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line} | inside


LOOKS = (
    Look("#000000", "o", "-"),
    Look("#0072B2", "s", (0, (5, 2)), hollow=True),
    Look("#D55E00", "^", "-"),
    Look("#56B4E9", "D", (0, (1, 1))),
    Look("#009E73", "v", (0, (6, 1, 1, 1)), hollow=True),
    Look("#CC79A7", "P", (0, (3, 1, 1, 1, 1, 1)), hollow=True),
    Look("#777777", "X", (0, (2, 2)), hollow=True),
)
# What is in most studies looks the same in all of them.
OF_BATCH_NORM, OF_NONE, OF_LAYER_NORM = LOOKS[0], LOOKS[2], LOOKS[4]


def blank(title: str, note: str) -> tuple[Figure, Axes]:
    """Return a figure of one panel."""
    figure, (axes,) = panels(title, note, [""])
    return figure, axes


def panels(
    title: str,
    note: str,
    names: Sequence[str],
    *,
    columns: int | None = None,
    height: float = 5.4,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side.

    Args:
        title: what is seen; it is broken between words where it is long.
        note: what was done, in smaller letters below the panels.
        names: what stands above each panel, "" for nothing; broken as the title is.
        columns: how many panels a row has, all of them for None.
        height: inches; the width is 9, and 990 pixels in the file.
        sharex: whether all panels have the same axis of x.
        sharey: the same of y.

    Returns:
        The figure and its panels as they are read, row by row.
    """
    columns = columns or len(names)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    rows = -(-len(names) // columns)
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flatten()
    figure.suptitle(_wrap(title, TITLE), fontsize=TITLE, x=0.01, ha="left")
    figure.supxlabel(_wrap(note, NOTE), fontsize=NOTE, x=0.01, ha="left", color="0.3")
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(_wrap(name, NAME, 0.7 * WIDTH / columns), fontsize=NAME, loc="left")
        axes.grid(color="0.4", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(names) :]:
        axes.remove()
    return figure, [*grid[: len(names)]]


def _wrap(text: str, size: float, width: float = WIDTH) -> str:
    """Break lines that are longer than ``width`` inches in letters of this size; no % is left alone on a line."""
    letters = int(72 * width / (0.56 * size))  # as wide as those of sentences are in the font of matplotlib
    return "\n".join(fill(line, letters) for line in text.replace(" %", "\N{NO-BREAK SPACE}%").splitlines())


def draw_intervals(axes: Axes, places: Sequence[float], found: Sequence[Interval], look: Look, label: str) -> None:
    """Draw means as a line, and their intervals as bars."""
    means = [each.mean for each in found]
    ends = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
    widths: dict[str, Any] = {"linewidth": 1.4, "elinewidth": 1, "capsize": 2.5, "markersize": 6}
    axes.errorbar(places, means, ends, label=label, **widths, **look.style)


def draw_bands(axes: Axes, places: Sequence[float], found: Sequence[Interval], look: Look, label: str) -> None:
    """Draw means as a line, with a marker here and there, and their intervals as a band: where bars would be dense."""
    every = max(1, len(places) // 8)
    axes.plot(places, [each.mean for each in found], label=label, linewidth=1.4, markevery=every, **look.style)
    low, high = ([getattr(each, end) for each in found] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)


def draw_heat(axes: Axes, values: Sequence[Sequence[float]] | np.ndarray, form: str, span: tuple[float, float]) -> None:
    """Draw a matrix as cells that are lighter the larger their value is, each with its number; NaN is an empty cell.

    Args:
        axes: where; its ticks are the numbers of rows, from the top, and columns: ``set_xticks(range(3), names)``.
        values: (rows, columns).
        form: of the numbers, such as ".0%".
        span: the values of the darkest and of the lightest cell; those beyond look as these do.
    """
    numbers = np.asarray(values, float)
    image = axes.imshow(numbers, cmap="cividis", vmin=span[0], vmax=span[1], aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(numbers):
        if not np.isnan(value):
            dark = luminance(image.to_rgba(value)) < 0.18  # where black and white are as far from a colour
            colour = "white" if dark else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", fontsize="small", color=colour)


def name_places(axes: Axes, places: Sequence[float]) -> None:
    """Name those of these places that are in sight, and no others, on a logarithmic axis of y."""
    low, high = axes.get_ylim()
    seen = [place for place in places if low <= place <= high]
    axes.set_yticks(seen, [f"{place:g}" for place in seen])
    axes.yaxis.minorticks_off()


def luminance(colour: Any) -> float:
    """Return how bright a colour is, from 0 to 1, as WCAG defines it."""
    parts = np.asarray(to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def put_legend_beside(figure: Figure, *axes: Axes) -> None:
    """Put the names of lines to the right of the data, those of several panels once."""
    found = [pair for each in axes for pair in zip(*each.get_legend_handles_labels(), strict=True)]
    named = {label: handle for handle, label in reversed(found)}
    labels = sorted(named, key=[label for _, label in found].index)
    handles = [named[label] for label in labels]
    figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=4)
