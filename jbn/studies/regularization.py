"""``regularization``: whether the noise of batch statistics regularizes, and what it leaves to dropout."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jbn.studies.figures import LOOKS, draw_intervals, panels, put_legend_beside
from jbn.studies.intervals import (
    Interval,
    choose_rate,
    decide,
    interval,
    leave_open,
    note_edges,
    points,
    say_half,
    say_points,
)
from jbn.studies.networks import BatchNorm, Bias, Dense, Norm
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Plan, accuracies, note_diverged, sweep

DATA = "digits"
WIDTHS = (PIXELS[DATA], 128, 128, CLASSES)
# A batch is all of the training rows: its own statistics are those of the population, and know no noise.
ROWS = 200
USUAL = 40  # the group with dropout: the divisor of 200 that is nearest to the usual batch of 32
MOMENTUM = 0.9  # the rate falls to 0, so at the end the running statistics are those of the last networks
SEEN = ("training", "validation", "test", "diverged")
# How much worse a network may be and still be called as good.
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


@dataclass(frozen=True)
class Dropout:
    """A normalization, the activation after it, and dropout after both (Srivastava et al. 2014): before the next norm.

    Attributes:
        norm: what is before it.
        rate: the share of features that is dropped in training; those that stay are divided by the share of these.
    """

    norm: Norm
    rate: float

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters of the norm, and its state with a key for what is dropped."""
        params, state = self.norm.init(features, rng)
        return params, (state, rng.integers(0, 2**32, 2, np.uint32))

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state; each step drops other features."""
        inner, key = state
        y, inner = self.norm(params, inner, x, train, step)
        if train:
            stay = jax.random.bernoulli(jax.random.fold_in(key, step), 1 - self.rate, y.shape)
            y = jnp.where(stay, y / (1 - self.rate), 0)
        return y, (inner, key)


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


def _compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, Interval]:
    """Return in words how two arms did, and by how much the first is better, seed by seed.

    The interval is open where one of them may be better than it was seen to be.
    """
    by = interval(np.subtract(one["test"], other["test"]))
    shown = ", ".join(f"{row['arm']}: {_mean(row)} %" for row in (one, other))
    sentence = " ".join(
        [f"{shown}; difference {say_points(by)}.", *note_edges((r["arm"], r["edge"]) for r in (one, other))]
    )
    return sentence, leave_open(by, low=bool(other["edge"]), high=bool(one["edge"]))


def _noise(pick: Callable[[Sequence[float]], float]) -> Callable[[Summary], float]:
    return lambda summary: pick(summary["noises"])


CLEAN, NOISY = _noise(min), _noise(max)


def _gap_falls(noise: Callable[[Summary], float]) -> Callable[[Summary], Outcome]:
    """Return the judgement whether the gap rises with the group: the slope of each seed over the logarithm."""

    def judge(summary: Summary) -> Outcome:
        rows = _groups(summary, noise(summary))
        slopes = np.polyfit(np.log2([row["group"] for row in rows]), np.array([row["gap"] for row in rows]), 1)[0]
        by = interval(slopes)
        ends = ", ".join(
            f"{row['arm']}: {_mean(row, 'training')} % of the training rows, {_mean(row)} % of the test rows"
            for row in (rows[0], rows[-1])
        )
        return Outcome(f"{ends}; with each doubling the gap grows by {say_points(by)}.", decide(by, least=0))

    return judge


def _small_groups_help(noise: Callable[[Summary], float]) -> Callable[[Summary], Outcome]:
    """Return the judgement whether the best small group beats the whole batch."""

    def judge(summary: Summary) -> Outcome:
        sentence, by = _compare(_best_group(summary, noise(summary)), _find(summary, noise(summary), ROWS))
        return Outcome(f"{sentence} The group is the best on validation rows.", decide(by, least=0))

    return judge


def _dropout_can_go(noise: Callable[[Summary], float]) -> Callable[[Summary], Outcome]:
    """Return the judgement whether batch norm is as good without dropout as with the best share dropped."""

    def judge(summary: Summary) -> Outcome:
        share = noise(summary)
        sentence, by = _compare(_find(summary, share, USUAL), _best_dropout(summary, share, USUAL))
        without, dropped = _find(summary, share, 0), _best_dropout(summary, share, 0)
        beside = f"Without batch norm: {_mean(without)} %, {dropped['arm']}: {_mean(dropped)} %."
        return Outcome(
            f"{sentence} {beside} As good is less than {points(SAME)} points worse.", decide(by, least=-SAME)
        )

    return judge


def _together_are_worse(noise: Callable[[Summary], float]) -> Callable[[Summary], Outcome]:
    """Return the judgement whether half of the features dropped does harm in front of batch norm."""

    def judge(summary: Summary) -> Outcome:
        sentence, by = _compare(_find(summary, noise(summary), USUAL), _find(summary, noise(summary), USUAL, 0.5))
        return Outcome(sentence, decide(by, least=0))

    return judge


LUO = "Luo et al. 2019, section 2"
HOFFER = "Hoffer et al. 2017, algorithm 1 and table 1"
IOFFE = "Ioffe and Szegedy 2015, section 3.4: removed, or reduced in strength; here removed"
CLAIMS = (
    Claim(
        "The noise of batch statistics regularizes, and less the larger the batch: training and test come apart",
        LUO,
        _gap_falls(CLEAN),
    ),
    Claim(
        "Where labels are noise that can be learned by heart, too, training and test come apart the more the larger "
        "the batch",
        LUO,
        _gap_falls(NOISY),
    ),
    Claim(
        "Statistics of small groups generalize better than those of the whole batch", HOFFER, _small_groups_help(CLEAN)
    ),
    Claim("Statistics of small groups generalize better where labels are noise", HOFFER, _small_groups_help(NOISY)),
    Claim("With batch norm dropout can be removed", IOFFE, _dropout_can_go(CLEAN)),
    Claim("With batch norm dropout can be removed where labels are noise", IOFFE, _dropout_can_go(NOISY)),
    Claim(
        "Dropout before batch norm does worse than batch norm alone: it shifts the variance in training",
        "Li et al. 2019, abstract, here with half of the features dropped",
        _together_are_worse(CLEAN),
    ),
)


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows and gaps, a row per arm, two columns per share of noise."""
    names = list(dict.fromkeys(row["arm"] for row in summary["arms"]))
    found = {(row["arm"], row["noise"]): row for row in summary["arms"]}
    heading = [f"{what} {noise:.0%}" for noise in summary["noises"] for what in ("test", "gap")]
    rows = [
        (name, *(_cell(found[name, noise][what]) for noise in summary["noises"] for what in ("test", "gap")))
        for name in names
    ]
    notes = [
        f"Test: accuracy (%) on test rows; gap: the accuracy on training rows, with the labels that training saw, less "
        f"that; each with its 95 % interval over {summary['seeds']} seeds (Student's t). Beside them, the share of the "
        f"{ROWS} training labels that are drawn anew.",
        f"bn: batch norm by the statistics of so many rows of the whole batch of {ROWS}; drop: dropout of this share "
        f"after each activation; none: a bias alone. Each at its own best of {summary['rates']} rates, by validation "
        f"rows, {summary['steps']} steps. Where labels are noise a low rate regularizes too, and any arm may have it.",
    ]
    at = {id(row): f"{row['arm']} at {row['noise']:.0%}" for row in summary["arms"]}
    notes += note_edges((at[id(row)], row["edge"]) for row in summary["arms"])
    notes += note_diverged((at[id(row)], row["diverged"]) for row in summary["arms"])
    return Sheet(("arm", *heading), tuple(rows), tuple(notes))


def _cell(values: Sequence[float]) -> str:
    return say_half(interval(values))


def draw(summary: Summary) -> Figure:
    """Draw errors and gaps against the group, a column of panels per share of noise."""
    noises = [CLEAN(summary), *([NOISY(summary)] if len(summary["noises"]) > 1 else [])]
    note = (
        f"{ROWS} of the digits to train with, all in one batch, two hidden layers of 128, {summary['steps']} steps; "
        f"mean and 95 % interval of {summary['seeds']} seeds, each arm at its best learning rate; the share dropped is "
        f"the best on validation rows"
    )
    names = [f"{what}, {_labels(noise)}" for what in ("errors", "gap") for noise in noises]
    figure, grid = panels(_title(summary, noises), note, names, columns=len(noises), height=6.6, sharex=True)
    for number, axes in enumerate(grid):
        what, noise = ("test", "gap")[number // len(noises)], noises[number % len(noises)]
        groups = _groups(summary, noise)
        sizes = [row["group"] for row in groups]
        lines = {
            "batch norm by groups": groups,
            "no normalization": [_find(summary, noise, 0)] * 2,
            "dropout, no normalization": [_best_dropout(summary, noise, 0)] * 2,
            f"groups of {USUAL} and dropout": [_best_dropout(summary, noise, USUAL)] * 2,
        }
        for place, ((label, rows), look) in enumerate(zip(lines.items(), LOOKS, strict=False)):
            # What has no groups is a level; the bars at its ends stand side by side.
            places = sizes if rows is groups else [sizes[0] * 0.8**place, sizes[-1] * 1.25**place]
            draw_intervals(axes, places, [_percent(row, what) for row in rows], look, label)
        axes.set(xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        if number >= len(noises):
            axes.set_xlabel("rows of a group")
        if number % len(noises) == 0:
            axes.set_ylabel("errors on test rows (%)" if what == "test" else "training less test (points)")
    put_legend_beside(figure, *grid)
    return figure


def _labels(noise: float) -> str:
    return f"{100 * noise:.0f} % of the labels noise" if noise else "labels as they are"


def _errors(row: dict[str, Any]) -> str:
    return f"{points(1 - float(np.mean(row['test'])))} %"


def _title(summary: Summary, noises: Sequence[float]) -> str:
    lines = []
    for noise in noises:
        best, whole = _best_group(summary, noise), _find(summary, noise, ROWS)
        errors = f"groups of {best['group']} err in {_errors(best)}, the whole batch of {ROWS} in {_errors(whole)}"
        lines.append(f"{_labels(noise).capitalize()}: {errors}")
    both, alone = (
        " and ".join(_errors(_best_dropout(summary, noise, group)) for noise in noises) for group in (USUAL, 0)
    )
    return "\n".join([*lines, f"Groups of {USUAL} and dropout: {both}; dropout without batch norm: {alone}"])


def _percent(row: dict[str, Any], what: str) -> Interval:
    """Return errors, or the gap, in percent."""
    values = np.asarray(row[what])
    return interval(100 * (1 - values if what == "test" else values))


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
