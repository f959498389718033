"""``shift``: whether inputs and gradients of a layer shift less with batch norm, and whether that is why it helps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jbn.studies.figures import LOOKS, OF_BATCH_NORM, OF_NONE, Look, draw_bands, name_places, panels
from jbn.studies.intervals import Chosen, Interval, choose_rate, conclude, decide, interval, note_edges
from jbn.studies.networks import BatchNorm, Bias, Dense, Norm
from jbn.studies.noise import Noisy
from jbn.studies.steps import drift, landscape, loss_at, shift_of_gradients, size_of
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Parts, Plan, Probe, Step, accuracies, note_diverged, sweep

Judge: TypeAlias = Callable[[Summary], Outcome]

WIDTH = 64
BATCH = 60
FIXED = 256  # rows of training whose distribution is followed
SEEN = 512  # rows of each part by which accuracies are told on the way
# How far one goes along the gradient: so many times a learning rate, and so many times a share of the norm of kernels.
MULTIPLES, LENGTH, SHARE = (0.5, 1.0, 2.0, 4.0), 0.1, 0.005
RATES = f"{MULTIPLES[0] * LENGTH:g} to {MULTIPLES[-1] * LENGTH:g}"
SHARES = f"{MULTIPLES[0] * SHARE:.2%} to {MULTIPLES[-1] * SHARE:.0%} of the norm of all kernels"
NEARLY = 1.0  # points by which an accuracy may be lower and still be nearly the same


@dataclass(frozen=True)
class Quantity:
    """What is measured of a step: its name in the table, what it is, and whether it is told by ratios."""

    label: str
    what: str
    ratio: bool = True


QUANTITIES = {
    "drift": Quantity(
        "drift of inputs", "how far a step moves mean and deviation of what a ReLU is given, in standard deviations"
    ),
    "sums": Quantity("drift of sums", "the same of what is normalized, or given a bias, in front of the ReLU"),
    "shift": Quantity("|G - G'|", "how far the step of earlier layers moves the gradient of a layer's kernel"),
    "shift_share": Quantity("|G - G'|/|G|", "the same in units of the gradient"),
    "cosine": Quantity("cos(G, G')", "the cosine of the angle between the two", ratio=False),
    "loss": Quantity("loss range", f"along the gradient, at learning rates of {RATES}"),
    "change": Quantity("grad. change", "how far the gradient moves there at most"),
    "smoothness": Quantity("- by the way", "the same by the way, at most (effective smoothness)"),
    "loss_far": Quantity("loss range, rel.", f"the same {SHARES} away"),
    "change_far": Quantity("grad., rel.", "how far the gradient moves there at most, in units of its length"),
}
# As a sentence has them, where the table has no room for it.
SAID = {
    "training": "accuracy on training rows, on average over the steps",
    "change": "change of the gradient",
    "loss_far": "loss range over the same share of the norm",
    "change_far": "change of the gradient in its own length, over the same share of the norm",
}
LABELS = {"training": "training %", "test": "test %"} | {name: each.label for name, each in QUANTITIES.items()}


@dataclass(frozen=True)
class Arm:
    """What is compared: its name in the figure, what it is, what follows each kernel, and how its line looks."""

    label: str
    what: str
    norm: Norm
    look: Look


ARMS = {
    "none": Arm("none", "a bias alone", Bias(), OF_NONE),
    "batch": Arm("batch norm", "batch norm", BatchNorm(0.9), OF_BATCH_NORM),
    "noisy": Arm(
        "noisy batch norm",
        "batch norm and then noise, whose mean and scale are drawn anew at each step, as in their appendix A",
        Noisy(BatchNorm(0.9)),
        LOOKS[1],
    ),
}
SAME_RATE = "same rate"  # batch norm at the learning rate of the network without it


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


def _scale(name: str) -> tuple[bool, int]:
    """Return whether a quantity is told by ratios, and the factor that makes percent of accuracies."""
    return name in QUANTITIES and QUANTITIES[name].ratio, 1 if name in QUANTITIES else 100


def _values(summary: Summary, arm: str, name: str) -> np.ndarray:
    """Return a quantity of an arm (seeds, looks), its logarithm where it is told by ratios; NaN where it is none."""
    (row,) = (row for row in summary["arms"] if row["arm"] == arm)
    found = np.asarray(row["values"][name], float)
    return np.log(np.where(found > 0, found, np.nan)) if _scale(name)[0] else found


def _interval(values: np.ndarray, ratio: bool) -> Interval | None:
    """Return the interval of the seeds whose number is finite, out of logarithms again; None for fewer than two."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return None
    found = interval(finite)
    return Interval(*np.exp([found.mean, found.low, found.high]).tolist()) if ratio else found


def _compare(name: str, one: str, other: str, *, least: float = -math.inf, most: float = math.inf) -> Judge:
    """Return the judgement of a quantity: how one arm stands to the other, seed by seed, by means over the steps."""
    ratio, factor = _scale(name)

    def find(summary: Summary, one: str, name: str = name, *, first: bool = False) -> tuple[Interval | None, str]:
        values = [_values(summary, arm, name) for arm in (one, other)]
        means = [each[:, 0] if first else each.mean(1) for each in values]
        differences = factor * (means[0] - means[1])
        by, seeds = _interval(differences, ratio), int(np.isfinite(differences).sum())
        if by is None:
            return None, "fewer than two seeds have numbers in both"
        unit = " times" if ratio else " points" if factor > 1 else ""
        text = f"{by.mean:.2g}{unit} ({by.low:.2g} to {by.high:.2g})"
        # Those that diverged may be what the claim is about: what the others say decides nothing.
        return (None, f"{text}, {seeds} seeds alone") if seeds < len(differences) else (by, text)

    def judge(summary: Summary) -> Outcome:
        by, text = find(summary, one)
        label = SAID.get(name, LABELS[name])
        names = [ARMS[arm].label if arm != "none" else "no norm" for arm in (one, other)]
        what = f"{names[0]} as a multiple of {names[1]}" if ratio else f"{names[0]} less {names[1]}"
        sentence = f"{label[:1].upper()}{label[1:]}, {what}, each at its own rate: {text}."
        if one == "batch" and other == "none":
            sentence += f" At the rate of the latter: {find(summary, SAME_RATE)[1]}."
            begun, begun_text = find(summary, one, first=True)
            turned = _side(by, ratio) * _side(begun, ratio) < 0
            sentence += f" Before the first step{' it is the other way round' * turned}: {begun_text}."
        if name == "drift" and one == "batch":
            sentence += (
                " Batch norm fixes mean and deviation of these inputs by construction; drift of the sums in front of "
                f"it, which nothing fixes: {find(summary, one, 'sums')[1]}."
            )
        if by and name not in QUANTITIES:
            # An accuracy at an edge of the grid may be better than it was seen to be.
            edges = [(row["arm"], row["edge"]) for arm in (one, other) for row in summary["arms"] if row["arm"] == arm]
            return conclude(sentence, by, edges, least=least, most=most)
        return Outcome(sentence, decide(by, least=least, most=most) if by else "not decided within the intervals")

    return judge


def _side(found: Interval | None, same: float = 0) -> int:
    """Return 1 where a difference is above ``same``, -1 where it is below, 0 where its interval does not say."""
    return 0 if found is None else int(found.low > same) - int(found.high < same)


SANTURKAR = "Santurkar et al. 2018"
CLAIMS = (
    Claim(
        "Batch norm reduces internal covariate shift: the change of a layer's inputs due to a step of the parameters",
        "Ioffe and Szegedy 2015, sections 2 and 3, figure 1b and c",
        _compare("drift", "batch", "none", most=1),
    ),
    Claim(
        "With noise after batch norm, inputs are less stable than without batch norm",
        f"{SANTURKAR}, section 2.1, figure 2",
        _compare("drift", "noisy", "none", least=1),
    ),
    Claim(
        f"With that noise it trains nearly as fast as batch norm all the same (at most {NEARLY:g} point less)",
        f"{SANTURKAR}, section 2.1, figure 2",
        _compare("training", "noisy", "batch", least=-NEARLY),
    ),
    Claim(
        "With that noise it trains faster than without batch norm",
        f"{SANTURKAR}, section 2.1, figure 2",
        _compare("training", "noisy", "none", least=0),
    ),
    Claim(
        "Batch norm does not reduce the shift of gradients but often increases it, as a distance",
        f"{SANTURKAR}, definition 2.1, figure 3",
        _compare("shift", "batch", "none", least=1),
    ),
    Claim(
        "It increases the shift of gradients as an angle, whose cosine falls",
        f"{SANTURKAR}, figure 3",
        _compare("cosine", "batch", "none", most=0),
    ),
    Claim(
        "With batch norm the loss varies less along the gradient, over the same learning rates",
        f"{SANTURKAR}, section 3.1, figure 4a",
        _compare("loss", "batch", "none", most=1),
    ),
    Claim(
        "With batch norm the gradient changes less along itself, over the same learning rates",
        f"{SANTURKAR}, section 3.1, figure 4b",
        _compare("change", "batch", "none", most=1),
    ),
    Claim(
        "The loss varies less also over the same share of the norm of kernels, whose scale decides nothing then",
        f"figure 4a of {SANTURKAR}, made free of scale",
        _compare("loss_far", "batch", "none", most=1),
    ),
    Claim(
        "The gradient changes less also in units of its own length, over the same share of the norm of kernels",
        f"figure 4b of {SANTURKAR}, made free of scale",
        _compare("change_far", "batch", "none", most=1),
    ),
)


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
    ratio, factor = _scale(name)
    found = _interval(factor * _values(summary, arm, name).mean(1), ratio)
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
        f"{_network(summary)}, each arm at its best learning rate; means, and 95 % intervals of {summary['seeds']} "
        "seeds. Drift: how far a step moves mean and deviation of a unit (not each row), in standard deviations; noise "
        "is drawn anew. G, G': before and after the step of earlier layers. Range: at learning rates of "
        f"{RATES}. In the title: means over the steps."
    )
    figure, grid = panels(_title(summary), note, [title for title, _ in SHOWN.values()], columns=3, height=6.4)
    for axes, (name, (_, unit)) in zip(grid, SHOWN.items(), strict=True):
        steps = summary["probes" if name in QUANTITIES else "looks"]
        for arm, kind in ARMS.items():
            found = [_interval(_scale(name)[1] * each, _scale(name)[0]) for each in _values(summary, arm, name).T]
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


def _title(summary: Summary) -> str:
    """Say what noise does to drift and to training, and what batch norm does without it."""
    pairs = ([_values(summary, arm, name).mean(1) for arm in ("noisy", "none")] for name in ("drift", "training"))
    drifts, accuracies = (_side(_interval(noisy - none, ratio=False)) for noisy, none in pairs)
    drift, seen, sums = (
        [_text(summary, arm, name).split()[0] for arm in ARMS] for name in ("drift", "training", "sums")
    )
    return (
        f"With noise after batch norm a ReLU's inputs drift {('as much as', 'more than', 'less than')[drifts]} without "
        f"norm ({drift[2]} against {drift[0]} deviations), {'yet' if drifts * accuracies > 0 else 'and'} it trains "
        f"{('as fast', 'faster', 'more slowly')[accuracies]} (accuracy {seen[2]} against {seen[0]} % on average over "
        f"the steps). Batch norm alone fixes their mean and deviation ({drift[1]}; sums in front of it {sums[1]}): "
        f"{seen[1]} %"
    )


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
