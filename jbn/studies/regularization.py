"""``regularization``: whether the noise of batch statistics regularizes, and what it leaves to dropout."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
    conclude,
    decide,
    interval,
    leave_open,
    note_edges,
    open_at_edges,
    points,
    say_better,
    say_half,
    say_points,
    weigh,
)
from jbn.studies.networks import BatchNorm, Bias, Dense, Dropout, Norm
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Plan, accuracies, note_diverged, sweep

DATA = "digits"
WIDTHS = (PIXELS[DATA], 128, 128, CLASSES)
# A batch is all of the training rows: its own statistics are those of the population, and know no noise.
ROWS = 200
USUAL = 40  # the group with dropout: the divisor of 200 that is nearest to the usual batch of 32
MOMENTUM = 0.9  # the rate falls to 0, so at the end the running statistics are those of the last networks
SEEN = ("training", "validation", "test", "diverged")
# How far apart two accuracies may lie and still be called the same, in every claim.
SAME = 0.01


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


def _find(summary: Summary, noise: float, group: int, dropout: float = 0.0) -> dict[str, Any]:
    """Return what was found of an arm."""
    wanted = (noise, group, dropout)
    return next(row for row in summary["arms"] if (row["noise"], row["group"], row["dropout"]) == wanted)


def _groups(summary: Summary, noise: float) -> list[dict[str, Any]]:
    """Return what was found of batch norm alone, from the smallest group to the whole batch."""
    rows = [row for row in summary["arms"] if row["noise"] == noise and row["group"] and not row["dropout"]]
    return sorted(rows, key=lambda row: row["group"])


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the arm that does best on validation rows; test rows have no say in it."""
    return max(rows, key=lambda row: row["validation"])


def _best_group(summary: Summary, noise: float) -> dict[str, Any]:
    """Return the best of the groups that are smaller than the batch."""
    return _best(_groups(summary, noise)[:-1])


def _best_dropout(summary: Summary, noise: float, group: int) -> dict[str, Any]:
    return _best([row for row in summary["arms"] if (row["noise"], row["group"]) == (noise, group) and row["dropout"]])


def _mean(row: dict[str, Any], what: str = "test") -> str:
    return points(float(np.mean(row[what])))


def _better(one: dict[str, Any], other: dict[str, Any]) -> tuple[Interval, list[tuple[str, str]]]:
    """Return by how much an arm is better than another, seed by seed, and their edges."""
    return interval(np.subtract(one["test"], other["test"])), [(row["arm"], row["edge"]) for row in (one, other)]


def _compare(one: dict[str, Any], other: dict[str, Any], *more: str, least: float) -> Outcome:
    """Return how two arms did, with more sentences, and whether by so much the first is better."""
    by, edges = _better(one, other)
    shown = ", ".join(f"{row['arm']}: {_mean(row)} %" for row in (one, other))
    sentence = f"{shown}; {one['arm']} is {say_better(by)}, {weigh(open_at_edges(by, edges), SAME)}."
    return conclude(" ".join([sentence, *more]), by, edges, least=least)


# Which share of noise a judgement is about, out of those of a summary.
Noise = Callable[[Sequence[float]], float]
CLEAN, NOISY = min, max


def _gap_falls(noise: Noise) -> Callable[[Summary], Outcome]:
    """Return the judgement whether the gap rises with the group: the slope of each seed, among groups of one rate.

    The rate moves the gap too. What cannot fit the training rows, with labels as they are, has a small gap for this
    reason, and no part in it.
    """

    def judge(summary: Summary) -> Outcome:
        fits = {row["group"]: float(np.mean(row["training"])) for row in _groups(summary, CLEAN(summary["noises"]))}
        rows = [row for row in _groups(summary, noise(summary["noises"])) if fits[row["group"]] >= 1 - SAME]
        poor = ", ".join(f"bn {group} ({points(fit)} %)" for group, fit in fits.items() if fit < 1 - SAME)
        unfit = f"Groups that fit less than {1 - SAME:.0%} of the training rows where labels are as they are"
        beside = [f"{unfit} have no part in it: {poor}."] * bool(poor)
        if (by := _slope(rows)) is None:
            return Outcome(" ".join(["No two groups have the same rate.", *beside]), "not decided within the intervals")
        gaps: dict[float, list[str]] = {}
        for row in rows:
            gaps.setdefault(row["rate"], []).append(f"{row['arm']}: {_mean(row, 'gap')}")
        shown = "; ".join(f"at rate {rate:g} {', '.join(each)}" for rate, each in gaps.items())
        sentence = f"Training less test, {shown} points; at the same rate it grows by {say_points(by)} a doubling."
        edges = note_edges((row["arm"], row["edge"]) for row in rows)
        verdict = decide(leave_open(by, low=bool(edges), high=bool(edges)), least=0)
        return Outcome(" ".join([*edges, sentence, *beside]), verdict)

    return judge


def _slope(rows: Sequence[dict[str, Any]]) -> Interval | None:
    """Return by how much the gap grows with each doubling of the group, among those of one rate; None for no two."""
    same = np.equal.outer(*[[row["rate"] for row in rows]] * 2)
    # From the middle of those of its rate.
    doublings = (np.eye(len(rows)) - same / same.sum(1, keepdims=True)) @ np.log2([row["group"] for row in rows])
    return interval(doublings @ [row["gap"] for row in rows] / (doublings @ doublings)) if doublings.any() else None


Pick = Callable[[Summary, float], dict[str, Any]]


def _arm(group: int, dropout: float = 0.0) -> Pick:
    return lambda summary, noise: _find(summary, noise, group, dropout)


def _is_better(noise: Noise, one: Pick, other: Pick) -> Callable[[Summary], Outcome]:
    """Return the judgement whether an arm beats another by more than what is called the same."""

    def judge(summary: Summary) -> Outcome:
        share = noise(summary["noises"])
        chosen = ["The group is the best on validation rows."] * (one is _best_group)
        return _compare(one(summary, share), other(summary, share), *chosen, least=SAME)

    return judge


def _dropout_can_go(noise: Noise) -> Callable[[Summary], Outcome]:
    """Return the judgement whether batch norm is as good without dropout as with the best share dropped."""

    def judge(summary: Summary) -> Outcome:
        share = noise(summary["noises"])
        without, dropped = _find(summary, share, 0), _best_dropout(summary, share, 0)
        beside = f"Without batch norm: {_mean(without)} %, {dropped['arm']}: {_mean(dropped)} %."
        rows = _find(summary, share, USUAL), _best_dropout(summary, share, USUAL)
        return _compare(*rows, beside, least=-SAME)

    return judge


LUO = "Luo et al. 2019, section 2: the noise of batch statistics regularizes, and less the larger the batch"
HOFFER = "Hoffer et al. 2017, algorithm 1 and table 1"
IOFFE = "Ioffe and Szegedy 2015, section 3.4: removed, or reduced in strength; here removed"
CLAIMS = (
    Claim(
        "Batch norm regularizes: the network generalizes better than without it",
        "Ioffe and Szegedy 2015, section 3.4; here the best groups against no norm at all",
        _is_better(CLEAN, _best_group, _arm(0)),
    ),
    Claim(
        "Batch norm regularizes where labels are noise that can be learned by heart, too",
        "Asked here",
        _is_better(NOISY, _best_group, _arm(0)),
    ),
    Claim(
        "At the same rate training and test come apart the more the larger the batch",
        LUO,
        _gap_falls(CLEAN),
    ),
    Claim(
        "At the same rate training and test come apart the more the larger the batch where labels are noise, too",
        LUO,
        _gap_falls(NOISY),
    ),
    Claim(
        "Statistics of small groups generalize better than those of the whole batch",
        HOFFER,
        _is_better(CLEAN, _best_group, _arm(ROWS)),
    ),
    Claim(
        "Statistics of small groups generalize better where labels are noise",
        HOFFER,
        _is_better(NOISY, _best_group, _arm(ROWS)),
    ),
    Claim("With batch norm dropout can be removed", IOFFE, _dropout_can_go(CLEAN)),
    Claim("With batch norm dropout can be removed where labels are noise", IOFFE, _dropout_can_go(NOISY)),
    Claim(
        "Dropout before batch norm does worse than batch norm alone: it shifts the variance in training",
        "Li et al. 2019, abstract, here with half of the features dropped",
        _is_better(CLEAN, _arm(USUAL), _arm(USUAL, 0.5)),
    ),
)


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
        f"bn: batch norm by the statistics of so many rows of the whole batch of {ROWS}; drop: dropout of this share "
        f"after each activation; none: a bias alone. {summary['steps']} steps. Where labels are noise a low rate "
        "regularizes too, and any arm may have it.",
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
        f"95 % interval of {summary['seeds']} seeds (compared one by one); each arm at its best rate; ringed group and "
        f"share dropped: the best on validation rows; groups of {USUAL}: near a usual batch of 32"
    )
    figure, grid = panels(_title(summary), note, [_labels(noise) for noise in noises], height=5)
    for axes, noise in zip(grid, noises, strict=True):
        groups, best = _groups(summary, noise), _best_group(summary, noise)
        sizes = [row["group"] for row in groups]
        levels = {
            "no normalization": (_find(summary, noise, 0), OF_NONE),
            "dropout, no normalization": (_best_dropout(summary, noise, 0), LOOKS[1]),
            f"batch norm by groups\nof {USUAL}, dropout": (_best_dropout(summary, noise, USUAL), LOOKS[3]),
        }
        draw_intervals(axes, sizes, [_errors(row) for row in groups], OF_BATCH_NORM, "batch norm by groups")
        axes.plot([best["group"]], [_errors(best).mean], "o", markersize=14, markerfacecolor="none", color="0.3")
        for number, (label, (row, look)) in enumerate(levels.items(), 1):
            # Side by side at both ends, so that in grey, too, each interval is seen to be that of its line.
            draw_intervals(axes, [sizes[0] / 1.4**number, sizes[-1] * 1.4**number], [_errors(row)] * 2, look, label)
        axes.set(xscale="log", yscale="log", xlabel="rows of a group")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        name_places(axes, (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 90))
    grid[0].set_ylabel("errors on test rows (%), logarithmic")
    put_legend_beside(figure, *grid)
    return figure


def _labels(noise: float) -> str:
    return f"{100 * noise:.0f} % of the labels noise" if noise else "labels as they are"


def _title(summary: Summary) -> str:
    """Return whether batch norm in its best groups beats none, and then the errors of both, and those with dropout."""
    found: list[str] = []
    errors, both = [], []
    for noise in sorted({min(summary["noises"]), max(summary["noises"])}):
        best, none = _best_group(summary, noise), _find(summary, noise, 0)
        found.append(
            f"ith {_labels(noise)} {'it' if found else 'batch norm'} {_helps(open_at_edges(*_better(best, none)))}"
        )
        errors.append(f"{_errors(best).mean:.1f} (none {_errors(none).mean:.1f})")
        both.append(f"{_errors(_best_dropout(summary, noise, USUAL)).mean:.1f}")
    return (
        f"W{'; w'.join(found)}.\nErrors, %: {' and '.join(errors)}; groups of {USUAL} with dropout {' and '.join(both)}"
    )


def _helps(by: Interval) -> str:
    """Return in words what a difference in accuracy is."""
    if decide(by, least=-SAME, most=SAME) == "holds":
        return f"changes less than {points(SAME)} points"
    return {"holds": "helps", "does not hold": "harms"}.get(decide(by, least=0), "may help or harm")


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
