"""``inference``: by which statistics to evaluate, over training, and what a wrong momentum costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jbn import batch_norm, bn_init, debiased, update
from jbn.core.numbers import Momentum
from jbn.studies.figures import LOOKS, OF_BATCH_NORM, draw_bands, name_places, panels, put_legend_beside
from jbn.studies.intervals import Interval, choose_rate, decide, interval, note_edges, points, say_better, say_half
from jbn.studies.networks import BatchNorm, Dense
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CHANCE, CLASSES, PIXELS, Look, Parts, Plan, note_diverged, sweep

WIDTHS = (PIXELS["digits"], 128, 128, CLASSES)
BATCH_SIZES = SMALL, LARGE = 4, 40  # both divide the 360 test rows, so these can be evaluated in such batches
# How far apart two accuracies may lie and still be called the same: what is better is better by more.
SAME = 0.01


@dataclass(frozen=True)
class Running:
    """Running statistics that are kept beside others: none of them has a say in training.

    Attributes:
        momentum: the weight of the old value.
        unbiased: whether the variances are those of PyTorch, n/(n - 1) times those that normalize.
    """

    momentum: Momentum
    unbiased: bool = False


# By their names in the table.
RUNNING = {
    "0": Running(0.0),
    "0.1": Running(0.1),
    "0.5": Running(0.5),
    "0.9": Running(0.9),
    "0.99": Running(0.99),
    "0.999": Running(0.999),
    "debiased": Running(debiased(0.99)),
    "unbiased": Running(debiased(0.99), unbiased=True),
}
POPULATION, BATCHES, TEST = "population", "batches", "all test"
READOUTS = (*RUNNING, POPULATION, BATCHES, TEST)
# What is drawn: its label and its look, batch norm's for what it is evaluated by without a question asked.
DRAWN = {
    "0.9": ("momentum 0.9\n(PyTorch's default)", OF_BATCH_NORM),
    "0.99": ("momentum 0.99", LOOKS[3]),
    "0.1": ("momentum 0.1 (PyTorch's\nnumber, misread)", LOOKS[1]),
    POPULATION: ("all training rows", LOOKS[6]),
    BATCHES: ("each batch of test rows", LOOKS[5]),
}


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: seeds, number of rates, rows seen, and looks on the way."""

    seeds: int
    rates: int
    examples: int
    looks: int


EXTENTS: dict[str, Extent] = {
    "quick": Extent(2, 2, 160, 2),
    "default": Extent(10, 5, 8000, 20),
    "full": Extent(20, 9, 24000, 60),
}


@dataclass(frozen=True)
class Recorded:
    """Batch norm in training that keeps many running statistics: a ``BatchNorm`` evaluates with one of them."""

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters and the states by the names of ``RUNNING``."""
        states: dict[str, Any] = {
            name: bn_init(features, counted=True)[1] if callable(each.momentum) else bn_init(features)[1]
            for name, each in RUNNING.items()
        }
        return bn_init(features)[0], states

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y, by the statistics of the batch, and the new states."""
        y, seen = batch_norm(x, params.scale, params.bias, activation=jax.nn.relu)
        moved = {
            name: update(state[name], seen, momentum=each.momentum, unbiased=each.unbiased)
            for name, each in RUNNING.items()
        }
        return y, moved


def cells(size: Size) -> list[Cell]:
    """Return a cell for each batch size."""
    extent = EXTENTS[size]
    return [
        Cell(
            f"batch-{batch_size}",
            {
                "batch_size": batch_size,
                "rates": rates_of(extent, batch_size),
                "seeds": extent.seeds,
                "examples": extent.examples,
                "looks": extent.looks,
            },
            work=1 / batch_size,
        )
        for batch_size in BATCH_SIZES
    ]


def rates_of(extent: Extent, batch_size: int) -> list[float]:
    """Return the grid of a batch size, around a rate that grows with the root of it."""
    middle = 0.6 * (batch_size / LARGE) ** 0.5
    return [round(rate, 6) for rate in np.geomspace(middle / 9, middle * 9, extent.rates).tolist()]


def measure(settings: Settings) -> Numbers:
    """Return accuracies (seeds, rates, looks) on test rows by readout, and on validation rows by the population."""
    plan = Plan(
        tuple(settings["rates"]),
        settings["seeds"],
        settings["batch_size"],
        settings["examples"],
        looks=settings["looks"],
    )
    found = sweep(Dense(WIDTHS, Recorded()), plan, {"": evaluate(settings["batch_size"])})[""]
    return {
        "validation": found["validation"][..., -1],
        "diverged": ~found["finite"][..., -1],
        "test": {name: found[name] for name in READOUTS},
    }


def evaluate(batch_size: int) -> Look:
    """Return a look at the accuracies of all readouts."""
    never = jnp.int32(0)
    by_batches = Dense(WIDTHS, BatchNorm(0.0, group_size=batch_size))
    # A momentum of 0 forgets what was before: the state is that of the last batch.
    by_states = Dense(WIDTHS, BatchNorm(0.0))

    def look(params: Any, states: Any, data: Parts) -> dict[str, Array]:
        by_name = {name: [layer[name] for layer in states] for name in RUNNING}
        kept = by_name["0"]  # of the type of states that count nothing
        by_name[POPULATION] = by_states(params, kept, data.training.x, True, never)[1]
        test = {name: by_states(params, state, data.test.x, False, never)[0] for name, state in by_name.items()}
        test[BATCHES] = by_batches(params, kept, data.test.x, True, never)[0]
        test[TEST] = by_states(params, kept, data.test.x, True, never)[0]
        validation = by_states(params, by_name[POPULATION], data.validation.x, False, never)[0]
        finite = jnp.isfinite(validation).all()

        def score(logits: Array, labels: Array) -> Array:
            return jnp.where(jnp.isfinite(logits).all(), (logits.argmax(-1) == labels).mean(), CHANCE)

        found = {name: score(logits, data.test.labels) for name, logits in test.items()}
        return found | {"validation": score(validation, data.validation.labels), "finite": finite}

    return look


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each batch size and readout what test rows say, of the networks of one rate."""
    settings = measured[0].settings
    return {
        "seeds": settings["seeds"],
        "examples": settings["examples"],
        "looks": settings["looks"],
        "rates": len(settings["rates"]),
        "batches": {str(each.settings["batch_size"]): _summarize(each.settings, each.numbers) for each in measured},
    }


def _summarize(settings: Settings, numbers: Numbers) -> dict[str, Any]:
    chosen = choose_rate(np.asarray(numbers["validation"], float))
    tests = {name: np.asarray(values, float)[:, chosen.index] for name, values in numbers["test"].items()}
    early = max(1, settings["looks"] // 4)
    return {
        "rate": settings["rates"][chosen.index],
        "edge": chosen.edge,
        "diverged": int(np.asarray(numbers["diverged"])[:, chosen.index].sum()),
        "early": _round({name: values[:, :early].mean(1) for name, values in tests.items()}),
        "whole": _round({name: values.mean(1) for name, values in tests.items()}),
        "end": _round({name: values[:, -1] for name, values in tests.items()}),
        "curves": {
            name: [vars(interval(values[:, look])) for look in range(values.shape[1])] for name, values in tests.items()
        },
    }


def _round(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: [round(value, 6) for value in each.tolist()] for name, each in values.items()}


def _mean(summary: Summary, batch_size: int, when: str, name: str) -> float:
    return float(np.mean(summary["batches"][str(batch_size)][when][name]))


def _compare(
    summary: Summary, batch_size: int, when: str, one: str, other: str, least: float = SAME, most: float = math.inf
) -> Outcome:
    """Return how two readouts did, and whether by so much the first is better, seed by seed."""
    found = summary["batches"][str(batch_size)][when]
    by = interval(np.subtract(found[one], found[other]))
    shown = ", ".join(f"{name} {points(_mean(summary, batch_size, when, name))} %" for name in (one, other))
    sentence = (
        f"{_when(summary, batch_size, when)}: {shown}; {one} is {say_better(by)}; within {points(SAME)} is the same."
    )
    return Outcome(sentence, decide(by, least=least, most=most))


def _when(summary: Summary, batch_size: int, when: str) -> str:
    steps = summary["examples"] // batch_size
    early = steps * max(1, summary["looks"] // 4) // summary["looks"]
    words = {
        "early": f"on average over the first {early} steps",
        "whole": f"on average over all {steps} steps",
        "end": f"after {steps} steps",
    }
    return f"Batches of {batch_size}, {words[when]}"


def _is_better(batch_size: int, when: str, one: str, other: str) -> Callable[[Summary], Outcome]:
    """Return the judgement whether one readout beats another by more than what counts as the same."""

    def judge(summary: Summary) -> Outcome:
        return _compare(summary, batch_size, when, one, other)

    return judge


def _batches_beat_population(summary: Summary) -> Outcome:
    found = _compare(summary, SMALL, "end", BATCHES, POPULATION)
    why = (
        f"A feature of these layers has {SMALL} numbers in a batch, one for each row; in a convolution it has one for "
        "each position of each row."
    )
    return Outcome(f"{found.sentence} {why}", found.verdict)


def _still_costs(summary: Summary) -> Outcome:
    """Judge 0.99, and tell how far a still larger momentum is behind."""
    found, ends = _compare(summary, LARGE, "end", POPULATION, "0.99"), summary["batches"][str(LARGE)]["end"]
    by = interval(np.subtract(ends["0.999"], ends[POPULATION]))
    larger = f"0.999, which decides nothing: {points(_mean(summary, LARGE, 'end', '0.999'))} %, {say_better(by)}."
    return Outcome(f"{found.sentence} {larger}", found.verdict)


def _agree(summary: Summary) -> Outcome:
    return _compare(summary, LARGE, "end", POPULATION, "0.9", least=-SAME, most=SAME)


MORE = f"by more than {points(SAME)} points"
MIXED = (
    f"PyTorch's momentum 0.1 (here 0.9), taken for the weight of the old value, costs more than {points(SAME)} points"
)
CONVENTIONS = "Asked here; the two conventions: torch.nn.BatchNorm2d, the note on momentum"
CLAIMS = (
    Claim(
        f"Early in training the statistics of the population evaluate better than running ones, {MORE}",
        "Wu and Johnson 2021, section 3, with the momentum 0.9",
        _is_better(LARGE, "early", POPULATION, "0.9"),
    ),
    Claim(
        f"Running statistics lag behind the more, the larger their momentum, {MORE}",
        "Wu and Johnson 2021, section 3",
        _is_better(LARGE, "early", "0.9", "0.99"),
    ),
    Claim(
        "At the end, once the rate has fallen, running statistics agree with the population's, within "
        f"{points(SAME)} points",
        "Wu and Johnson 2021, section 3",
        _agree,
    ),
    Claim(
        f"Networks that batches of {SMALL} have trained do better by the statistics of such batches than by the "
        f"population's, {MORE}",
        "Wu and Johnson 2021, section 4, with convolutions",
        _batches_beat_population,
    ),
    Claim(
        f"{MIXED} with batches of {LARGE}",
        CONVENTIONS,
        _is_better(LARGE, "end", "0.9", "0.1"),
    ),
    Claim(
        f"{MIXED} with batches of {SMALL}",
        CONVENTIONS,
        _is_better(SMALL, "end", "0.9", "0.1"),
    ),
    Claim(
        f"A momentum of 0.99, the default of Keras, still costs more than {points(SAME)} points after two hundred "
        "steps",
        "Asked here; the default is that of keras.layers.BatchNormalization",
        _still_costs,
    ),
    Claim(
        "With a momentum of 0.99 an average divided by the sum of its weights (debiased) evaluates better on the way, "
        f"{MORE}",
        "Kingma and Ba 2015, section 3, of the moments of Adam",
        _is_better(LARGE, "whole", "debiased", "0.99"),
    ),
    Claim(
        f"With batches of {SMALL} the unbiased variance, n/(n - 1) times that of the batch, evaluates better, {MORE}",
        "Asked here; Ioffe and Szegedy 2015, algorithm 2, evaluate with it",
        _is_better(SMALL, "end", "unbiased", "debiased"),
    ),
)


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows, a row per readout, two columns per batch size."""
    sizes = [int(size) for size in summary["batches"]]
    heading = [f"{when} {size}" for size in sizes for when in ("early", "end")]
    rows = [
        (name, *(_cell(summary["batches"][str(size)][when][name]) for size in sizes for when in ("early", "end")))
        for name in READOUTS
    ]
    notes = [
        f"Test accuracy (%) with its 95 % interval over {summary['seeds']} seeds (Student's t), by rows a batch; "
        f"early: the mean over the looks of the first quarter, of {summary['looks']} in all; end: after "
        f"{summary['examples']} rows. All of a batch size are readouts of the same networks, at the best of "
        f"{summary['rates']} rates by validation rows and the population's statistics.",
        "A number: running statistics of this momentum, the weight of the old value; PyTorch's default 0.1 is the "
        "arm 0.9; debiased: 0.99, right from the "
        "first step; unbiased: as debiased, with the variance of PyTorch; population: all training rows as one batch; "
        "batches: batches of test rows, as many as in training; all test: all test rows as one batch.",
    ]
    found = summary["batches"].items()
    notes += note_edges((f"batches of {size}", each["edge"]) for size, each in found)
    notes += note_diverged((f"batches of {size}", each["diverged"]) for size, each in found)
    return Sheet(("by", *heading), tuple(rows), tuple(notes))


def _cell(values: Sequence[float]) -> str:
    return say_half(interval(values))


def draw(summary: Summary) -> Figure:
    """Draw errors on test rows over the steps, a panel per batch size."""

    def errors(batch_size: int, when: str, *names: str) -> list[str]:
        return [points(1 - _mean(summary, batch_size, when, name)) for name in names]

    early, end = (errors(LARGE, when, POPULATION, "0.9", "0.99") for when in ("early", "end"))
    right, wrong = errors(SMALL, "end", "0.9", "0.1")
    lags = "lag" if _is_better(LARGE, "early", "0.9", "0.99")(summary).verdict == "holds" else "do not lag for certain"
    title = (
        f"Running statistics of a large momentum {lags} early: {_when(summary, LARGE, 'early').lower()}, errors are "
        f"{early[2]} % by 0.99, {early[1]} % by 0.9, {early[0]} % by all training rows (at the end {end[2]}, {end[1]} "
        f"and {end[0]} %). With batches of {SMALL}, PyTorch's 0.1, taken for the weight of the OLD value, ends with "
        f"{wrong} %; what PyTorch does, 0.9, with {right} %"
    )
    left = ", ".join(name for name in READOUTS if name not in DRAWN)
    note = (
        "momentum: weight of the old value; PyTorch's 0.1 weighs the new one. digits, two hidden layers of 128; "
        f"the same networks by several statistics; mean and 95 % interval of {summary['seeds']} seeds; the learning "
        f"rate falls to 0. Not drawn, but in the table: momentum {left}"
    )
    names = [f"batches of {size} rows" for size in summary["batches"]]
    figure, grid = panels(title, note, names, columns=1, height=7.5)
    for axes, (size, found) in zip(grid, summary["batches"].items(), strict=True):
        steps = summary["examples"] // int(size)
        places = [steps * look / summary["looks"] for look in range(1, summary["looks"] + 1)]
        for name, (label, look) in DRAWN.items():
            draw_bands(axes, places, [_error(each) for each in found["curves"][name]], look, label)
        axes.set(yscale="log", xlabel="steps", ylabel="errors on test rows (%)")
        name_places(axes, (1, 2, 3, 5, 10, 20, 50, 90))
    put_legend_beside(figure, *grid)
    return figure


def _error(found: dict[str, float]) -> Interval:
    """Return errors in percent, where a logarithm shows them."""
    mean, low, high = (min(100.0, max(0.5, 100 * (1 - found[name]))) for name in ("mean", "high", "low"))
    return Interval(mean, low, high)


INFERENCE = Study(
    "inference",
    "By which statistics is batch normalization to be evaluated, and what does a wrong momentum cost?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
