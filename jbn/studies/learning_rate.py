"""``learning-rate``: over four decades of rates, where training fails, and what the larger rates are good for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

from jbn.studies.figures import OF_BATCH_NORM, OF_LAYER_NORM, OF_NONE, blank, draw_bands, name_places, put_legend_beside
from jbn.studies.intervals import (
    Interval,
    choose_rate,
    conclude,
    decide,
    interval,
    note_edges,
    points,
    say_better,
    say_half,
    say_points,
)
from jbn.studies.networks import BatchNorm, Bias, Dense, Norm, OfFlax
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary, Verdict
from jbn.studies.training import CHANCE, CLASSES, PIXELS, Plan, sweep, unseen

WIDTHS = (PIXELS["digits"], 128, 128, 128, CLASSES)
BATCH = 32
TRAINS = 0.5  # the accuracy on test rows below which training has failed; small rates are slow, and end above it
LITTLE = 0.01  # what a gain in accuracy is called
# Norms by their names in the table.
ARMS: dict[str, Norm] = {
    "batch norm": BatchNorm(momentum=0.9),
    "layer norm": OfFlax(nn.LayerNorm()),
    "none": Bias(),
}


@dataclass(frozen=True)
class Extent:
    """How much is measured: seeds, how many rates a decade has, and steps."""

    seeds: int
    a_decade: int
    steps: int


EXTENTS: dict[str, Extent] = {"quick": Extent(2, 1, 4), "default": Extent(10, 2, 500), "full": Extent(20, 4, 2000)}
LOWEST, DECADES = 0.003, 4


def rates_of(extent: Extent) -> list[float]:
    """Return rates that are equally far apart in their logarithm, ascending."""
    found = LOWEST * 10 ** (np.arange(DECADES * extent.a_decade + 1) / extent.a_decade)
    return [float(f"{rate:.2g}") for rate in found]


def cells(size: Size) -> list[Cell]:
    """Return a cell for each arm."""
    extent = EXTENTS[size]
    settings = {"rates": rates_of(extent), "seeds": extent.seeds, "steps": extent.steps}
    return [Cell(arm.replace(" ", "-"), {"arm": arm} | settings) for arm in ARMS]


def measure(settings: Settings) -> Numbers:
    """Return accuracies (seeds, rates) of an arm on validation and test rows, and where the loss is not finite."""
    network, steps = Dense(WIDTHS, ARMS[settings["arm"]]), settings["steps"]
    plan = Plan(tuple(settings["rates"]), settings["seeds"], BATCH, BATCH * steps)
    found = sweep(network, plan, {"accuracy": unseen(network)})
    seen = found["accuracy"][..., 0, :]
    return {"validation": seen[..., 0], "test": seen[..., 1], "diverged": ~np.isfinite(found["loss"][..., 0])}


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each arm its accuracies at each rate, the best one by validation rows, and the largest that trains."""
    first = measured[0].settings
    arms = {each.settings["arm"]: _summarize(first["rates"], each.numbers) for each in measured}
    return {"rates": first["rates"], "seeds": first["seeds"], "steps": first["steps"], "arms": arms}


def _summarize(rates: Sequence[float], numbers: Numbers) -> dict[str, Any]:
    test, diverged = np.asarray(numbers["test"], float), np.asarray(numbers["diverged"])
    trains = ~diverged & (test >= TRAINS)
    chosen = choose_rate(np.asarray(numbers["validation"], float))
    enough = np.flatnonzero(trains.mean(0) >= 0.5)
    return {
        "test_accuracy": np.round(test, 6).tolist(),
        "quartiles": np.percentile(test, (25, 50, 75), axis=0).T.tolist(),
        "best": chosen.index,
        "edge": chosen.edge,
        "interval": asdict(interval(test[:, chosen.index])),
        "failed": (~trains).sum(0).tolist(),
        "diverged": diverged.sum(0).tolist(),
        "largest": int(enough[-1]) if enough.size else None,
        # Of a seed that trains nowhere it is below the lowest one.
        "largest_of_seed": [max(np.flatnonzero(each).tolist(), default=-1) for each in trains],
    }


def _at(summary: Summary, arm: str, rate: int) -> np.ndarray:
    """Return the accuracies of the seeds at a rate of the grid."""
    return np.asarray(summary["arms"][arm]["test_accuracy"])[:, rate]


def _largest(summary: Summary, arm: str) -> str:
    """Return the largest rate that trains, in words."""
    rates, index = summary["rates"], summary["arms"][arm]["largest"]
    if index is None:
        return f"below {rates[0]:g}"
    return f"{'at least ' if index == len(rates) - 1 else ''}{rates[index]:g}"


def _trains_at_larger(summary: Summary) -> Outcome:
    norm, none = (np.array(summary["arms"][arm]["largest_of_seed"]) for arm in ("batch norm", "none"))
    by = interval((norm - none) * np.log10(summary["rates"][1] / summary["rates"][0]))
    times, apart = 10 ** np.array([by.mean, by.low, by.high]), summary["rates"][1] / summary["rates"][0]
    sentence = (
        f"Half of the seeds or more end above {TRAINS:.0%} up to a rate of {_largest(summary, 'batch norm')}, without "
        f"it up to {_largest(summary, 'none')}; seed by seed {times[0]:.1f} ({times[1]:.1f} to {times[2]:.1f}) times, "
        f"on a grid whose rates are {apart:.2g} times apart."
    )
    return Outcome(sentence, decide(by, least=0))


def _fails_without(summary: Summary) -> Outcome:
    norm, none = (summary["arms"][arm] for arm in ("batch norm", "none"))
    if norm["largest"] is None:
        return Outcome("Batch norm itself trains at no rate.", "not decided within the intervals")
    index, seeds = norm["largest"], summary["seeds"]
    by = interval(_at(summary, "none", index))
    sentence = (
        f"At {summary['rates'][index]:g}, the largest rate at which batch norm trains, {none['failed'][index]} of "
        f"{seeds} seeds fail without it ({none['diverged'][index]} are not finite), {norm['failed'][index]} with it. "
        f"Without it the accuracy is {points(by.mean)} % ({points(by.low)} to {points(by.high)}); less than "
        f"{TRAINS:.0%} is a failure."
    )
    return Outcome(sentence, decide(by, most=TRAINS))


def _gain(summary: Summary, norm: int, none: int) -> Interval:
    """Return by how much batch norm at one rate of the grid is above none at another, seed by seed."""
    return interval(_at(summary, "batch norm", norm) - _at(summary, "none", none))


def _best_rates(summary: Summary) -> tuple[int, int]:
    """Return the best rate of batch norm and that of none, as numbers of the grid."""
    return summary["arms"]["batch norm"]["best"], summary["arms"]["none"]["best"]


def _edges(summary: Summary) -> list[tuple[str, str]]:
    return [(arm, summary["arms"][arm]["edge"]) for arm in ("batch norm", "none")]


def _best_is_better(summary: Summary) -> Outcome:
    (norm, none), rates = _best_rates(summary), summary["rates"]
    by = _gain(summary, norm, none)
    sentence = f"Each at its best rate, batch norm ({rates[norm]:g}) is {say_better(by, f'none ({rates[none]:g})')}."
    return conclude(sentence, by, _edges(summary), least=0)


def _gains_little(summary: Summary) -> Outcome:
    (_, none), (_, edge) = _best_rates(summary), _edges(summary)
    by = _gain(summary, none, none)
    sentence = (
        f"At {summary['rates'][none]:g}, the best rate without it, batch norm is {say_better(by, 'none')}; "
        f"little is at most {points(LITTLE)}."
    )
    if none > 0:
        least = say_better(_gain(summary, 0, 0))
        sentence += f" At {summary['rates'][0]:g}, in as many steps, it is {least}; all in means, not medians."
    # Batch norm is taken at the rate of none, wherever its own best one lies.
    return conclude(sentence, by, [("batch norm", ""), edge], most=LITTLE)


def _gains_by_larger(summary: Summary) -> Outcome:
    """Judge whether the larger rate gives more than what is there at the same rate; that it gives something is less."""
    (norm, none), rates, edges = _best_rates(summary), summary["rates"], _edges(summary)
    by_rate = interval(_at(summary, "batch norm", norm) - _at(summary, "batch norm", none))
    verdicts: tuple[Verdict, Verdict] = ("does not hold", "not decided within the intervals")
    if norm < none:
        sentence = f"The best rate of batch norm, {rates[norm]:g}, is below that of none, {rates[none]:g}."
        return Outcome(" ".join([*note_edges(edges), sentence]), verdicts[bool(edges[0][1])])
    same = _gain(summary, none, none)
    more = interval(
        _at(summary, "batch norm", norm) - 2 * _at(summary, "batch norm", none) + _at(summary, "none", none)
    )
    sentence = (
        f"From {rates[none]:g}, the best rate of none, to {rates[norm]:g}, its own, batch norm gains "
        f"{say_points(by_rate)}; at the same rate, {rates[none]:g}, it is {say_better(same, 'none')}. A cause is "
        f"what gives the larger part: the larger rate gives {say_points(more)} more."
    )
    # Both must hold: the least certain of the two decides.
    found = [conclude(sentence, each, edges, least=0) for each in (by_rate, more)]
    return next((each for word in verdicts for each in found if each.verdict == word), found[0])


CLAIMS = (
    Claim(
        "Batch norm trains at larger rates",
        "Ioffe and Szegedy 2015, section 3.3; Bjorck et al. 2018, section 3",
        _trains_at_larger,
    ),
    Claim("Without batch norm such rates fail", "Bjorck et al. 2018, section 3", _fails_without),
    Claim("Batch norm generalizes better, each at its best rate", "Bjorck et al. 2018, figure 1", _best_is_better),
    Claim(
        f"At the best rate of none batch norm gains little (at most {points(LITTLE)} points)",
        "Bjorck et al. 2018, section 2 and figure 1, of the same small rate",
        _gains_little,
    ),
    Claim(
        "Larger rates, which batch norm makes possible, are the cause of its better generalization",
        "Bjorck et al. 2018, abstract: it primarily enables training with them",
        _gains_by_larger,
    ),
)


def tabulate(summary: Summary) -> Sheet:
    """Return accuracies on test rows, a row per rate, a column per arm."""
    seeds, arms = summary["seeds"], summary["arms"]
    rows = []
    for index, rate in enumerate(summary["rates"]):
        texts = []
        for found in arms.values():
            failed = found["failed"][index]
            texts.append(f"{points(found['quartiles'][index][1])}{f' ({failed})' if failed else ''}")
        rows.append((f"{rate:g}", *texts))
    best = [
        f"{arm}: {summary['rates'][found['best']]:g}, {say_half(Interval(**found['interval']))} %"
        for arm, found in arms.items()
    ]
    notes = [
        f"Test accuracy (%), the median of {seeds} seeds, by the rate of the first step; in brackets how many fail, "
        f"which end below {TRAINS:.0%} or not finite (which counts as chance, {CHANCE:.0%}).",
        f"Best rates by the mean on validation rows, with means and 95 % intervals on test rows: {'; '.join(best)}.",
        f"The largest rate at which half of the seeds do not fail: "
        f"{'; '.join(f'{arm}: {_largest(summary, arm)}' for arm in arms)}.",
        f"Digits, three hidden layers of 128 ReLU units, {summary['steps']} steps of {BATCH} rows, plain gradient "
        "descent, a rate that falls linearly to 0.",
    ]
    notes += note_edges((arm, found["edge"]) for arm, found in arms.items())
    return Sheet(("rate", *arms), tuple(rows), tuple(notes))


def draw(summary: Summary) -> Figure:
    """Draw errors on test rows against the rate, with the best rate of each arm in a ring."""
    note = (
        f"digits, three hidden layers of 128, {summary['steps']} steps of {BATCH} rows; marks are medians and bands "
        f"quartiles of {summary['seeds']} seeds, the title's differences means, seed by seed; what is not finite "
        f"counts as chance ({1 - CHANCE:.0%} errors); ringed: best rate by validation rows. A rate trains where half "
        f"of the seeds or more end finite and above {TRAINS:.0%} accuracy, below the dotted line"
    )
    figure, axes = blank(_title(summary), note)
    rates = summary["rates"]
    for (arm, found), look in zip(summary["arms"].items(), (OF_BATCH_NORM, OF_LAYER_NORM, OF_NONE), strict=True):
        errors = [[max(0.1, 100 * (1 - share)) for share in shares] for shares in found["quartiles"]]
        draw_bands(axes, rates, [Interval(middle, low, high) for high, middle, low in errors], look, arm)
        best = (rates[found["best"]], errors[found["best"]][1])
        axes.plot(*best, "o", markersize=14, markerfacecolor="none", color=look.colour)
    axes.axhline(100 * (1 - TRAINS), color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", ylabel="errors on test rows (%), logarithmic")
    axes.set_xlabel("learning rate of the first step, falls linearly to 0; logarithmic")
    axes.set_xticks(rates[:: max(1, len(rates) // 8)], [f"{rate:g}" for rate in rates[:: max(1, len(rates) // 8)]])
    axes.minorticks_off()
    name_places(axes, (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 90))
    put_legend_beside(figure, axes)
    return figure


def _title(summary: Summary) -> str:
    """Return up to which rate half of the seeds train, and how much better batch norm is there and at its own."""
    norm, none = _best_rates(summary)
    larger = {"holds": "larger rates", "does not hold": "no larger rates"}.get(
        _trains_at_larger(summary).verdict, "perhaps larger rates"
    )
    limit, *others = (_largest(summary, arm) for arm in summary["arms"])
    beside = "".join(f", of {arm} {each}" for arm, each in zip([*summary["arms"]][1:], others, strict=True))
    own, same = say_better(_gain(summary, norm, none), "none"), say_better(_gain(summary, none, none))
    right = ", ".join(f"{arm} {points(of['interval']['mean'])} %" for arm, of in summary["arms"].items())
    return (
        f"Batch norm trains at {larger}: the largest is {limit}{beside}.\n"
        f"Right in the mean, each at its best rate: {right};\n"
        f"batch norm is {own};\nat none's rate {same}"
    )


LEARNING_RATE = Study(
    "learning-rate",
    "At which learning rates does training fail with and without batch normalization, and what do larger ones gain?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
