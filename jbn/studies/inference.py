"""``inference``: by which statistics to evaluate, over training, and what a wrong momentum costs."""

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
from jbn.studies.figures import LOOKS, draw_intervals, name_places, panels, put_legend_beside
from jbn.studies.intervals import Interval, choose_rate, decide, interval, note_edges, points, say_half, say_points
from jbn.studies.networks import BatchNorm, Dense
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CHANCE, CLASSES, PIXELS, Look, Parts, Plan, note_diverged, sweep

WIDTHS = (PIXELS["digits"], 128, 128, CLASSES)
BATCH_SIZES = SMALL, LARGE = 4, 40  # both divide the 360 test rows, so these can be evaluated in such batches
# How far apart two accuracies may lie and still be called the same.
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
DRAWN = {
    POPULATION: "all training rows",
    "0.9": "momentum 0.9",
    "0.99": "momentum 0.99",
    "debiased": "momentum 0.99, debiased",
    "0.1": "momentum 0.1",
    BATCHES: "each batch of test rows",
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


def _compare(summary: Summary, batch_size: int, when: str, one: str, other: str) -> tuple[str, Interval]:
    """Return in words how two readouts did, and by how much the first is better, seed by seed."""
    found = summary["batches"][str(batch_size)][when]
    by = interval(np.subtract(found[one], found[other]))
    shown = ", ".join(f"{name}: {points(_mean(summary, batch_size, when, name))} %" for name in (one, other))
    return (
        f"{_when(summary, batch_size, when)}: {shown}; difference {say_points(by)}.",
        by,
    )


def _when(summary: Summary, batch_size: int, when: str) -> str:
    steps = summary["examples"] // batch_size
    early = steps * max(1, summary["looks"] // 4) // summary["looks"]
    words = {"early": f"in the first {early} steps", "whole": f"over all {steps} steps", "end": f"after {steps} steps"}
    return f"Batches of {batch_size}, {words[when]}"


def _is_better(batch_size: int, when: str, one: str, other: str) -> Callable[[Summary], Outcome]:
    """Return the judgement whether one readout beats another."""

    def judge(summary: Summary) -> Outcome:
        sentence, by = _compare(summary, batch_size, when, one, other)
        return Outcome(sentence, decide(by, least=0))

    return judge


def _batches_beat_population(summary: Summary) -> Outcome:
    sentence, by = _compare(summary, SMALL, "end", BATCHES, POPULATION)
    why = (
        f"A feature of these layers has {SMALL} numbers in a batch; in convolutions it has one for each position more."
    )
    return Outcome(f"{sentence} {why}", decide(by, least=0))


def _agree(summary: Summary) -> Outcome:
    sentence, by = _compare(summary, LARGE, "end", POPULATION, "0.9")
    return Outcome(f"{sentence} The same is within {points(SAME)} points.", decide(by, least=-SAME, most=SAME))


MIXED = "Asked here; the two conventions: torch.nn.BatchNorm2d, the note on momentum"
CLAIMS = (
    Claim(
        "Early in training the statistics of the population evaluate better than running ones",
        "Wu and Johnson 2021, section 3, with the momentum 0.9",
        _is_better(LARGE, "early", POPULATION, "0.9"),
    ),
    Claim(
        "Running statistics lag behind the more, the larger their momentum",
        "Wu and Johnson 2021, section 3",
        _is_better(LARGE, "early", "0.9", "0.99"),
    ),
    Claim(
        "At the end, once the rate has fallen, running statistics agree with the population's",
        "Wu and Johnson 2021, section 3",
        _agree,
    ),
    Claim(
        "Networks that small batches have trained do better by the statistics of such batches than by the population's",
        "Wu and Johnson 2021, section 4, with convolutions",
        _batches_beat_population,
    ),
    Claim(
        "PyTorch's momentum 0.1 is 0.9 where it weighs the old value; taken for 0.1 it costs accuracy, large batches",
        MIXED,
        _is_better(LARGE, "end", "0.9", "0.1"),
    ),
    Claim(
        "PyTorch's momentum 0.1, taken for the weight of the old value, costs accuracy with small batches",
        MIXED,
        _is_better(SMALL, "end", "0.9", "0.1"),
    ),
    Claim(
        "A momentum of 0.99, the default of Keras, still costs accuracy after two hundred steps",
        "Asked here; the default is that of keras.layers.BatchNormalization",
        _is_better(LARGE, "end", POPULATION, "0.99"),
    ),
    Claim(
        "With a momentum of 0.99 an average divided by the sum of its weights (debiased) evaluates better on the way",
        "Kingma and Ba 2015, section 3, of the moments of Adam",
        _is_better(LARGE, "whole", "debiased", "0.99"),
    ),
    Claim(
        "The variance to evaluate with is the unbiased one, n/(n - 1) times that of small batches",
        "Ioffe and Szegedy 2015, algorithm 2",
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
        "A number: running statistics of this momentum, the weight of the old value; debiased: 0.99, right from the "
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
    early, end = (
        [points(1 - _mean(summary, LARGE, when, name)) for name in ("0.99", "0.9", POPULATION)]
        for when in ("early", "end")
    )
    wrong, right = (points(1 - _mean(summary, SMALL, "end", name)) for name in ("0.1", "0.9"))
    title = (
        f"{_when(summary, LARGE, 'early')}: by momentum 0.99 errors are {early[0]} %, by 0.9 {early[1]} %,\nby all "
        f"training rows {early[2]} %; at the end they are {end[0]}, {end[1]} and {end[2]} %.\n"
        f"Batches of {SMALL}: 0.1, which is what PyTorch calls 0.9, ends with {wrong} %, 0.9 with {right} %"
    )
    note = (
        f"digits, two hidden layers of 128; the same networks evaluated by several statistics; mean and 95 % interval "
        f"of {summary['seeds']} seeds; the learning rate falls to 0"
    )
    names = [f"batches of {size} rows" for size in summary["batches"]]
    figure, grid = panels(title, note, names, columns=1, height=7.5)
    for axes, (size, found) in zip(grid, summary["batches"].items(), strict=True):
        steps = summary["examples"] // int(size)
        places = [steps * look / summary["looks"] for look in range(1, summary["looks"] + 1)]
        for (name, label), look in zip(DRAWN.items(), LOOKS, strict=False):
            draw_intervals(axes, places, [_error(each) for each in found["curves"][name]], look, label)
        axes.set(yscale="log", ylabel="errors on test rows (%)")
        name_places(axes, (1, 2, 3, 5, 10, 20, 50, 90))
    grid[-1].set_xlabel("steps")
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
