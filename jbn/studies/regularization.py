"""``regularization``: whether the noise of batch statistics regularizes, and what it leaves to dropout."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jbn.studies.figures import (
    LOOKS,
    OF_BATCH_NORM,
    OF_NONE,
    draw_intervals,
    name_places,
    panels,
    put_legend_beside,
)
from jbn.studies.intervals import (
    Interval,
    choose_rate,
    decide,
    interval,
    note_edges,
    open_at_edges,
    points,
    say_better,
    say_half,
)
from jbn.studies.networks import BatchNorm, Bias, Dense, Dropout, Norm
from jbn.studies.regularization_claims import (
    CLAIMS,
    ROWS,
    SAME,
    USUAL,
    best_dropout,
    best_group,
    better,
    find,
    groups_of,
)
from jbn.studies.study import Cell, Measured, Numbers, Settings, Sheet, Size, Study, Summary, Verdict
from jbn.studies.training import CLASSES, PIXELS, Plan, accuracies, note_diverged, sweep

DATA = "digits"
WIDTHS = (PIXELS[DATA], 128, 128, CLASSES)
MOMENTUM = 0.9  # the rate falls to 0, so at the end the running statistics are those of the last networks
SEEN = ("training", "validation", "test", "diverged")
UNDECIDED: Verdict = "not decided within the intervals"


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        group: rows by whose statistics they are normalized, 0 for a bias alone.
        dropout: the share of features that is dropped after each activation.
    """

    group: int
    dropout: float

    @property
    def name(self) -> str:
        """As the table and the files of cells have it."""
        dropped = [f"drop {self.dropout}"] if self.dropout else []
        return " + ".join(([f"bn {self.group}"] if self.group else []) + dropped) or "none"


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: groups, shares dropped, shares of labels that are noise, seeds, rates, steps."""

    groups: tuple[int, ...]
    dropouts: tuple[float, ...]
    noises: tuple[float, ...]
    seeds: int
    rates: int
    steps: int


EXTENTS: dict[str, Extent] = {
    "quick": Extent((USUAL, ROWS), (0.5,), (0.4,), 2, 2, 4),
    "default": Extent((2, 4, 8, 20, USUAL, ROWS), (0.2, 0.5), (0.0, 0.4), 10, 4, 150),
    "full": Extent((2, 4, 8, 20, USUAL, 100, ROWS), (0.1, 0.2, 0.5), (0.0, 0.2, 0.4), 20, 7, 600),
}


def arms_of(extent: Extent) -> list[Arm]:
    """Return what is compared at a size."""
    alone = [Arm(group, 0.0) for group in (*extent.groups, 0)]
    return alone + [Arm(group, dropout) for group in (0, USUAL) for dropout in extent.dropouts]


def rates_of(extent: Extent, noise: float) -> list[float]:
    """Return the grid of a share of noise, for every arm: where labels are noise, less learning is better."""
    lowest, highest = (0.2, 12.8) if noise == 0 else (0.0125, 0.8)
    return [round(rate, 6) for rate in np.geomspace(lowest, highest, extent.rates).tolist()]


def cells(size: Size) -> list[Cell]:
    """Return a cell for each arm and share of noise."""
    extent = EXTENTS[size]
    return [
        Cell(
            f"{arm.name.replace(' ', '')}-{noise}",
            asdict(arm)
            | {"noise": noise, "rates": rates_of(extent, noise), "seeds": extent.seeds, "steps": extent.steps},
        )
        for noise in extent.noises
        for arm in arms_of(extent)
    ]


def norm_of(arm: Arm) -> Norm:
    """Return the normalization of an arm."""
    group = arm.group if arm.group < ROWS else None
    norm: Norm = BatchNorm(MOMENTUM, group_size=group) if arm.group else Bias()
    return Dropout(norm, arm.dropout) if arm.dropout else norm


def measure(settings: Settings) -> Numbers:
    """Return accuracies (seeds, rates) on the rows of each part, and which diverged."""
    network = Dense(WIDTHS, norm_of(Arm(settings["group"], settings["dropout"])))
    examples = ROWS * settings["steps"]
    plan = Plan(tuple(settings["rates"]), settings["seeds"], ROWS, examples, DATA, ROWS, settings["noise"])
    found = sweep(network, plan, {"": accuracies(network)})[""]._asdict()
    return {name: found[name][..., -1] for name in SEEN}


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each arm and share of noise the rate that validation rows chose, and what is seen of it."""
    settings = [each.settings for each in measured]
    return {
        "noises": sorted({each["noise"] for each in settings}),
        "seeds": settings[0]["seeds"],
        "steps": settings[0]["steps"],
        "rates": len(settings[0]["rates"]),
        "arms": [_summarize(each.settings, each.numbers) for each in measured],
    }


def _summarize(settings: Settings, numbers: Numbers) -> dict[str, Any]:
    validation = np.asarray(numbers["validation"], float)
    chosen = choose_rate(validation)
    training, test, diverged = (
        np.asarray(numbers[name], float)[:, chosen.index] for name in ("training", "test", "diverged")
    )
    return {
        "arm": Arm(settings["group"], settings["dropout"]).name,
        **{name: settings[name] for name in ("group", "dropout", "noise")},
        "rate": settings["rates"][chosen.index],
        "edge": chosen.edge,
        "diverged": int(diverged.sum()),
        "validation": round(float(validation[:, chosen.index].mean()), 6),
        "training": _round(training),
        "test": _round(test),
        "gap": _round(training - test),
    }


def _round(values: np.ndarray) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows and gaps, a row per arm, two columns per share of noise."""
    names = list(dict.fromkeys(row["arm"] for row in summary["arms"]))
    found = {(row["arm"], row["noise"]): row for row in summary["arms"]}
    heading = [f"{what} {noise:.0%}" for noise in summary["noises"] for what in ("rate", "test", "gap")]
    rows = [(name, *(text for noise in summary["noises"] for text in _texts(found[name, noise]))) for name in names]
    notes = [
        f"Rate: the best of {summary['rates']} by validation rows; test: accuracy (%) on test rows; gap: the accuracy "
        "on training rows, with the labels that training saw, less that (below 0 where noise among these labels is not "
        f"learned: test labels have none); each with its 95 % interval over {summary['seeds']} seeds (Student's t). "
        f"Beside them, the share of the {ROWS} training labels that are drawn anew.",
        f"bn: batch norm by the statistics of so many rows of the whole batch of {ROWS} ({USUAL}: near a usual batch "
        "of 32); drop: dropout of this share after each activation; none: a bias alone. "
        f"{summary['steps']} steps. Where labels are noise a low rate regularizes too, and any arm may have it.",
    ]
    at = {id(row): f"{row['arm']} at {row['noise']:.0%}" for row in summary["arms"]}
    notes += note_edges((at[id(row)], row["edge"]) for row in summary["arms"])
    notes += note_diverged((at[id(row)], row["diverged"]) for row in summary["arms"])
    return Sheet(("arm", *heading), tuple(rows), tuple(notes))


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    return f"{row['rate']:g}", *(say_half(interval(row[what])) for what in ("test", "gap"))


def draw(summary: Summary) -> Figure:
    """Draw errors against the group, a panel per share of noise."""
    noises = sorted({min(summary["noises"]), max(summary["noises"])})
    note = (
        f"{ROWS} of the digits to train with, in one batch, two hidden layers of 128, {summary['steps']} steps; mean, "
        f"95 % interval of {summary['seeds']} seeds; each arm at its best rate, dropout at its best share on "
        f"validation rows. {_by_seeds(summary)}A level line is an arm without groups, drawn across all of them"
    )
    figure, grid = panels(_title(summary), note, [_labels(noise) for noise in noises], height=5)
    for axes, noise in zip(grid, noises, strict=True):
        groups, best = groups_of(summary, noise), best_group(summary, noise)
        sizes = [row["group"] for row in groups]
        levels = {
            "no normalization": (find(summary, noise, 0), OF_NONE),
            f"{_dropped(summary, 0)},\nno normalization": (best_dropout(summary, noise, 0), LOOKS[1]),
        }
        draw_intervals(axes, sizes, [_errors(row) for row in groups], OF_BATCH_NORM, "batch norm by groups")
        dropped, label = best_dropout(summary, noise, USUAL), f"groups of {USUAL},\n{_dropped(summary, USUAL)}"
        # Beside the mark of the same group, so that neither interval hides the other.
        draw_intervals(axes, [USUAL * 1.15], [_errors(dropped)], replace(LOOKS[3], line="none"), label)
        for number, (label, (row, look)) in enumerate(levels.items(), 1):
            # Side by side at both ends, so that in grey, too, each interval is seen to be that of its line.
            draw_intervals(axes, [sizes[0] / 1.4**number, sizes[-1] * 1.4**number], [_errors(row)] * 2, look, label)
        ring: dict[str, Any] = {"markersize": 14, "markerfacecolor": "none", "color": "0.3"}
        axes.plot([best["group"]], [_errors(best).mean], "o", label="ring: best on\nvalidation rows", **ring)
        axes.set(xscale="log", yscale="log", xlabel="rows of a group")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        name_places(axes, (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 90))
    grid[0].set_ylabel("errors on test rows (%), logarithmic")
    put_legend_beside(figure, *grid)
    return figure


def _dropped(summary: Summary, group: int) -> str:
    """Return which share of features is dropped in the best arms of a group, each share once."""
    noises = min(summary["noises"]), max(summary["noises"])
    return (
        f"dropout {' and '.join(dict.fromkeys(str(best_dropout(summary, each, group)['dropout']) for each in noises))}"
    )


def _by_seeds(summary: Summary) -> str:
    """Return what bars beside each other do not show: the differences seed by seed, and which are not decided."""
    told, both = [], []
    for noise in sorted({min(summary["noises"]), max(summary["noises"])}):
        best, none = best_group(summary, noise), find(summary, noise, 0)
        by = open_at_edges(*better(best, none))
        ours, theirs = _errors(best), _errors(none)
        if decide(by, least=0) != UNDECIDED and ours.low < theirs.high and theirs.low < ours.high:
            told.append(
                f"With {_labels(noise)} bars of ring and no normalization overlap, but seed by seed the difference is "
                f"{_say_size(better(best, none)[0])}. "
            )
        dropped, edges = better(*(best_dropout(summary, noise, group) for group in (USUAL, 0)))
        is_open = decide(open_at_edges(dropped, edges), least=0) == UNDECIDED
        both.append(f"{_labels(noise)}, {say_better(dropped)}{' (undecided)' * is_open}")
    beside = f"Groups of {USUAL} against no normalization, both with dropout, in accuracy"
    return f"{''.join(told)}{beside}: with {'; with '.join(both)}. "


def _say_size(by: Interval) -> str:
    ends = sorted(map(abs, (by.low, by.high)))
    return f"{points(abs(by.mean))} ({points(ends[0])} to {points(ends[1])})"


def _labels(noise: float) -> str:
    return f"{100 * noise:.0f} % of labels drawn at random" if noise else "clean labels"


def _title(summary: Summary) -> str:
    """Return whether batch norm in its best groups beats none, with the errors of both, and those with dropout."""
    found: list[str] = []
    dropped: dict[int, list[str]] = {USUAL: [], 0: []}
    for noise in sorted({min(summary["noises"]), max(summary["noises"])}):
        best, none = best_group(summary, noise), find(summary, noise, 0)
        ours, theirs = (f"{_errors(row).mean:.1f}" for row in (best, none))
        found.append(
            f"With {_labels(noise)} {_helps(*better(best, none))} (errors {ours} % in groups of {best['group']}, none "
            f"{theirs} %)."
        )
        for group, each in dropped.items():
            each.append(f"{_errors(best_dropout(summary, noise, group)).mean:.1f}")
    usual, without = (f"{_dropped(summary, group)} {{}}: {' and '.join(each)}" for group, each in dropped.items())
    dropout = f"{usual.format(f'in groups of {USUAL}')} %; {without.format('without norm')} %"
    return f"{' '.join(found)}\n{dropout[:1].upper()}{dropout[1:]}"


def _helps(by: Interval, edges: Sequence[tuple[str, str]]) -> str:
    """Return whether batch norm is better than none, and by how much where that is decided."""
    found = open_at_edges(by, edges)
    if decide(found, least=-SAME, most=SAME) == "holds":
        return f"batch norm changes less than {points(SAME)} points"
    if decide(found, least=0) == UNDECIDED:
        return "it is undecided whether batch norm helps"
    return f"batch norm is {say_better(by, 'none')}"


def _errors(row: dict[str, Any]) -> Interval:
    """Return the errors in percent, where a logarithm shows them."""
    found = interval(100 * (1 - np.asarray(row["test"])))
    return Interval(*(min(100.0, max(0.1, end)) for end in (found.mean, found.low, found.high)))


REGULARIZATION = Study(
    "regularization",
    "Does batch normalization regularize, and can it replace dropout?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
