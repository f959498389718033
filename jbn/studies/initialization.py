"""``initialization``: how much the scale of the first kernels matters, and what a depth of layers does to gradients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from jbn.studies.deep import Deep, measure_growth, measure_scale
from jbn.studies.figures import draw_heat, panels
from jbn.studies.intervals import Interval, choose_rate, decide, interval
from jbn.studies.networks import BatchNorm, Bias, Norm
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.training import CHANCE, Plan, accuracies, note_diverged, sweep

Judge: TypeAlias = Callable[[Summary], Outcome]

WIDTH = 32
BATCH = 64
EPSILON, NEGLIGIBLE = 1e-5, 1e-20  # what jbn adds to a variance unless told otherwise; what changes no float32 here
SCALED: dict[str, Any] = {"rows": 256, "steps": 5, "rate": 0.1}  # of the networks whose kernels are scaled
# In float32 a sum of some hundred products is off by some 1e-6 of its size, and what is trained on it by some more.
ROUNDING = 1e-4
TRAINED = 50  # percent of the test rows from which on a network counts as trained
NOTICED = 0.01  # a share that would be seen
SKIPPED = 5  # layers at each end of a deep network whose gradients have not come to grow evenly
YANG = math.sqrt(math.pi / (math.pi - 1))  # 1.21
NEAR = 0.03  # from it, and still the same: the limit is one of width and of batch

# By their names in the table.
ARMS: dict[str, Norm] = {"none": Bias(), "batch": BatchNorm(0.9)}
LABELS = {"none": "no norm", "batch": "batch norm"}


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: depths, gains, seeds, learning rates, steps; the network whose gradients grow."""

    depths: tuple[int, ...]
    gains: tuple[float, ...]
    seeds: int
    rates: tuple[float, ...]
    steps: int
    growth: dict[str, int]


GAINS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
EXTENTS: dict[str, Extent] = {
    "quick": Extent((3, 5), (0.01, 1.0), 2, (0.05, 0.5), 4, {"layers": 14, "width": 32, "rows": 64}),
    "default": Extent(
        (3, 6, 10, 20),
        GAINS,
        10,
        (0.003, 0.02, 0.13, 0.9, 6.0),
        100,
        {"layers": 30, "width": 256, "rows": 1000},
    ),
    "full": Extent(
        (3, 5, 7, 10, 14, 20),
        GAINS,
        20,
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        300,
        {"layers": 50, "width": 512, "rows": 1000},
    ),
}


def cells(size: Size) -> list[Cell]:
    """Return a cell for each depth of each arm, and one for each of what is measured before training."""
    extent = EXTENTS[size]
    trained = {"gains": list(extent.gains), "seeds": extent.seeds, "rates": list(extent.rates), "steps": extent.steps}
    return [
        *(
            Cell(f"{arm}-{depth}", {"kind": "trained", "arm": arm, "depth": depth} | trained, work=depth)
            for arm in ARMS
            for depth in extent.depths
        ),
        Cell("scale", {"kind": "scale", "gains": list(extent.gains), "seeds": extent.seeds}),
        *(
            Cell(f"growth-{arm}", {"kind": "growth", "arm": arm, "seeds": extent.seeds} | extent.growth, work=2)
            for arm in ARMS
        ),
    ]


def measure(settings: Settings) -> Numbers:
    """Return the numbers of a cell, with an axis of seeds first."""
    given = {name: value for name, value in settings.items() if name not in ("kind", "arm")}
    if settings["kind"] == "growth":
        return {"gradients": measure_growth(norm=ARMS[settings["arm"]], **given)}
    if settings["kind"] == "scale":
        given["gains"] = tuple(given["gains"])
        found = {name: measure_scale(epsilon=each, **given, **SCALED) for name, each in _EPSILONS.items()}
        return {f"{name} {epsilon}": values for epsilon, each in found.items() for name, values in each.items()}
    norm = ARMS[settings["arm"]]
    starts = [Deep(settings["depth"], WIDTH, norm, gain) for gain in settings["gains"]]
    plan = Plan(tuple(settings["rates"]), settings["seeds"], BATCH, BATCH * settings["steps"])
    found = sweep(starts[0], plan, {"seen": accuracies(starts[0])}, starts=starts)["seen"]
    return {name: found._asdict()[name][..., -1] for name in ("validation", "test", "diverged")}


_EPSILONS = {"exact": NEGLIGIBLE, "usual": EPSILON}


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return the accuracies of each pair of depth and gain at its own rate, and what was measured before training."""
    trained = [each for each in measured if each.settings["kind"] == "trained"]
    settings = trained[0].settings
    (scale,) = (each for each in measured if each.settings["kind"] == "scale")
    growth = {each.settings["arm"]: each for each in measured if each.settings["kind"] == "growth"}
    return {
        "gains": settings["gains"],
        "depths": sorted({each.settings["depth"] for each in trained}),
        "seeds": settings["seeds"],
        "rates": len(settings["rates"]),
        "steps": settings["steps"],
        "cells": [row for each in trained for row in _summarize(each.settings, each.numbers)],
        "scale": {name: _round(values) for name, values in scale.numbers.items()},
        "growth": {arm: _round(_growth(each.numbers["gradients"])) for arm, each in growth.items()},
        "deep": {name: growth["batch"].settings[name] for name in ("layers", "width", "rows")},
    }


def _summarize(settings: Settings, numbers: Numbers) -> list[dict[str, Any]]:
    rows = []
    for index, gain in enumerate(settings["gains"]):
        seen = {name: np.asarray(values, float)[:, index] for name, values in numbers.items()}
        chosen = choose_rate(seen["validation"])
        test = 100 * seen["test"][:, chosen.index]
        rows.append(
            {name: settings[name] for name in ("arm", "depth")}
            | {
                "gain": gain,
                "rate": settings["rates"][chosen.index],
                "edge": chosen.edge,
                "diverged": int(seen["diverged"][:, chosen.index].sum()),
                "validation": float(_round(100 * seen["validation"][:, chosen.index].mean())),
                "test": _round(test),
                "interval": asdict(interval(test)),
            }
        )
    return rows


def _growth(gradients: Any) -> np.ndarray:
    """Return by how much the gradient grows from a layer to the one before, in the middle of the network."""
    logs = np.log(np.asarray(gradients, float))[:, SKIPPED : -SKIPPED or None]
    return np.exp((logs[:, 0] - logs[:, -1]) / (logs.shape[1] - 1))  # type: ignore[no-any-return]


def _round(values: Any) -> Any:
    return np.vectorize(lambda value: float(f"{value:.9g}"))(np.asarray(values, float)).tolist()


def _grid(summary: Summary, arm: str) -> np.ndarray:
    """Return accuracies on test rows (seeds, depths, gains), percent."""
    found = {(row["depth"], row["gain"]): row["test"] for row in summary["cells"] if row["arm"] == arm}
    rows = [[found[depth, gain] for gain in summary["gains"]] for depth in summary["depths"]]
    return np.moveaxis(np.asarray(rows, float), 2, 0)


def _trained(summary: Summary, arm: str, *, open_too: bool = False) -> np.ndarray:
    """Return at which share of the pairs of depth and gain networks come to ``TRAINED`` (seeds,), percent.

    The distance of the best gain and the worst would favour networks that train at no gain.

    Args:
        summary: of the study.
        arm: by its name.
        open_too: whether those whose best rate is at an edge of the grid count as trained: a better one may be outside.
    """
    rows = [row for row in summary["cells"] if row["arm"] == arm]
    trained = [np.asarray(row["test"]) >= TRAINED for row in rows]
    if open_too:
        trained = [each | bool(row["edge"]) for each, row in zip(trained, rows, strict=True)]
    return 100 * np.mean(trained, axis=0)  # type: ignore[no-any-return]


def _percent(found: Interval) -> str:
    """Return a share in percent in two digits, however small it is."""
    mean, low, high = (f"{100 * value:.2g}" for value in (found.mean, found.low, found.high))
    return f"{mean} % ({low} to {high})"


def _tell(found: Interval, form: str = ".1f") -> str:
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def _gain_by_batch_norm(summary: Summary) -> tuple[Interval, Interval]:
    """Return by how many points batch norm trains at more pairs; as seen, and as far as edges of the grid leave open.

    As in ``leave_open`` what is at an edge decides nothing against its arm, but no more than all of it can be trained.
    """
    seen, most = ({arm: _trained(summary, arm, open_too=each) for arm in ARMS} for each in (False, True))
    by = interval(seen["batch"] - seen["none"])
    low, high = interval(seen["batch"] - most["none"]).low, interval(most["batch"] - seen["none"]).high
    return by, Interval(by.mean, low, high)


def _trains_at_more(summary: Summary) -> Outcome:
    by, bounds = _gain_by_batch_norm(summary)
    told = {arm: _tell(interval(_trained(summary, arm)), ".0f") for arm in ARMS}
    verdict = decide(bounds, least=0)
    sentence = (
        f"Of {len(_pairs(summary))} pairs of gain and depth {told['batch']} % reach {TRAINED} % accuracy on test "
        f"rows with batch norm, {told['none']} % without; difference {_tell(by, '.0f')} points."
    )
    edges = {arm: sum(bool(row["edge"]) for row in summary["cells"] if row["arm"] == arm) for arm in ARMS}
    if any(edges.values()):
        counts = ", ".join(f"{count} ({LABELS[arm]})" for arm, count in edges.items() if count)
        sentence = (
            f"The best rate is at an edge of the grid, and a better one may lie outside, in some pairs: {counts}. "
            f"{sentence} If these trained, the difference could be {bounds.low:.0f} to {bounds.high:.0f}."
        )
    return Outcome(sentence, verdict)


def _pairs(summary: Summary) -> list[tuple[int, float]]:
    return [(depth, gain) for depth in summary["depths"] for gain in summary["gains"]]


OFF = {"logits": " (root mean square)", "trained": " (root mean square)", "product": ""}


def _stays(name: str, epsilon: str, what: str, most: float) -> Judge:
    """Return the judgement whether the scale changes something by no more than a share, at whatever gain."""

    def judge(summary: Summary) -> Outcome:
        values = np.asarray(summary["scale"][f"{name} {epsilon}"], float)
        off = np.abs(values - 1) if name == "product" else values
        by = interval(off.max(1))
        worst = {summary["gains"][place] for place in off.argmax(1)}
        # Where rounding decides, each seed has its own.
        where = "".join(f", all at gain {gain:g}" for gain in worst if len(worst) == 1)
        sentence = (
            f"{what} from those of gain 1 by {_percent(by)} of these{OFF[name]}, the most of all gains, mean "
            f"over {summary['seeds']} seeds{where}; ε = {_EPSILONS[epsilon]:g}. Less than {100 * most:g} % counts as "
            "nothing."
        )
        return Outcome(sentence, decide(by, most=most))

    return judge


def _grows(*, least: float, most: float = math.inf) -> Judge:
    def judge(summary: Summary) -> Outcome:
        by, other = (interval(summary["growth"][arm]) for arm in ("batch", "none"))
        deep = summary["deep"]
        sentence = (
            f"From a layer to the one before it the gradient of the kernel is {_tell(by, '.3f')} times as large, "
            f"without batch norm {_tell(other, '.3f')}; {deep['layers']} layers of {deep['width']}, "
            f"{deep['rows']} rows."
        )
        return Outcome(sentence, decide(by, least=least, most=most))

    return judge


CLAIMS = (
    Claim(
        "Batch norm makes training depend less on the scale of the first parameters",
        "Ioffe and Szegedy 2015, sections 1 and 3.3",
        _trains_at_more,
    ),
    Claim(
        "BN((aW)x) = BN(Wx) for any a",
        "Ioffe and Szegedy 2015, section 3.3",
        _stays("logits", "exact", "The logits differ", ROUNDING),
    ),
    Claim(
        "Larger weights have gradients smaller by as much: |∇W| |W| stays",
        "Ioffe and Szegedy 2015, section 3.3",
        _stays("product", "exact", "The products differ", ROUNDING),
    ),
    Claim(
        "What a learning rate does depends on its ratio to |W|²: at a times the scale, a² times the rate does the same",
        "van Laarhoven 2017; Hoffer et al. 2018, section 3",
        _stays("trained", "exact", f"After {SCALED['steps']} steps the logits differ", ROUNDING),
    ),
    Claim(
        "BN((aW)x) = BN(Wx) also with the usual ε, which is there for numerical stability",
        "Ioffe and Szegedy 2015, section 3.3, which leaves ε out, and algorithm 1, which adds it",
        _stays("logits", "usual", "The logits differ", NOTICED),
    ),
    Claim(
        "With batch norm gradients explode with depth before training",
        "Yang et al. 2019, abstract",
        _grows(least=1),
    ),
    Claim(
        f"With ReLU they grow by {YANG:.2f} a layer, √(π/(π - 1)), in the limit of width and batch (within {NEAR:g})",
        "Yang et al. 2019",
        _grows(least=YANG - NEAR, most=YANG + NEAR),
    ),
)


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows, a row per depth of each arm, a column per gain."""
    rows = []
    for arm in ARMS:
        found = {(row["depth"], row["gain"]): row["interval"] for row in summary["cells"] if row["arm"] == arm}
        for depth in summary["depths"]:
            texts = (Interval(**found[depth, gain]) for gain in summary["gains"])
            rows.append((f"{arm} {depth}", *(f"{each.mean:.0f} ±{each.half:.0f}" for each in texts)))
    notes = [
        f"Test accuracy (%) with its 95 % interval over {summary['seeds']} seeds (Student's t), by hidden layers "
        "(none: with a bias; batch: with batch norm) and by the gain of all kernels, 1 as He et al. 2015 draw them. "
        f"digits, layers of {WIDTH}, {summary['steps']} steps of {BATCH} rows; each cell at its own best of "
        f"{summary['rates']} rates, by validation rows. Chance is {CHANCE:.0%}.",
    ]
    for edge in ("lowest", "highest"):
        where = [f"{row['arm']} {row['depth']} at {row['gain']:g}" for row in summary["cells"] if row["edge"] == edge]
        if where:
            notes.append(
                f"The best rate is the {edge} of the grid, and a better one may lie outside: {', '.join(where)}."
            )
    notes += note_diverged(
        (f"{row['arm']} {row['depth']} at {row['gain']:g}", row["diverged"]) for row in summary["cells"]
    )
    return Sheet(("layers", *(f"{gain:g}" for gain in summary["gains"])), tuple(rows), tuple(notes))


def draw(summary: Summary) -> Figure:
    """Draw accuracies on test rows by gain and depth, a panel per arm."""
    means = {arm: _grid(summary, arm).mean(0) for arm in ARMS}
    growth = {arm: f"{np.mean(summary['growth'][arm]):.3f}" for arm in ARMS}
    gains, depths = summary["gains"], summary["depths"]
    counts = [(LABELS[arm], sum(bool(row["edge"]) for row in summary["cells"] if row["arm"] == arm)) for arm in ARMS]
    edges = ", ".join(f"{count} cells of '{label}'" for label, count in counts if count)
    by, bounds = _gain_by_batch_norm(summary)
    even = f"if all of these trained, the title's difference, {by.mean:.0f} points, would be {bounds.low:.0f} at least"
    edges = f" (at an edge of the grid in {edges}: a better one may lie outside; even {even})" * bool(edges)
    deep = summary["deep"]["layers"]
    in_all = float(f"{np.mean(summary['growth']['batch']) ** (deep - 1):.2g}")
    note = (
        f"Accuracy on test rows of digits (%), means of {summary['seeds']} seeds, each cell at its own best of "
        f"{summary['rates']} learning rates{edges}; {summary['steps']} steps of {BATCH} rows. The title counts pairs "
        "of gain and depth in each seed: cells counted here may differ. Gain 1: as He et al. 2015 draw for ReLU. "
        f"Not drawn: before training the gradient of a kernel is {growth['batch']} times that of the next layer's "
        f"(about {in_all:g} times over {deep} layers) with batch norm, {growth['none']} times without."
    )
    figure, grid = panels(_title(summary), note, [LABELS[arm] for arm in ARMS], height=4.2, sharey=True)
    for axes, values in zip(grid, means.values(), strict=True):
        draw_heat(axes, values, ".0f", (100 * CHANCE, 100))
        axes.set_xticks(range(len(gains)), [f"{gain:g}" for gain in gains])
        axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        axes.set_xlabel("gain of all kernels before training")
    grid[0].set_ylabel("hidden layers")
    return figure


def _title(summary: Summary) -> str:
    """Say at how many pairs of gain and depth networks train."""
    by, _ = _gain_by_batch_norm(summary)
    more = ("about as many", "more", "fewer")[int(by.low > 0) - int(by.high < 0)]
    share = {arm: f"{_trained(summary, arm).mean():.0f}" for arm in ARMS}
    return (
        f"Batch norm trains at {more} pairs of gain and depth: {share['batch']} % of them reach {TRAINED} % accuracy "
        f"on test rows, without it {share['none']} %"
    )


INITIALIZATION = Study(
    "initialization",
    "How much does the scale of the first parameters matter with batch norm, and what does depth do to gradients?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
