"""``convergence``: steps to an accuracy with and without batch normalization, and what a unit is given meanwhile."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jbn.studies.convergence_claims import (
    ARMS,
    CASES,
    CLAIMS,
    LEVEL,
    ends_better,
    exp_of,
    find,
    is_faster,
    say_begin_at_0,
    speed_up,
    steps_of,
)
from jbn.studies.figures import (
    LOOKS,
    OF_BATCH_NORM,
    OF_NONE,
    draw_bands,
    draw_intervals,
    name_places,
    panels,
    put_legend_beside,
)
from jbn.studies.intervals import (
    Interval,
    choose_rate,
    interval,
    note_edges,
    points,
    say_half,
)
from jbn.studies.networks import Activation, BatchNorm, Bias, Dense, FromZero, Network, Norm, Residual
from jbn.studies.percentiles import percentiles, travel
from jbn.studies.study import Cell, Measured, Numbers, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Plan, note_diverged, sweep, unseen

WIDTHS = (PIXELS["mnist"], 100, 100, 100, CLASSES)
SHALLOW = (PIXELS["mnist"], 16, CLASSES)  # at the size "quick", where compiling takes the time
BLOCKS = (8, 8, 16)  # features of the first convolution and of each block
MOMENTUM = 0.9
UNIT = 0  # the one that is drawn, named before anything was trained
TRAVEL = (
    "travel from evaluation to evaluation in all (mean of the three), over their spread (15th to 85th, mean of the "
    "evaluations); median over the units of the last hidden layer, mean over seeds"
)
LABELS = ARMS | {"from 0": "none, branches\nbegin at 0"}  # in the figure
OF_ARMS = {"batch norm": OF_BATCH_NORM, "none": OF_NONE, "from 0": LOOKS[1]}


@dataclass(frozen=True)
class Extent:
    """How much is measured of a network: seeds, rates, steps, looks on the way; ``widths`` are its features."""

    seeds: int
    rates: tuple[float, ...]
    steps: int
    looks: int
    widths: tuple[int, ...] = WIDTHS


EXTENTS: dict[str, dict[str, Extent]] = {
    "quick": {
        "sigmoid": Extent(2, (0.3, 1.0), 4, 2, SHALLOW),
        "relu": Extent(2, (0.1, 0.3), 4, 2, SHALLOW),
        "residual": Extent(2, (0.1, 0.3), 2, 1, (2, 2)),
    },
    "default": {
        "sigmoid": Extent(10, (1.0, 3.0, 10.0), 1200, 40),
        "relu": Extent(10, (0.1, 0.3, 1.0), 360, 36),
        "residual": Extent(10, (0.15, 0.3, 0.6), 240, 24, BLOCKS),
    },
    "full": {
        "sigmoid": Extent(20, (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 20000, 100),
        "relu": Extent(20, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 2000, 100),
        "residual": Extent(20, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 1000, 100, BLOCKS),
    },
}


def cells(size: Size) -> list[Cell]:
    """Return a cell for each arm of each network."""
    return [
        Cell(
            f"{name}-{arm.replace(' ', '-')}",
            {"case": name, "arm": arm, **asdict(extent), "rates": list(extent.rates), "widths": list(extent.widths)},
            work=5 + extent.seeds * len(extent.rates) * extent.steps * (0.003 if name == "residual" else 0.001),
        )
        for name, extent in EXTENTS[size].items()
        for arm in CASES[name].arms
    ]


def network_of(name: str, arm: str, widths: tuple[int, ...]) -> Network:
    """Return the network of a case with what an arm has in place of batch norm."""
    activation: Activation = jax.nn.sigmoid if name == "sigmoid" else jax.nn.relu
    norm: Norm = BatchNorm(MOMENTUM, activation=activation) if arm == "batch norm" else Bias(activation)
    if name == "residual":
        return (FromZero if arm == "from 0" else Residual)(8, norm, widths)
    return Dense(widths, norm, variance=1.0 if name == "sigmoid" else 2.0)


def measure(settings: Settings) -> Numbers:
    """Return accuracies (seeds, rates, looks) of an arm and, of a dense network, how far what units are given moves."""
    case = CASES[settings["case"]]
    network = network_of(settings["case"], settings["arm"], tuple(settings["widths"]))
    rates, seeds, examples = tuple(settings["rates"]), settings["seeds"], case.batch_size * settings["steps"]
    plan = Plan(rates, seeds, case.batch_size, examples, case.data, looks=settings["looks"], decay=False)
    looks = {"accuracy": unseen(network)}
    if isinstance(network, Dense):
        looks["percentiles"] = percentiles(network)
    found = sweep(network, plan, looks)
    seen = found["accuracy"]
    numbers = {"validation": seen[..., 0], "test": seen[..., 1], "diverged": ~np.isfinite(found["loss"]).all(-1)}
    if "percentiles" in found:
        numbers |= {"travel": travel(found["percentiles"]), "unit": found["percentiles"][0, ..., UNIT]}
    return numbers


def steps_to(level: float, accuracy: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return after how many steps accuracies (..., looks) first reach a level, and whether they do.

    Where they never do it is the number of steps that were made: at least so many are needed.
    """
    enough = np.asarray(accuracy, float) >= level
    reached, looks = np.asarray(enough.any(-1)), enough.shape[-1]
    return np.where(reached, (enough.argmax(-1) + 1) * steps // looks, steps), reached


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each arm the rates that validation rows chose, and what test rows say of them."""
    return {
        "seeds": measured[0].settings["seeds"],
        "arms": [_summarize(each.settings, each.numbers) for each in measured],
    }


def _summarize(settings: Settings, numbers: Numbers) -> dict[str, Any]:
    validation, test = (np.asarray(numbers[name], float) for name in ("validation", "test"))
    needed, reached = steps_to(LEVEL, validation, settings["steps"])
    # Of two rates that need as many steps the one that ends higher: what never gets there needs a step more at least.
    fast, end = choose_rate(validation[..., -1] / 2 - needed - ~reached), choose_rate(validation[..., -1])
    needed, reached = steps_to(LEVEL, test[:, fast.index], settings["steps"])
    row = {name: settings[name] for name in ("case", "arm", "steps", "looks")} | {
        "rate": settings["rates"][fast.index],
        "edge": fast.edge,
        "needed": needed.tolist(),
        "reached": reached.tolist(),
        "curve": [asdict(interval(values)) for values in test[:, fast.index].T],
        "end_rate": settings["rates"][end.index],
        "end_edge": end.edge,
        "test_accuracy": [round(value, 6) for value in test[:, end.index, -1].tolist()],
        "interval": asdict(interval(test[:, end.index, -1])),
        "diverged": int(np.asarray(numbers["diverged"])[:, [fast.index, end.index]].any(1).sum()),
    }
    if "travel" in numbers:
        row |= {"travel": [each[fast.index] for each in numbers["travel"]], "unit": numbers["unit"][fast.index]}
    return row


def tabulate(summary: Summary) -> Sheet:
    """Return steps, accuracies and movement, a row for each arm of each network."""
    rows = []
    for row in summary["arms"]:
        end, way = Interval(**row["interval"]), np.asarray(row.get("travel", np.nan), float).mean()
        needed = f"{'' if all(row['reached']) else '≥'}{steps_of(row).mean:.0f}"
        texts = (f"{row['rate']:g}", needed, f"{row['end_rate']:g}", say_half(end))
        moves = f"{way:.2f}" if "travel" in row else "-"
        rows.append((f"{CASES[row['case']].label}, {row['arm']}", *texts, moves))
    notes = [
        f"steps: to {LEVEL:.0%} of the test rows, geometric mean over {summary['seeds']} seeds, at the learning rate "
        "that needs fewest on validation rows (rate). ≥: some seeds do not get there, and count as the steps that were "
        "made.",
        "end: test accuracy (%) after all steps with its 95 % interval (Student's t), at the learning rate that ends "
        "highest on validation rows (end rate).",
        f"moves: how far the 15th, 50th and 85th percentile of what a unit is given for validation rows {TRAVEL}. "
        "Batch norm takes the statistics of these rows, as in training.",
        f"{'; '.join(f'{case.label}: {case.what}, {case.batch_size} rows a step' for case in CASES.values())}. Plain "
        "gradient descent at a rate that stays; from 0: no norm, each branch times a number that begins at 0.",
    ]
    for name, what in (("edge", "of fewest steps"), ("end_edge", "that ends highest")):
        notes += note_edges(((f"{row['case']} {row['arm']}", row[name]) for row in summary["arms"]), f"The rate {what}")
    notes += note_diverged((f"{row['case']} {row['arm']}", row["diverged"]) for row in summary["arms"])
    return Sheet(("network, norm", "rate", "steps", "end rate", "end", "moves"), tuple(rows), tuple(notes))


def draw(summary: Summary) -> Figure:
    """Draw accuracies over steps for each network, a unit's percentiles without and with batch norm, and steps."""
    times = [_say_times(summary, case) for case in CASES]
    fewer = sum(is_faster(case)(summary).verdict == "holds" for case in CASES)
    title = (
        f"Batch norm reaches {LEVEL:.0%} in fewer steps in {fewer} of {len(CASES)} networks: without it, sigmoid units "
        f"need {times[0]} as many, ReLU units {times[1]}, a residual network {times[2]}"
    )
    note = (
        f"Above: mean and 95 % interval of {summary['seeds']} seeds on test rows, each arm at the learning rate of its "
        f"fewest steps.{_say_other_ends(summary)}{say_begin_at_0(summary)} Below: the 15th, 50th and 85th percentile "
        f"of what one sigmoid is given; travel: from evaluation to evaluation, in all. Steps to "
        f"{LEVEL:.0%}: geometric mean; seeds pass {LEVEL:.0%} at different steps, so the mean curve may cross later; a "
        "seed that does not get there counts as all the steps made."
    )
    units = find(summary, "sigmoid", "none", "batch norm")
    below = [
        f"{row['arm']}: unit {UNIT}, seed 0\n(median unit of its layer:\ntravel {np.mean(row['travel']):.2f} × spread)"
        for row in units
    ]
    names = [*(case.what for case in CASES.values()), *below, f"steps to {LEVEL:.0%}"]
    figure, axes = panels(title, note, names, columns=3, height=6.9)
    for name, place in zip(CASES, axes, strict=False):
        _draw_curves(place, [row for row in summary["arms"] if row["case"] == name])
        level = f"{LEVEL:.0%}, to be reached" * (place is axes[2])  # below the arms in the legend
        place.axhline(100 * LEVEL, color="0.5", linewidth=0.8, label=level)
    _draw_units(axes[3:5], units)
    _draw_steps(axes[5], summary)
    axes[0].set_ylabel("test accuracy (%)")
    axes[3].set_ylabel("input of a sigmoid")
    put_legend_beside(figure, *axes[:3])
    return figure


def _say_times(summary: Summary, case: str) -> str:
    norm, none = find(summary, case, "batch norm", "none")
    there, seeds = none["reached"].count(True), len(none["reached"])
    bound = "about " if not all(norm["reached"]) else "at least " if there < seeds else ""
    some = f" ({there} of {seeds} seeds get there)" if there < seeds else ""
    return f"{bound}{exp_of(speed_up(summary, case)).mean:.1f} times{some}"


def _say_other_ends(summary: Summary) -> str:
    """Return how arms end at their best, of networks where this is not all drawn, "" where it is."""
    told: list[str] = []
    for name, case in CASES.items():
        rows = find(summary, name, *case.arms)
        ends = ", ".join(f"{ARMS[row['arm']]} {points(row['interval']['mean'])} %" for row in rows)
        verdict = ends_better(name, "batch norm", "none", 0)(summary).verdict
        open_ends = ["undecided"] * (verdict == "not decided within the intervals")
        open_ends += [
            f"{ARMS[row['arm']]}'s rate, {row['end_rate']:g}, is the {row['end_edge']} tried"
            for row in rows
            if row["end_edge"]
        ]
        if any(row["end_rate"] != row["rate"] for row in rows):
            told.append(f"{case.label}: {ends}" + f" ({', '.join(open_ends)})" * bool(open_ends))
    return f" Ends, each at its best rate, not drawn: {'; '.join(told)}." * bool(told)


def _look_steps(row: dict[str, Any]) -> np.ndarray:
    return np.arange(1, row["looks"] + 1) * row["steps"] // row["looks"]


def _draw_curves(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw accuracies over steps, with bands."""
    for row in rows:
        curve = [Interval(*(100 * each[end] for end in ("mean", "low", "high"))) for each in row["curve"]]
        draw_bands(axes, _look_steps(row).tolist(), curve, OF_ARMS[row["arm"]], LABELS[row["arm"]])
    axes.set(xlabel="steps", ylim=(0, 100))


def _draw_units(places: Sequence[Axes], rows: Sequence[dict[str, Any]]) -> None:
    """Draw the percentiles of a unit's input over steps, on one scale."""
    seen = [np.asarray(row["unit"], float) for row in rows]
    for axes, row, values in zip(places, rows, seen, strict=True):
        colour = OF_ARMS[row["arm"]].colour
        axes.fill_between(_look_steps(row), values[:, 0], values[:, 2], color=colour, alpha=0.2, linewidth=0)
        axes.plot(_look_steps(row), values, color=colour, linewidth=1.2)
        axes.set(xlabel="steps", ylim=(np.nanmin(seen) - 0.2, np.nanmax(seen) + 0.2))


def _draw_steps(axes: Axes, summary: Summary) -> None:
    """Draw the steps that each arm needs."""
    for number, arm in enumerate(ARMS):
        rows = [row for row in summary["arms"] if row["arm"] == arm]
        places = [list(CASES).index(row["case"]) + 0.27 * (number - 1) for row in rows]
        draw_intervals(axes, places, [steps_of(row) for row in rows], replace(OF_ARMS[arm], line=""), LABELS[arm])
        for place, row in zip(places, rows, strict=True):
            _say_reached(axes, place, row)
    axes.set(yscale="log", xlim=(-0.5, len(CASES) - 0.3))
    axes.set_xticks(range(len(CASES)), [case.label for case in CASES.values()])
    name_places(axes, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))


def _say_reached(axes: Axes, place: float, row: dict[str, Any]) -> None:
    """Write how many seeds get there, beside the steps of an arm some of whose seeds do not."""
    reached, at = row["reached"], (place, steps_of(row).mean)
    if not all(reached):
        # Arms that are late have one height: each needs a place of its own.
        name, away, side, end = {
            "batch norm": ("batch norm", (0, -8), "center", "top"),
            "none": ("none", (-7, 5), "right", "top"),
            "from 0": ("begin at 0", (12, 9), "right", "bottom"),
        }[row["arm"]]
        said = f"{name}: {reached.count(True)} of {len(reached)}\nget there"
        axes.annotate(said, at, away, textcoords="offset points", ha=side, va=end, fontsize="small")


CONVERGENCE = Study(
    "convergence",
    "Does batch normalization reach an accuracy in fewer steps, and what is a unit given meanwhile?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
