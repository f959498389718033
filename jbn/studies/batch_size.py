"""``batch-size``: what small batches cost batch normalization, and what helps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flax import linen as nn
from jax import Array
from matplotlib.figure import Figure

from jbn import renorm, renorm_schedule
from jbn.core.choice import NormalizeBy
from jbn.studies.figures import (
    LOOKS,
    OF_BATCH_NORM,
    OF_LAYER_NORM,
    OF_NONE,
    blank,
    draw_intervals,
    name_places,
    put_legend_beside,
)
from jbn.studies.intervals import (
    Interval,
    choose_rate,
    conclude,
    interval,
    note_edges,
    points,
    say_better,
    say_half,
)
from jbn.studies.networks import BatchNorm, Bias, Dense, Norm, OfFlax
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Plan, accuracies, keep_state, note_diverged, sweep

WIDTHS = (PIXELS["digits"], 128, 128, 128, CLASSES)
GHOST = 16  # rows that are a batch of their own
GROUPS = 8  # of 16 features each, as in Wu and He's table 3
# Running statistics remember as many rows at every batch size: those of ten batches of 128.
MEMORY = 10 * 128
SEEN = ("validation", "test", "diverged")
# How far apart two accuracies may lie and still be called the same: in Wu and He's figure those of group norm, which
# they call independent of the batch, lie 0.2 points apart on 50 000 images; here are a hundred times fewer.
SAME = 0.01


@dataclass(frozen=True)
class Arm:
    """What is compared: its name in the figure, and what it is."""

    label: str
    what: str


# By their names in the table.
ARMS = {
    "plain": Arm("batch norm", "batch norm, evaluated by its running statistics"),
    "recal.": Arm(
        "batch norm,\nstatistics taken anew",
        "the same networks by the statistics of all training rows, taken afterwards",
    ),
    "renorm": Arm("batch renormalization", "batch renormalization, with its schedule over the first half of the steps"),
    "ghost": Arm("ghost batch norm", f"batch norm by the statistics of groups of {GHOST} rows"),
    "group": Arm("group norm", f"group norm of {GROUPS} groups of features"),
    "layer": Arm("layer norm", "layer norm"),
    "none": Arm("none", "a bias alone"),
}
# batch norm, layer norm and none as in all studies.
OF_ARMS = (OF_BATCH_NORM, LOOKS[1], LOOKS[5], LOOKS[3], LOOKS[6], OF_LAYER_NORM, OF_NONE)
OF_BATCHES = ("plain", "recal.", "renorm", "ghost")


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: batch sizes, seeds, number of rates, and rows seen."""

    batch_sizes: tuple[int, ...]
    seeds: int
    rates: int
    examples: int


EXTENTS: dict[str, Extent] = {
    "quick": Extent((1, 2, 32), 2, 3, 256),
    "default": Extent((1, 2, 4, 8, 16, 32, 64, 128), 10, 6, 5376),
    "full": Extent((1, 2, 4, 8, 16, 32, 64, 128), 20, 11, 21504),
}


def rates_of(extent: Extent, batch_size: int) -> list[float]:
    """Return the grid of a batch size, the same for every arm, around a rate that grows with the root of it.

    Small batches take batch norm to a tenth of the best rate of the others, so there is more room below.
    """
    middle = 0.8 * (batch_size / 128) ** 0.5
    return [round(rate, 6) for rate in np.geomspace(middle / 27, middle * 9, extent.rates).tolist()]


def reason_of_none(arm: str, batch_size: int) -> str:
    """Return why an arm is not measured at a batch size, "" where it is."""
    if batch_size == 1 and arm in OF_BATCHES:
        return "batch norms at 1 row: it has no variance, and would be normalized to 0 in every feature"
    if arm == "ghost" and batch_size <= GHOST:
        return f"ghost up to {GHOST} rows: it is plain, as the batch is no larger than a group"
    return ""


def cells(size: Size) -> list[Cell]:
    """Return a cell for each batch size of each arm that is trained; the recalibrated one shares plain's."""
    extent = EXTENTS[size]
    return [
        Cell(
            f"{arm}-{batch_size}",
            {
                "arm": arm,
                "batch_size": batch_size,
                "rates": rates_of(extent, batch_size),
                "seeds": extent.seeds,
                "examples": extent.examples,
            },
            work=5 + 16 / batch_size**0.5,
        )
        for arm in ARMS
        for batch_size in extent.batch_sizes
        if arm != "recal." and not reason_of_none(arm, batch_size)
    ]


def norm_of(arm: str, batch_size: int, steps: int) -> Norm:
    """Return the normalization of an arm."""
    momentum = max(0.0, 1 - batch_size / MEMORY)

    def tie(step: Array) -> NormalizeBy:
        return renorm(*renorm_schedule(step, steps=max(1, steps // 2)))

    norms: dict[str, Norm] = {
        "plain": BatchNorm(momentum),
        "renorm": BatchNorm(momentum, tie=tie),
        "ghost": BatchNorm(momentum, group_size=GHOST),
        "group": OfFlax(nn.GroupNorm(GROUPS)),
        "layer": OfFlax(nn.LayerNorm()),
        "none": Bias(),
    }
    return norms[arm]


def recalibrate(params: Any, states: Any, x: Array) -> Any:
    """Return the statistics of all rows: one batch of all of them, and a momentum that forgets what was before."""
    return Dense(WIDTHS, BatchNorm(momentum=0.0))(params, states, x, True, np.int32(0))[1]  # type: ignore[arg-type]


def measure(settings: Settings) -> Numbers:
    """Return accuracies (seeds, rates) on validation and test rows, and which diverged, of the arms of a cell."""
    arm, batch_size, examples = settings["arm"], settings["batch_size"], settings["examples"]
    network = Dense(WIDTHS, norm_of(arm, batch_size, examples // batch_size))
    readouts = {arm: keep_state} | ({"recal.": recalibrate} if arm == "plain" else {})
    plan = Plan(tuple(settings["rates"]), settings["seeds"], batch_size, examples)
    found = sweep(network, plan, {name: accuracies(network, readout) for name, readout in readouts.items()})
    return {name: {each: found[name]._asdict()[each][..., -1] for each in SEEN} for name in readouts}


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each arm and batch size the rate that validation rows chose, and what test rows say of it."""
    settings = [each.settings for each in measured]
    rows = [_summarize(each.settings, arm, numbers) for each in measured for arm, numbers in each.numbers.items()]
    return {
        "batch_sizes": sorted({each["batch_size"] for each in settings}),
        "seeds": settings[0]["seeds"],
        "examples": settings[0]["examples"],
        "rates": len(settings[0]["rates"]),
        "arms": sorted(rows, key=lambda row: (list(ARMS).index(row["arm"]), row["batch_size"])),
    }


def _summarize(settings: Settings, arm: str, numbers: Numbers) -> dict[str, Any]:
    validation, test, diverged = (np.asarray(numbers[name], float) for name in ("validation", "test", "diverged"))
    chosen = choose_rate(validation)
    return {
        "arm": arm,
        "batch_size": settings["batch_size"],
        "rate": settings["rates"][chosen.index],
        "edge": chosen.edge,
        "diverged": int(diverged[:, chosen.index].sum()),
        "test_accuracy": [round(value, 6) for value in test[:, chosen.index].tolist()],
        "interval": asdict(interval(test[:, chosen.index])),
    }


def _find(summary: Summary, arm: str, batch_size: int) -> dict[str, Any]:
    """Return what was found of an arm at a batch size."""
    return next(row for row in summary["arms"] if (row["arm"], row["batch_size"]) == (arm, batch_size))


def _compare(
    summary: Summary,
    one: tuple[str, int],
    other: tuple[str, int],
    *more: str,
    least: float = 0.0,
    most: float = math.inf,
) -> Outcome:
    """Return how two arms did, with more sentences, and whether by so much the first is better, seed by seed."""
    first, second = _find(summary, *one), _find(summary, *other)
    by = _difference(summary, one, other)
    shown = [f"{arm} at {size} {_accuracy(row)} %" for (arm, size), row in ((one, first), (other, second))]
    sentence = f"{', '.join(shown)}: {say_better(by)}."
    edges = [(f"{arm} at {size}", row["edge"]) for (arm, size), row in ((one, first), (other, second))]
    return conclude(" ".join([sentence, *more]), by, edges, least=least, most=most)


def _difference(summary: Summary, one: tuple[str, int], other: tuple[str, int]) -> Interval:
    return interval(np.subtract(*(_find(summary, *each)["test_accuracy"] for each in (one, other))))


def _accuracy(row: dict[str, Any]) -> str:
    return points(row["interval"]["mean"])


def _ends(summary: Summary, arm: str) -> tuple[int, int]:
    """Return the smallest and the largest batch at which an arm was trained."""
    sizes = [row["batch_size"] for row in summary["arms"] if row["arm"] == arm]
    return min(sizes), max(sizes)


def _falls(summary: Summary) -> Outcome:
    small, large = _ends(summary, "plain")
    return _compare(summary, ("plain", large), ("plain", small))


def _mends(arm: str) -> Callable[[Summary], Outcome]:
    """Return the judgement whether an arm beats plain at the smallest batch, told as a part of what plain loses."""

    def judge(summary: Summary) -> Outcome:
        small, large = _ends(summary, "plain")
        gain = _difference(summary, (arm, small), ("plain", small)).mean
        lost = _difference(summary, ("plain", large), ("plain", small)).mean
        part = f"That is {points(gain)} of the {points(lost)} points that plain loses from {large} to {small} rows."
        return _compare(summary, (arm, small), ("plain", small), *[part] * (gain > 0 and lost > 0))

    return judge


def _is_better_large(summary: Summary) -> Outcome:
    _, size = _ends(summary, "ghost")
    return _compare(summary, ("ghost", size), ("plain", size))


def _is_independent(summary: Summary) -> Outcome:
    sizes = [row["batch_size"] for row in summary["arms"] if row["arm"] == "group"]
    # The source's sizes, or where these were not measured the nearest.
    large, small = (min(sizes, key=lambda size: abs(math.log(size / said))) for said in (32, 2))
    steps = [summary["examples"] // size for size in (large, small)]
    none = [_accuracy(_find(summary, "none", size)) for size in (large, small)]
    ends = [f"{_accuracy(_find(summary, 'group', size))} % at {size}" for size in (max(sizes), min(sizes))]
    why = (
        f"The same is within {points(SAME)} points. For as many rows seen there are {steps[0]} and {steps[1]} steps: "
        f"without any normalization it is {none[0]} % and {none[1]} %. Group norm has "
        f"{' and '.join(ends)}."
    )
    return _compare(summary, ("group", large), ("group", small), why, least=-SAME, most=SAME)


CLAIMS = (
    Claim(
        "Batch norm loses accuracy where batches are small",
        "Wu and He 2018, figure 1: on ImageNet 23.6 % errors at 32 images, 34.7 % at 2",
        _falls,
    ),
    Claim(
        "Batch renormalization mends a part of it",
        "Ioffe 2017, section 4",
        _mends("renorm"),
    ),
    Claim(
        "Statistics that are taken anew after training mend a part of it",
        "Wu and Johnson 2021, section 3",
        _mends("recal."),
    ),
    Claim(
        f"Group norm does not depend on the batch, from 2 rows to 32, within {points(SAME)} points",
        "Wu and He 2018, figure 1: 24.1 % errors at 32 images and at 2",
        _is_independent,
    ),
    Claim(
        "A large batch does better with the statistics of small groups (ghost)",
        "Hoffer et al. 2017, algorithm 1 and table 1",
        _is_better_large,
    ),
)


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows, a row per batch size, a column per arm."""
    found = {(row["arm"], row["batch_size"]): row for row in summary["arms"]}
    rows = []
    for batch_size in summary["batch_sizes"]:
        texts = [_cell(found[arm, batch_size]) if (arm, batch_size) in found else "-" for arm in ARMS]
        rows.append((str(batch_size), *texts))
    missing = [(arm, size) for size in summary["batch_sizes"] for arm in ARMS if (arm, size) not in found]
    reasons = dict.fromkeys(reason_of_none(arm, size) for arm, size in missing)
    arms = "; ".join(f"{name}: {arm.what}" for name, arm in ARMS.items())
    notes = [
        f"Test accuracy (%) with its 95 % interval over {summary['seeds']} seeds (Student's t), by rows a batch. "
        f"Each arm at its own best of {summary['rates']} rates, by validation rows; {summary['examples']} rows seen.",
        f"{arms}.",
        *(f"No number of {reason}." for reason in reasons if reason),
    ]
    name = {id(row): f"{row['arm']} at {row['batch_size']}" for row in summary["arms"]}
    notes += note_edges((name[id(row)], row["edge"]) for row in summary["arms"])
    notes += note_diverged((name[id(row)], row["diverged"]) for row in summary["arms"])
    return Sheet(("rows", *ARMS), tuple(rows), tuple(notes))


def _cell(row: dict[str, Any]) -> str:
    return say_half(Interval(**row["interval"]))


def draw(summary: Summary) -> Figure:
    """Draw errors on test rows against the batch size, a line per arm."""
    sizes = summary["batch_sizes"]
    small, _ = _ends(summary, "plain")
    wrong = {row["arm"]: 1 - row["interval"]["mean"] for row in summary["arms"] if row["batch_size"] == small}
    errors = {arm: points(value) for arm, value in wrong.items()}
    worst = "the most errors" if wrong["plain"] == max(wrong.values()) else "not the most errors"
    title = (
        f"With {small} rows a batch, batch norm makes {worst}: {errors['plain']} %, with statistics taken anew "
        f"{errors['recal.']} %, batch renormalization {errors['renorm']} %, group norm {errors['group']} %, no norm at "
        f"all {errors['none']} %"
    )
    steps = [f"{summary['examples'] // size} of {size}" for size in (sizes[0], sizes[-1])]
    note = (
        f"digits, three hidden layers of 128; mean and 95 % interval of {summary['seeds']} seeds; each arm at its best "
        f"learning rate; {summary['examples']} rows seen: the larger the batch, the fewer steps "
        f"({' or '.join(steps)}), which alone may add errors; batch norm needs 2 rows; ghost has groups of {GHOST}; "
        "differences are taken seed by seed: arms can differ though their bars overlap"
    )
    figure, axes = blank(title, note)
    for number, ((name, arm), look) in enumerate(zip(ARMS.items(), OF_ARMS, strict=True)):
        rows = [row for row in summary["arms"] if row["arm"] == name]
        # Side by side, so that no interval hides another.
        places = [row["batch_size"] * 2 ** (0.05 * (number - (len(ARMS) - 1) / 2)) for row in rows]
        draw_intervals(axes, places, [_error(row) for row in rows], look, arm.label)
    axes.set(xscale="log", yscale="log", xlabel="rows a batch", ylabel="errors on test rows (%), logarithmic")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    name_places(axes, (1, 2, 3, 5, 10, 20, 30, 50, 90))
    put_legend_beside(figure, axes)
    return figure


def _error(row: dict[str, Any]) -> Interval:
    """Return the errors in percent, where a logarithm shows them."""
    found = Interval(**row["interval"])
    mean, low, high = (min(100.0, max(0.1, 100 * (1 - value))) for value in (found.mean, found.high, found.low))
    return Interval(mean, low, high)


BATCH_SIZE = Study(
    "batch-size",
    "What do small batches cost batch normalization, and what helps?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
