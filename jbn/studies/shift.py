"""``shift``: whether inputs and gradients of a layer shift less with batch norm, and whether that is why it helps."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jbn.studies.figures import draw_bands, name_places, panels
from jbn.studies.intervals import Chosen, choose_rate, note_edges
from jbn.studies.networks import BatchNorm, Dense
from jbn.studies.shift_claims import (
    ARMS,
    CLAIMS,
    LABELS,
    LENGTH,
    MULTIPLES,
    QUANTITIES,
    RATES,
    SAME_RATE,
    SHARE,
    interval_of,
    scale_of,
    side_of,
    values_of,
)
from jbn.studies.steps import drift, landscape, loss_at, shift_of_gradients, size_of
from jbn.studies.study import Cell, Measured, Numbers, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Parts, Plan, Probe, Step, accuracies, note_diverged, sweep

WIDTH = 64
BATCH = 60
FIXED = 256  # rows of training whose distribution is followed
SEEN = 512  # rows of each part by which accuracies are told on the way


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: data, hidden layers, seeds, learning rates, steps, and how often one looks."""

    data: str
    layers: int
    seeds: int
    rates: tuple[float, ...]
    steps: int
    looks: int


EXTENTS: dict[str, Extent] = {
    "quick": Extent("digits", 1, 2, (0.1, 1.0), 4, 2),
    "default": Extent("mnist", 5, 10, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 300, 12),
    "full": Extent("mnist", 5, 20, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0), 900, 30),
}


def cells(size: Size) -> list[Cell]:
    """Return a cell for each arm."""
    extent = asdict(EXTENTS[size])
    return [Cell(arm, {"arm": arm} | extent | {"rates": list(extent["rates"])}) for arm in ARMS]


def measure(settings: Settings) -> Numbers:
    """Return accuracies and ``QUANTITIES`` of an arm, each (seeds, rates, looks)."""
    arm, data, steps = settings["arm"], settings["data"], settings["steps"]
    widths = (PIXELS[data], *[WIDTH] * settings["layers"], CLASSES)
    network = Dense(widths, ARMS[arm].norm)
    # Networks with batch norm are evaluated by the statistics that training rows have at that moment, without noise.
    still = network if arm == "none" else Dense(widths, BatchNorm(momentum=0.0))
    begin = still.init(0)[1]

    def read(params: Any, states: Any, x: Array) -> Any:
        return still(params, begin, x, True, jnp.int32(0))[1]

    def look(params: Any, states: Any, parts: Parts) -> Any:
        return accuracies(still, read)(params, states, jax.tree.map(lambda rows: rows[:SEEN], parts))

    rates, seeds, looks = tuple(settings["rates"]), settings["seeds"], settings["looks"]
    # At a rate that falls to 0 everything would come to rest.
    plan = Plan(rates, seeds, BATCH, steps * BATCH, data, looks=looks, decay=False)
    found = sweep(network, plan, {"seen": look}, {"step": probe_of(network)})
    return found["seen"]._asdict() | found["step"]


def probe_of(network: Dense) -> Probe:
    """Return what measures ``QUANTITIES`` of a step."""

    def probe(step: Step, parts: Parts) -> dict[str, Array]:
        loss = loss_at(network, step)
        grads = jax.grad(loss)(step.params)
        after = jax.tree.map(lambda param, grad: param - step.rate * grad, step.params, grads)
        drifts = drift(network, step, after, parts.training.x[:FIXED])
        gradients = shift_of_gradients(loss, step.params, after)
        share = SHARE * size_of(step.params["kernels"]) / size_of(grads)
        along = landscape(loss, step.params, grads, jnp.stack([jnp.asarray(LENGTH), share]), MULTIPLES)
        return {
            "drift": drifts["made"],
            "sums": drifts["given"],
            "shift": gradients["shift"],
            "shift_share": gradients["share"],
            "cosine": gradients["cosine"],
            "loss": along["range"][0],
            "change": along["change"][0],
            "smoothness": along["smoothness"][0],
            "loss_far": along["range"][1],
            "change_far": along["share"][1],
        }

    return probe


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each arm, at the rate that validation rows chose, accuracies and quantities over the steps."""
    settings = measured[0].settings
    numbers = {each.settings["arm"]: each.numbers for each in measured}
    # How well it does on the way, not at the end alone: the question is how fast an arm trains.
    chosen = {arm: choose_rate(np.asarray(each["validation"], float).mean(2)) for arm, each in numbers.items()}
    rows = [_summarize(arm, settings, numbers[arm], chosen[arm]) for arm in ARMS]
    rows.append(_summarize("batch", settings, numbers["batch"], replace(chosen["none"], edge="")) | {"arm": SAME_RATE})
    every = settings["steps"] // settings["looks"]
    return {
        "data": settings["data"],
        "layers": settings["layers"],
        "seeds": settings["seeds"],
        "rates": len(settings["rates"]),
        "steps": settings["steps"],
        "looks": [every * look for look in range(1, settings["looks"] + 1)],
        "probes": [every * look for look in range(settings["looks"])],
        "arms": rows,
    }


def _summarize(arm: str, settings: Settings, numbers: Numbers, chosen: Chosen) -> dict[str, Any]:
    found = {name: np.asarray(numbers[name], float)[:, chosen.index] for name in ("training", "test", *QUANTITIES)}
    return {
        "arm": arm,
        "rate": settings["rates"][chosen.index],
        "edge": chosen.edge,
        "diverged": int(np.asarray(numbers["diverged"], float)[:, chosen.index, -1].sum()),
        # null where a network has diverged.
        "values": {name: [[_plain(one) for one in row] for row in each.tolist()] for name, each in found.items()},
    }


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def tabulate(summary: Summary) -> Sheet:
    """Return means over the steps, a row per quantity, a column per arm."""
    names = [row["arm"] for row in summary["arms"]]
    rates = tuple(f"{row['rate']:g}" for row in summary["arms"])
    rows = [("learning rate", *rates)]
    for name, label in LABELS.items():
        rows.append((label, *(_text(summary, arm, name) for arm in names)))
    arms = "; ".join(f"{name}: {arm.what}" for name, arm in ARMS.items())
    of = "; ".join(f"{each.label.strip()}: {each.what}" for each in QUANTITIES.values())
    notes = [
        f"{_network(summary)}, {summary['steps']} steps of {BATCH} rows. "
        f"Means over the steps (of what is told by ratios the geometric one), with 95 % intervals over "
        f"{summary['seeds']} seeds (Student's t). Each arm at its own best of {summary['rates']} rates, by the "
        "accuracy on validation rows, on average over the steps.",
        f"{arms}; {SAME_RATE}: batch norm at the rate of the network without.",
        f"{of}.",
    ]
    notes += note_edges((row["arm"], row["edge"]) for row in summary["arms"])
    diverged = note_diverged((row["arm"], row["diverged"]) for row in summary["arms"])
    notes += [*diverged, "The other numbers are without these seeds, and such claims undecided."] if diverged else []
    return Sheet(("", *names), tuple(rows), tuple(notes))


def _text(summary: Summary, arm: str, name: str) -> str:
    ratio, factor = scale_of(name)
    found = interval_of(factor * values_of(summary, arm, name).mean(1), ratio)
    if found is None:
        return "-"
    return f"{found.mean:.1f} ±{found.half:.1f}" if factor > 1 else f"{found.mean:.2g} ±{found.half:.1g}"


def _network(summary: Summary) -> str:
    return f"{'MNIST' if summary['data'] == 'mnist' else summary['data']}, {summary['layers']} hidden layers of {WIDTH}"


# What the figure shows: what stands above a panel, and its unit.
SHOWN = {
    "training": ("Accuracy on training rows", "%"),
    "sums": ("Drift of sums, in front of the norm", "standard deviations"),
    "drift": ("Drift of inputs, after the norm (it fixes them)", "standard deviations"),
    "shift": ("Shift of a layer's gradient", "|G - G'|"),
    "loss": ("Range of the loss along the gradient", "nats"),
}


def draw(summary: Summary) -> Figure:
    """Draw accuracies, drifts, the shift of gradients and the range of the loss over the steps, a line per arm."""
    note = (
        f"{_network(summary)}, each arm at its best learning rate; means, of all but accuracies geometric ones, and "
        f"95 % intervals of {summary['seeds']} seeds. Drift: how far a step moves mean and deviation of a unit (not "
        "each row), in standard deviations; noise is drawn anew. G, G': before and after the step of earlier layers. "
        "Range: at learning rates of "
        f"{RATES}. In the title: means over the steps.{_say_begun(summary)}"
    )
    figure, grid = panels(_title(summary), note, [title for title, _ in SHOWN.values()], columns=3, height=6.4)
    for axes, (name, (_, unit)) in zip(grid, SHOWN.items(), strict=True):
        steps = summary["probes" if name in QUANTITIES else "looks"]
        for arm, kind in ARMS.items():
            found = [
                interval_of(scale_of(name)[1] * each, scale_of(name)[0]) for each in values_of(summary, arm, name).T
            ]
            shown = [(step, each) for step, each in zip(steps, found, strict=True) if each]
            draw_bands(axes, [step for step, _ in shown], [each for _, each in shown], kind.look, kind.label)
        axes.set(xlabel="step", ylabel=unit, yscale="linear" if name == "training" else "log")
    # What is fixed and what is not have one axis, so that they can be compared.
    ends = [end for axes in grid[1:3] for end in axes.get_ylim()]
    for axes in grid[1:]:
        axes.set_ylim((min(ends), max(ends)) if axes in grid[1:3] else None)
        digits = (1, 3) if np.divide(*axes.get_ylim()) < 1 / 30 else (1, 2, 5)
        name_places(axes, [digit * 10.0**power for power in range(-6, 4) for digit in digits])
    grid[-1].legend(loc="center left", bbox_to_anchor=(1.15, 0.5), frameon=False, handlelength=4).set_in_layout(False)
    return figure


# By ``side_of``, whose 0 is what the intervals leave open.
_DRIFTS = ("not clearly more or less than", "more than", "less than")
_LEARNS = ("not clearly faster or slower", "faster", "more slowly")


def _title(summary: Summary) -> str:
    """Say what noise does to drift and to training, and what batch norm does without it."""
    pairs = ([values_of(summary, arm, name).mean(1) for arm in ("noisy", "none")] for name in ("drift", "training"))
    drifts, accuracies = (side_of(interval_of(noisy - none, ratio=False)) for noisy, none in pairs)
    drift, seen, sums = (
        [_text(summary, arm, name).split()[0] for arm in ARMS] for name in ("drift", "training", "sums")
    )
    return (
        f"With noise after batch norm what a ReLU is given drifts {_DRIFTS[drifts]} without norm ({drift[2]} against "
        f"{drift[0]}), {'yet' if drifts * accuracies > 0 else 'and'} the network learns {_LEARNS[accuracies]}: "
        f"{seen[2]} against {seen[0]} % of training rows right on average. Without noise batch norm fixes mean, "
        f"deviation: drift {drift[1]} (in front of it {sums[1]}), {seen[1]} %"
    )


def _say_begun(summary: Summary) -> str:
    """Return what the logarithmic axes hardly show: how batch norm stands to none before anything is learned."""
    told = []
    for name, what in (("shift", "the shift of gradients"), ("loss", "the range of the loss")):
        batch, none = (values_of(summary, arm, name)[:, 0] for arm in ("batch", "none"))
        if by := interval_of(batch - none, ratio=True):
            is_what = ("undecided", "larger", "smaller")[side_of(by, 1)]
            told.append(f"{what} is {is_what}, {by.mean:.2g} times ({by.low:.2g} to {by.high:.2g})")
    return f" Before the first step, batch norm beside none: {'; '.join(told)}." * bool(told)


SHIFT = Study(
    "shift",
    "Do inputs and gradients of a layer shift less with batch norm, and does it train faster where they do?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
