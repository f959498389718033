"""``placement``: batch normalization before or after the activation, and which parameters beside it are of use."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jbn import bn_forward, bn_init
from jbn.studies.figures import LOOKS, OF_BATCH_NORM, OF_NONE, blank, draw_intervals
from jbn.studies.intervals import (
    Interval,
    choose_rate,
    conclude,
    interval,
    note_edges,
    open_at_edges,
    points,
    say_better,
    say_half,
    weigh,
)
from jbn.studies.networks import Dense
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CLASSES, PIXELS, Parts, Plan, note_diverged, sweep, unseen

WIDTHS = (PIXELS["mnist"], 128, 64, CLASSES)
BATCH = 60
MOMENTUM = 0.9
# How far apart two accuracies may lie and still be called the same, in every claim: with 1000 rows to test with, many
# an interval excludes 0 by less.
SAME = 0.01


@dataclass(frozen=True)
class Placed:
    """What follows a kernel: a bias or not, and around a ReLU batch norm or not.

    Attributes:
        what: this is, for the table.
        place: of the norm: "before" or "after" the ReLU, or "" for none.
        bias: whether one is added to what the kernel gives.
        scale: whether the norm has one.
    """

    what: str
    place: str = "before"
    bias: bool = False
    scale: bool = True

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return parameters and state of a layer."""
        norm, state = bn_init(features, use_scale=self.scale)
        params = {"norm": norm} if self.place else {}
        return params | ({"bias": np.zeros((1, features), np.float32)} if self.bias else {}), state

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state."""
        x = x + params["bias"] if self.bias else x
        if not self.place:
            return jax.nn.relu(x), state
        if self.place == "after":
            return bn_forward(params["norm"], state, jax.nn.relu(x), train, momentum=MOMENTUM)
        return bn_forward(params["norm"], state, x, train, momentum=MOMENTUM, activation=jax.nn.relu)


ARMS = {
    "before": Placed("kernel, norm, ReLU"),
    "biased": Placed("kernel, bias, norm, ReLU", bias=True),
    "unscaled": Placed("kernel, norm without scale, ReLU", scale=False),
    "after": Placed("kernel, bias, ReLU, norm", "after", bias=True),
    "none": Placed("kernel, bias, ReLU", "", bias=True),
}


@dataclass(frozen=True)
class Extent:
    """How much is measured: seeds, rates, and steps."""

    seeds: int
    rates: tuple[float, ...]
    steps: int


EXTENTS: dict[str, Extent] = {
    "quick": Extent(2, (0.1, 0.4), 4),
    "default": Extent(10, (0.1, 0.3, 1.0, 3.0, 10.0), 400),
    "full": Extent(20, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8), 4000),
}


def cells(size: Size) -> list[Cell]:
    """Return a cell for each arm."""
    extent = EXTENTS[size]
    return [Cell(arm, {"arm": arm} | asdict(extent) | {"rates": list(extent.rates)}) for arm in ARMS]


def largest_bias(params: Any, states: Any, data: Parts) -> Array:
    """Return a look at how large the biases are that are added to what kernels give."""
    return jnp.stack([jnp.abs(each.get("bias", jnp.zeros(1))).max() for each in params["norms"]]).max()


def measure(settings: Settings) -> Numbers:
    """Return accuracies (seeds, rates) of an arm on validation and test rows, and its largest bias."""
    network, steps = Dense(WIDTHS, ARMS[settings["arm"]]), settings["steps"]
    plan = Plan(tuple(settings["rates"]), settings["seeds"], BATCH, BATCH * steps, "mnist")
    found = sweep(network, plan, {"accuracy": unseen(network), "bias": largest_bias})
    seen = found["accuracy"][..., 0, :]
    diverged = ~np.isfinite(found["loss"][..., 0])
    return {"validation": seen[..., 0], "test": seen[..., 1], "diverged": diverged, "bias": found["bias"][..., 0]}


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each arm the rate that validation rows chose, and what test rows say of it."""
    first = measured[0].settings
    arms = {each.settings["arm"]: _summarize(each.settings, each.numbers) for each in measured}
    return {"seeds": first["seeds"], "steps": first["steps"], "rates": len(first["rates"]), "arms": arms}


def _summarize(settings: Settings, numbers: Numbers) -> dict[str, Any]:
    chosen = choose_rate(np.asarray(numbers["validation"], float))
    test = np.asarray(numbers["test"], float)[:, chosen.index]
    return {
        "rate": settings["rates"][chosen.index],
        "edge": chosen.edge,
        "test_accuracy": [round(value, 6) for value in test.tolist()],
        "interval": asdict(interval(test)),
        "diverged": int(np.asarray(numbers["diverged"])[:, chosen.index].sum()),
        "bias": float(np.nanmax(np.asarray(numbers["bias"], float)[:, chosen.index])),
    }


def _better(summary: Summary, one: str, other: str) -> Interval:
    """Return by how much an arm is better than another, seed by seed."""
    return interval(np.subtract(*(summary["arms"][arm]["test_accuracy"] for arm in (one, other))))


def _compare(
    summary: Summary, one: str, other: str, *more: str, least: float = -SAME, most: float = math.inf
) -> Outcome:
    """Return how two arms did, with more sentences, and whether by so much the first is better, seed by seed."""
    by = _better(summary, one, other)
    means = [f"{arm} {points(summary['arms'][arm]['interval']['mean'])} %" for arm in (one, other)]
    edges = [(arm, summary["arms"][arm]["edge"]) for arm in (one, other)]
    sentence = f"{', '.join(means)}: {one} is {say_better(by)}, {weigh(open_at_edges(by, edges), SAME)}."
    return conclude(" ".join([sentence, *more]), by, edges, least=least, most=most)


def _is_better(one: str, other: str, *more: str, least: float) -> Callable[[Summary], Outcome]:
    """Return the judgement whether an arm beats another by more than so much."""
    return lambda summary: _compare(summary, one, other, *more, least=least)


def _is_of_no_use(arm: str) -> Callable[[Summary], Outcome]:
    """Return the judgement whether an arm, with a parameter more or less, is the same as the plain one."""

    def judge(summary: Summary) -> Outcome:
        moved = summary["arms"][arm]["bias"]
        bias = [f"No bias is larger than {moved:.1g} after training."] * ARMS[arm].bias
        return _compare(summary, arm, "before", *bias, most=SAME)

    return judge


CLAIMS = (
    Claim(
        f"Before the activation is the better place, by more than {points(SAME)} points",
        "Ioffe and Szegedy 2015, section 3.2: there the distribution is likely more symmetric",
        _is_better("before", "after", least=SAME),
    ),
    Claim(
        "After the activation is slightly better",
        "Mishkin et al. 2016, section 3: on ImageNet",
        _is_better("after", "before", "Slightly is by any number above 0.", least=0),
    ),
    Claim(
        f"A bias before the norm is of no use, within {points(SAME)} points",
        "Ioffe and Szegedy 2015, section 3.2: the subtraction of the mean cancels it",
        _is_of_no_use("biased"),
    ),
    Claim(
        f"A scale is of no use where ReLU and a linear layer follow, within {points(SAME)} points",
        "documentation of BatchNormalization in Keras 2 (2017), scale: the next layer scales",
        _is_of_no_use("unscaled"),
    ),
)


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows, a row per arm, and by how much it is better than the norm before the ReLU."""
    rows = []
    for arm, found in summary["arms"].items():
        by = _better(summary, arm, "before")
        difference = "-" if arm == "before" else f"{round(100 * by.mean, 1) + 0:+.1f} ±{points(by.half)}"
        rows.append((arm, f"{found['rate']:g}", _accuracy(found), difference))
    why = f"; {WIDE}: it is wider than accuracies can lie" * any(WIDE in row[2] for row in rows)
    notes = [
        f"{'; '.join(f'{name}: {arm.what}' for name, arm in ARMS.items())}.",
        f"Test accuracy (%) with its 95 % interval over {summary['seeds']} seeds (Student's t{why}), and its "
        f"difference from before, seed by seed. Each arm at its own best of {summary['rates']} rates, by validation "
        "rows.",
        f"MNIST (3000 rows), 784, 128, 64, 10; {summary['steps']} steps of {BATCH} rows, plain gradient descent, a "
        "rate that falls linearly to 0.",
    ]
    notes += note_edges((arm, found["edge"]) for arm, found in summary["arms"].items())
    notes += note_diverged((arm, found["diverged"]) for arm, found in summary["arms"].items())
    return Sheet(("arm", "rate", "accuracy", "better"), tuple(rows), tuple(notes))


WIDE = "±?"


def _accuracy(found: dict[str, Any]) -> str:
    """Return an accuracy with its interval; that of two seeds may be wider than from 0 to 100 %, and says nothing."""
    by = Interval(**found["interval"])
    return say_half(by) if by.low >= 0 and by.high <= 1 else f"{points(by.mean)} {WIDE}"


LABELS = {
    "before": "before:\nkernel, norm,\nReLU",
    "biased": "biased:\na bias before\nthe norm",
    "unscaled": "unscaled:\nthe norm has\nno scale",
    "after": "after:\nnorm after\nbias and ReLU",
    "none": "none:\na bias, but\nno norm",
}
STYLES = dict(zip(ARMS, (OF_BATCH_NORM, LOOKS[1], LOOKS[3], LOOKS[5], OF_NONE), strict=True))


def draw(summary: Summary) -> Figure:
    """Draw by how much each arm is better than the norm before the ReLU, with all seeds."""
    note = (
        f"MNIST (3000 rows), 784-128-64-10, each arm at its best rate; differences of test accuracies from 'before', "
        f"seed by seed: small dots {summary['seeds']} seeds (equal ones side by side), large marks their mean and 95 % "
        "interval"
    )
    figure, axes = blank(_title(summary), note)
    axes.axhspan(-100 * SAME, 100 * SAME, color="0.92", linewidth=0)
    axes.axhline(0, color="black", linewidth=1)
    for place, (arm, look) in enumerate(STYLES.items()):
        if arm == "before":
            axes.plot([place], [0], markersize=6, **look.style)
            continue
        seeds = 100 * np.subtract(*(summary["arms"][each]["test_accuracy"] for each in (arm, "before")))
        axes.plot(place + 0.12 + 0.05 * _count_equal(seeds), seeds, ".", color="0.5", markersize=5)
        draw_intervals(axes, [place], [interval(seeds)], look, arm)
    within = f"grey: less than {points(SAME)} apart is called the same"
    axes.text(-0.45, -97 * SAME, within, va="bottom", fontsize="small", color="0.3")
    axes.set(ylabel="points better than before", xlim=(-0.5, len(STYLES) - 0.4))
    axes.set_xticks(range(len(STYLES)), [LABELS[arm] for arm in STYLES])
    axes.grid(axis="x", visible=False)
    return figure


def _count_equal(values: np.ndarray) -> np.ndarray:
    """Return of each value how many before it are the same, so that they can be drawn side by side."""
    same = np.isclose(values[:, None], values)
    return np.asarray(np.tril(same, -1).sum(1))


def _title(summary: Summary) -> str:
    """Return how far the two places are apart, whether that is called the same, and how far it is to no norm."""
    by, none = (_better(summary, arm, "before") for arm in ("after", "none"))
    place = weigh(open_at_edges(by, [(arm, summary["arms"][arm]["edge"]) for arm in ("after", "before")]), SAME)
    return f"After the ReLU batch norm is {say_better(by, 'before it')}, {place}; with no norm it is {say_better(none)}"


PLACEMENT = Study(
    "placement",
    "Does batch normalization belong before or after the activation, and which parameters beside it are of use?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
