"""How the figures of studies look: read at a glance, in grey too, with legends beside the data and not on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jbn.studies.intervals import Interval


@dataclass(frozen=True)
class Look:
    """What tells a line from the others: each of the three would do.

    Attributes:
        colour: of Okabe and Ito, distinct for colour-blind readers.
        marker: of its points.
        line: its style.
    """

    colour: str
    marker: str
    line: Any


LOOKS = (
    Look("#000000", "o", "-"),
    Look("#0072B2", "s", (0, (5, 2))),
    Look("#D55E00", "^", "-"),
    Look("#56B4E9", "D", (0, (1, 1))),
    Look("#009E73", "v", (0, (6, 1, 1, 1))),
    Look("#CC79A7", "P", (0, (3, 1, 1, 1, 1, 1))),
    Look("#777777", "X", (0, (2, 2))),
)


def blank(title: str, note: str) -> tuple[Figure, Axes]:
    """Return a figure with a title, which says what is seen, and a note below it on what was done."""
    figure, (axes,) = panels(title, (note,))
    return figure, axes


def panels(title: str, notes: Sequence[str], *, columns: int = 1, height: float = 5.4) -> tuple[Figure, list[Axes]]:
    """Return a figure of several panels, each with a note above it; row by row, ``height`` in inches in all."""
    figure = Figure(figsize=(9, height), layout="constrained")
    listed = figure.subplots(len(notes) // columns, columns, squeeze=False).ravel().tolist()
    figure.suptitle(title, fontsize=12.5, x=0.01, ha="left")
    for axes, note in zip(listed, notes, strict=True):
        axes.set_title(note, fontsize="small", loc="left", color="0.3")
        axes.grid(color="0.4", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, listed


def draw_intervals(axes: Axes, places: Sequence[float], found: Sequence[Interval], look: Look, label: str) -> None:
    """Draw means as a line, and their intervals as bars."""
    means = [each.mean for each in found]
    ends = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
    axes.errorbar(places, means, ends, label=label, capsize=2.5, linewidth=1.4, markersize=6, elinewidth=1, **style)


def draw_bands(axes: Axes, places: Sequence[float], found: Sequence[Interval], look: Look, label: str) -> None:
    """Draw means as a line, with a marker here and there, and their intervals as a band: where bars would be dense."""
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
    every = max(1, len(places) // 8)
    axes.plot(places, [each.mean for each in found], label=label, linewidth=1.4, markevery=every, **style)
    low, high = ([getattr(each, end) for each in found] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)


def put_legend_beside(figure: Figure, axes: Axes) -> None:
    """Put the names of lines to the right of the data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=4)
