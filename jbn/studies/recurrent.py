"""``recurrent``: batch normalization in recurrent networks, and the gradient through time at γ = 1 and γ = 0.1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from scipy.stats import norm as normal
from sklearn.datasets import load_digits

from jbn.studies.figures import LOOKS, OF_BATCH_NORM, OF_NONE, Look, draw_bands, panels
from jbn.studies.intervals import Interval, choose_rate, interval, note_edges, points
from jbn.studies.recurrent_claims import (
    ARMS,
    CLAIMS,
    CONSTANT,
    EDGES,
    LARGE,
    LEVEL,
    SCALES,
    SMALL,
    TANH,
    VANISHED,
    by_accuracy,
    by_steps,
    factor,
    find_lstm,
    say_steps,
)
from jbn.studies.sequences import Effort, Reader, Sequences, split, steps_to, train
from jbn.studies.study import Cell, Measured, Numbers, Settings, Sheet, Size, Study, Summary

CLASSES, ROWS = 10, 64
# What the figure shows of the tanh networks.
SHOWN: dict[str, tuple[float, str, Look]] = {
    "BN, γ = 1, orthogonal": (1.0, "orthogonal", LOOKS[3]),
    "BN, γ = 0.1, identity": (0.1, "", LOOKS[1]),
    "none, identity": (1.0, "no norm", OF_NONE),
    "BN, γ = 1, identity": (1.0, "", OF_BATCH_NORM),
}


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: the training of LSTMs, which arms, the units of tanh networks, and which."""

    effort: Effort
    arms: tuple[str, ...]
    units: int
    networks: tuple[str, ...]


EXTENTS: dict[str, Extent] = {
    "quick": Extent(Effort(2, 20, 4, 16, 10, (0.01, 0.03)), (SMALL, LARGE), 8, ("",)),
    "default": Extent(Effort(10, 300, 32, 64, 10, (0.003, 0.01, 0.03, 0.1)), tuple(ARMS), 100, tuple(TANH)),
    "full": Extent(Effort(20, 800, 32, 64, 10, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)), tuple(ARMS), 100, tuple(TANH)),
}


def cells(size: Size) -> list[Cell]:
    """Return a cell for each tanh network and for each LSTM."""
    extent = EXTENTS[size]
    effort = asdict(extent.effort) | {"rates": list(extent.effort.rates)}
    begun = {name: {"tanh": name, "seeds": extent.effort.seeds, "units": extent.units} for name in extent.networks}
    return [
        *(Cell(f"tanh-{number}", settings, work=1) for number, settings in enumerate(begun.values())),
        *(Cell(f"lstm-{number}", {"arm": arm} | effort, work=9) for number, arm in enumerate(extent.arms)),
    ]


@lru_cache(1)
def read_digits(channels: int) -> Sequences:
    """Return the digits of scikit-learn in steps of so many pixels."""
    images, labels = load_digits(return_X_y=True)
    x = images.reshape(len(images), -1, channels).astype(np.float32) / 16
    return Sequences(x, np.full(len(x), x.shape[1]), labels.astype(np.int32))


def measure(settings: Settings) -> Numbers:
    """Return what is measured of a tanh network that is not trained, or of an LSTM that is."""
    return _begin(settings) if "tanh" in settings else _train(settings)


def _begin(settings: Settings) -> Numbers:
    """Return log₁₀ ‖∂loss/∂hₜ‖, (scales, seeds, steps), of a tanh network that reads pixel by pixel."""
    network, seeds = replace(TANH[settings["tanh"]].network, features=settings["units"]), np.arange(settings["seeds"])
    chosen = [np.random.default_rng(seed).permutation(len(read_digits(1).x))[:ROWS] for seed in seeds]

    def gradients(scale: Array, seed: Array, rows: Sequences) -> Array:
        return network.gradients(seed, scale, rows, CLASSES)

    of_all = jax.jit(jax.vmap(jax.vmap(gradients, (None, 0, 0)), (0, None, None)))
    return {"gradients": of_all(np.asarray(SCALES, np.float32), seeds, read_digits(1)[np.stack(chosen)])}


def _train(settings: Settings) -> Numbers:
    """Return what came of the training of an LSTM at all rates with all seeds."""
    effort = Effort(*(settings[name] for name in ("seeds", "steps", "features", "batch", "look", "rates")))
    arm = ARMS[settings["arm"]]
    reader = Reader(arm.norms, effort.features, CLASSES)
    return train(reader, effort, split(read_digits(8), effort), arm.scale)._asdict()


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return how the gradient of each network moves through time, and what each LSTM reached at its own best rates."""
    begun = [each for each in measured if "tanh" in each.settings]
    trained = [each for each in measured if "arm" in each.settings]
    settings = trained[0].settings
    return {
        "seeds": settings["seeds"],
        "steps": settings["steps"],
        "rates": settings["rates"],
        "look": settings["look"],
        "derivative": _saturate(np.linspace(0, 1, 21)),
        "tanh": [
            {"network": each.settings["tanh"], "scale": scale} | _relate(gradients)
            for each in begun
            for scale, gradients in zip(SCALES, each.numbers["gradients"], strict=True)
        ],
        "lstm": [{"arm": each.settings["arm"]} | _summarize(each) for each in trained],
    }


def _saturate(deviations: np.ndarray) -> dict[str, Any]:
    """Return mean and quartiles of tanh' of normal numbers with these standard deviations, as in the paper's figure."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    of_all = 1 - np.tanh(deviations[:, None] * nodes) ** 2
    mean = of_all @ weights / weights.sum()
    # Of |x|, which decides, the quartiles are these of a half-normal number.
    low, high = (1 - np.tanh(deviations * normal.ppf(quantile)) ** 2 for quantile in (0.875, 0.625))
    return {
        name: values.round(6).tolist()
        for name, values in zip(("deviation", "mean", "low", "high"), (deviations, mean, low, high), strict=True)
    }


def _relate(gradients: Any) -> dict[str, Any]:
    """Return log₁₀ of the norms (seeds, steps) beside that of the last step: of the first one by seeds, and of all."""
    found = np.asarray(gradients, float)
    found = found - found[:, -1:]
    return {
        "first": found[:, 0].round(6).tolist(),
        "path": [asdict(interval(of_step)) for of_step in found.T],
    }


def _summarize(each: Measured) -> dict[str, Any]:
    numbers, rates, look = each.numbers, each.settings["rates"], each.settings["look"]
    validation, test = (np.asarray(numbers[name], float) for name in ("validation", "test"))
    best = choose_rate(validation[-1].T)
    never = each.settings["steps"] + look

    def count(curves: np.ndarray) -> np.ndarray:
        """Return the steps to the level, (seeds, rates)."""
        found = [steps_to(LEVEL, curves[:, rate], look) for rate in range(len(rates))]
        return np.array([[never if steps is None else steps for steps in of_rate] for of_rate in found]).T

    # Of two rates that need as many steps the one that ends higher.
    soonest = choose_rate(validation[-1].T / 2 - count(validation))
    steps = count(test)[:, soonest.index]
    pooled = np.asarray(numbers["pooled"], float)[best.index]
    return {
        "rate": rates[best.index],
        "edge": best.edge,
        "accuracy": test[-1, best.index].round(6).tolist(),
        "pooled": pooled.round(6).tolist(),
        "soonest_rate": rates[soonest.index],
        "soonest_edge": soonest.edge,
        "to_level": steps.tolist(),
        "never": int((steps == never).sum()),
        "begin": _relate(numbers["gradients"][0][best.index]),
        "end": _relate(numbers["gradients"][1][best.index]),
    }


def tabulate(summary: Summary) -> Sheet:
    """Return a row for each LSTM, and for each tanh network at each γ."""
    # Without a Greek letter: a terminal may have none.
    rows = [(row["arm"].replace("γ = ", ""), *_texts(row)) for row in summary["lstm"]]
    for row in summary["tanh"]:
        kind = TANH[row["network"]]
        scaled = kind.network.kind == "batch"
        if scaled or row["scale"] == 1:
            name = " ".join(filter(None, ("tanh", f"{row['scale']:g}" * scaled, kind.label)))
            rows.append((name, "-", "-", "-", factor(interval(row["first"]).mean), "-"))
    notes = [
        "Correct: test accuracy (%) by the statistics of each step; pooled: by those of all steps together; steps: of "
        f"training to {LEVEL:.0%} of the test rows. Means with 95 % intervals over {summary['seeds']} seeds (Student's "
        f"t); {summary['steps']} steps; each LSTM, which reads digits row by row, at its own best of "
        f"{len(summary['rates'])} rates by validation rows, of accuracy and of steps.",
        "Begin, end: ‖∂loss/∂hₜ‖ of the first step in time to that of the last, geometric mean, before and after "
        "training; above 1 it grows on its way back. A number is γ. BN, layer norm, none: LSTMs, 8 steps, a row of 8 "
        "pixels each. tanh: not trained, 64 steps, a pixel each; one norm of both parts, the identity for a recurrent "
        "kernel, or two norms, or an orthogonal kernel; tanh'=1: the derivative is taken for 1.",
    ]
    for edge, rate in EDGES.items():
        notes += note_edges(((row["arm"], row[edge]) for row in summary["lstm"]), rate)
    never = [f"{row['never']} of {row['arm']}" for row in summary["lstm"] if row["never"]]
    if never:
        most = summary["steps"] + summary["look"]
        notes.append(f"Seeds that never came to {LEVEL:.0%}, and count as {most} steps: {', '.join(never)}.")
    return Sheet(("network", "correct", "pooled", "steps", "begin", "end"), tuple(rows), tuple(notes))


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    has_statistics = ARMS[row["arm"]].norms.kind == "batch"
    return (
        _with_half(row["accuracy"], 100),
        _with_half(row["pooled"], 100) if has_statistics else "-",
        _with_half(row["to_level"], 1),
        *(factor(interval(row[when]["first"]).mean) for when in ("begin", "end")),
    )


def _with_half(values: Sequence[float], unit: float) -> str:
    found, digits = interval(values), 1 if unit == 100 else 0
    return f"{unit * found.mean:.{digits}f} ±{unit * found.half:.{digits}f}"


def draw(summary: Summary) -> Figure:
    """Draw how accurate LSTMs become and in how many steps, and ‖∂loss/∂hₜ‖ of tanh networks through time."""
    note = (
        f"Means, of gradients geometric ones, and 95 % intervals of {summary['seeds']} seeds. LSTMs read digits row by "
        f"row, {summary['steps']} steps of training, each at its best rates; tanh networks pixel by pixel, with the "
        "identity or an orthogonal matrix for a recurrent kernel. BN: batch norm. Claims compare arms seed by seed: "
        "intervals that overlap may tell them apart."
    )
    for edge, rate in EDGES.items():
        at_edges = [f"'{ARMS[row['arm']].label}'" for row in summary["lstm"] if row[edge]]
        note += f" {rate} of {', '.join(at_edges)} is at an edge of the grid." * bool(at_edges)
    names = ("LSTMs: accuracy", "LSTMs: how soon", "tanh networks, not trained: gradient")
    figure, (accuracy, steps, begun) = panels(_title(summary), note, names, height=4.6)
    rows = [find_lstm(summary, arm) for arm in ARMS if arm in {row["arm"] for row in summary["lstm"]}]
    for axes, name, unit in ((accuracy, "accuracy", 100), (steps, "to_level", 1)):
        for place, row in enumerate(rows):
            found = interval(unit * np.asarray(row[name], float))
            style = ARMS[row["arm"]].look.style | {"linestyle": "none"}
            axes.errorbar(found.mean, place, xerr=found.half, capsize=3, markersize=7, **style)
        axes.set_yticks(range(len(rows)), [ARMS[row["arm"]].label for row in rows] if axes is accuracy else [])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    accuracy.set_xlabel("test accuracy (%)")
    steps.set_xlabel(f"steps to {LEVEL:.0%}")
    measured = {(row["scale"], row["network"]): row["path"] for row in summary["tanh"]}
    for label, (scale, network, look) in SHOWN.items():
        if path := measured.get((scale, network)):
            left = [Interval(*(10 ** each[name] for name in ("mean", "low", "high"))) for each in path]
            draw_bands(begun, range(1, len(path) + 1), left, look, label)
    begun.set(yscale="log", xlabel="step in time, t", ylabel="‖∂loss/∂hₜ‖, last step = 1")
    begun.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small", handlelength=3)
    return figure


def _title(summary: Summary) -> str:
    """Say which γ ends more accurate and which learns faster, and what is left of the gradient of tanh networks."""
    quality, speed = _sides(summary, LARGE)
    accuracy = {row["arm"]: points(np.mean(row["accuracy"])) for row in summary["lstm"]}
    steps = {row["arm"]: say_steps(row) for row in summary["lstm"]}
    ends = ("neither more nor less accurate for certain than", "more accurate than", "less accurate than")[quality]
    learns = ("neither faster nor more slowly for certain", "faster", "more slowly")[speed]
    kinds = {"": "identity kernel", "orthogonal": "orthogonal"}
    left = [
        f"{kinds[row['network']]} {factor(interval(row['first']).mean)}{_fate(interval(row['first']))}"
        for row in summary["tanh"]
        if row["scale"] == 1 and row["network"] in kinds
    ]
    return (
        f"With γ = 0.1 an LSTM with batch norm ends {ends} with γ = 1 ({accuracy[SMALL]} against {accuracy[LARGE]} %) "
        f"{'but' if quality * speed < 0 else 'and'} learns {learns} ({steps[SMALL]} against {steps[LARGE]} steps)"
        f"{_beside_none(summary, accuracy, steps)}. Tanh networks, γ = 1, gradient at the first step in time over that "
        f"at the last: {', '.join(left)}"
    )


def _sides(summary: Summary, other: str) -> tuple[int, int]:
    """Return whether γ = 0.1 is more accurate, and sooner, than another: 1, or -1 if less so, 0 if it is open."""
    told = by_accuracy(summary, SMALL, other)[1], by_steps(summary, SMALL, other)[1]
    quality, speed = (int(by.low > 0) - int(by.high < 0) for by in told)
    return quality, speed


def _beside_none(summary: Summary, accuracy: dict[str, str], steps: dict[str, str]) -> str:
    """Return how γ = 0.1 stands to no norm, "" where that is not measured."""
    if "none" not in accuracy:
        return ""
    quality, speed = _sides(summary, "none")
    none = f"no norm ({accuracy['none']} %, {steps['none']} steps)"
    if not quality and not speed:
        return f"; whether it beats {none} is undecided"
    ends = ("undecided which ends more accurate", "it ends more accurate", "it ends less accurate")[quality]
    return f"; beside {none} {ends}, {('undecided which learns faster', 'learns faster', 'learns more slowly')[speed]}"


def _fate(found: Interval) -> str:
    """Return in a word what becomes of a gradient on its way back in time, "" where that is open."""
    return " (vanishes)" * (found.high < VANISHED) + " (grows)" * (found.low > CONSTANT)


RECURRENT = Study(
    "recurrent",
    "Does batch normalization suit recurrent networks, and must γ begin small?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
