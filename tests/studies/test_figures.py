"""Figures of studies: nothing is cut off, panels are named, and the numbers in cells can be read."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from jbn.studies.figures import LOOKS, draw_heat, draw_intervals, luminance, panels, put_legend_beside
from jbn.studies.intervals import interval

LONG = "A network with batch normalization needs fewer steps than one without it, whatever its depth may be, " * 2


def test_long_titles_and_notes_stay_in_the_picture():
    figure, (axes,) = panels(LONG, LONG * 2, [""])
    axes.plot([1, 2])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for text in (figure._suptitle, figure._supxlabel):
        where = text.get_window_extent()
        assert 0 <= where.x0 < where.x1 <= figure.bbox.width
        assert where.width > figure.bbox.width / 2


def test_panels_are_read_row_by_row_and_share_one_legend():
    figure, found = panels("t", "n", ["a", "b", "c"], columns=2, sharey=True)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b", "c"]
    assert figure.axes == found
    for axes, labels in zip(found, [("x",), ("x", "y"), ("y",)], strict=True):
        for label in labels:
            draw_intervals(axes, [1, 2], [interval([0.0, 1.0])] * 2, LOOKS["xy".index(label)], label)
    put_legend_beside(figure, *found)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y"]


def test_numbers_in_cells_stand_out_in_grey():
    _, (axes,) = panels("t", "n", [""])
    values = np.linspace(-0.1, 1.1, 30).reshape(5, 6)
    values[0, 0] = np.nan
    draw_heat(axes, values, ".0%", (0, 1))
    assert [text.get_text() for text in axes.texts] == [f"{value:.0%}" for value in values.ravel()[1:]]
    (image,) = axes.images
    for text, value in zip(axes.texts, values.ravel()[1:], strict=True):
        lights = sorted([luminance(text.get_color()), luminance(to_rgb(image.to_rgba(value)))])
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5  # WCAG AA
