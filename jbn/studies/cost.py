"""``cost``: what batch normalization adds to the time and the memory of a training step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from jbn.studies.compiled import AGREE, ARMS, LEANER, OURS, prepare
from jbn.studies.figures import LOOKS, OF_BATCH_NORM, OF_NONE, draw_intervals, panels, put_legend_beside
from jbn.studies.intervals import Interval, decide, interval, points
from jbn.studies.study import Cell, Claim, Measured, Numbers, Outcome, Settings, Sheet, Size, Study, Summary
from jbn.studies.timing import interleaved

SIGNIFICANT = 0.1  # share of the step
HALF = 0.5  # of the temporaries
MINOR = 0.02  # of the time
OF_ARMS = (OF_NONE, LOOKS[1], OF_BATCH_NORM, LOOKS[3])
MEMORY = ("kept", "temporaries")


@dataclass(frozen=True)
class Extent:
    """How much is measured at a size: shapes of images by network, repeats, and rounds of each."""

    shapes: dict[str, tuple[int, int, int, int]]
    repeats: int
    rounds: int


EXTENTS: dict[str, Extent] = {
    "quick": Extent({"conv": (8, 8, 8, 1)}, 2, 2),
    "default": Extent({"dense": (128, 28, 28, 1), "conv": (32, 64, 64, 3), "resnet": (32, 32, 32, 3)}, 10, 7),
    "full": Extent({"dense": (128, 28, 28, 1), "conv": (64, 64, 64, 3), "resnet": (128, 32, 32, 3)}, 20, 15),
}


def cells(size: Size) -> list[Cell]:
    """Return a cell for each repeat of each network."""
    extent = EXTENTS[size]
    return [
        Cell(
            f"{network}-{repeat}", {"network": network, "shape": list(shape), "repeat": repeat, "rounds": extent.rounds}
        )
        for network, shape in extent.shapes.items()
        for repeat in range(extent.repeats)
    ]


def measure(settings: Settings) -> Numbers:
    """Return the seconds of every round by arms, and what the programs need."""
    steps = prepare(settings["network"], tuple(settings["shape"]))
    seconds = interleaved({name: step.call for name, step in steps.items()}, settings["rounds"])
    needs = {
        name: {key: value for key, value in step._asdict().items() if key != "call"} for name, step in steps.items()
    }
    return {"seconds": seconds, "needs": needs}


def summarize(measured: Sequence[Measured]) -> Summary:
    """Return for each network and arm the ratios of times by repeats, medians of rounds, and what the programs need."""
    networks = list(dict.fromkeys(each.settings["network"] for each in measured))
    rows = []
    for network in networks:
        of_network = [each for each in measured if each.settings["network"] == network]
        seconds = [{arm: np.asarray(each.numbers["seconds"][arm], float) for arm in ARMS} for each in of_network]
        for arm in ARMS:
            row = {"network": network, "arm": arm, "shape": of_network[0].settings["shape"]}
            row["milliseconds"] = [round(1e3 * float(np.median(times[arm])), 4) for times in seconds]
            for other in ("none", OURS):
                row[f"by {other}"] = [round(float(np.median(times[arm] / times[other])), 5) for times in seconds]
            rows.append(row | of_network[0].numbers["needs"][arm])
    first = measured[0].settings
    repeats = len(measured) // len(networks)
    return {"networks": networks, "repeats": repeats, "rounds": first["rounds"], "device": _device(), "rows": rows}


def _device() -> str:
    return jax.devices()[0].device_kind


def find(summary: Summary, network: str, arm: str) -> dict[str, Any]:
    """Return what was found of a network with an arm."""
    return next(row for row in summary["rows"] if (row["network"], row["arm"]) == (network, arm))  # type: ignore[no-any-return]


def share(row: dict[str, Any]) -> Interval:
    """Return which share of the step a norm takes: what the same step without any does not."""
    return interval(1 - 1 / np.asarray(row["by none"]))


def more(row: dict[str, Any]) -> Interval:
    """Return by which share of jbn's step a step takes longer."""
    return interval(np.asarray(row[f"by {OURS}"]) - 1)


def _percent(value: float) -> str:
    return f"{round(100 * value)}"  # never -0


def _span(found: Interval, digits: int = 0) -> str:
    mean, low, high = (f"{round(100 * value, digits) + 0:.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high}) %"


def _elsewhere(summary: Summary, say: Callable[[str], str]) -> str:
    """Return what is said of the networks other than the last one, "" where there are none."""
    return ", ".join(f"{name} {say(name)}" for name in summary["networks"][:-1])


def _is_significant(summary: Summary) -> Outcome:
    last = summary["networks"][-1]
    shares = {
        name: [share(find(summary, name, arm)) for arm in ("Flax", OURS)] for name in reversed(summary["networks"])
    }
    said = "; ".join(f"{name} {_span(flax)} and {_span(ours)}" for name, (flax, ours) in shares.items())
    sentence = (
        f"Shares of a step with Flax's batch norm and with jbn's: {said}. Significant is {_percent(SIGNIFICANT)} %; "
        f"jbn's in the {last} decides."
    )
    return Outcome(sentence, decide(shares[last][1], least=SIGNIFICANT))


def _moves_more(summary: Summary) -> Outcome:
    last = summary["networks"][-1]
    none, ours = find(summary, last, "none"), find(summary, last, OURS)
    # null, of a compiler that does not tell, becomes NaN, which decides nothing.
    before, after = (np.asarray([row["flops"], row["traffic"]], float) for row in (none, ours))
    rest, (flops, traffic) = float(before[0] / before[1]), after - before
    added = float(flops / traffic) if traffic > 0 else math.nan
    sentence = (
        f"Counted by the compiler of this machine: a step of the {last} without norms computes {rest:.2f} operations "
        f"for each byte that it reads or writes, and what batch norm adds {added:.2f}. Few is less than half as many. "
        "Whether it waits for memory was not measured."
    )
    return Outcome(sentence, decide(Interval(added / rest, added / rest, added / rest), most=0.5))


def _beside(summary: Summary, network: str, what: str, arm: str, other: str = "none") -> float:
    """Return the bytes of an arm as a multiple of those of another; NaN where the compiler tells none."""
    ours, theirs = (find(summary, network, each)[what] for each in (arm, other))
    return float(ours / theirs) if ours and theirs else math.nan


def _say_less(ratio: float) -> str:
    return f"{_percent(abs(1 - ratio))} % {'more' if round(ratio, 2) > 1 else 'less'}"


def _say_bytes(summary: Summary, what: str, begin: str, beside: str = "") -> str:
    last = summary["networks"][-1]
    shown = ", ".join(f"{_size(find(summary, last, arm)[what])} ({arm})" for arm in ARMS)
    of_flax, of_ours = (_say_less(_beside(summary, last, what, LEANER, other)) for other in ("Flax", OURS))
    return f"{begin} {shown}. The last is {of_flax} than Flax's{beside}, {of_ours} than jbn's otherwise."


def _saves(summary: Summary) -> Outcome:
    """Judge what a step holds at its peak, for which there must be room; Flax keeps what most libraries keep."""
    kept = _say_bytes(summary, "kept", "Kept for the backward pass, as jax.vjp holds it, before compilation, are")
    of_flax = {name: _beside(summary, name, "temporaries", LEANER, "Flax") for name in summary["networks"]}
    least = float(np.min([*of_flax.values()]))
    if math.isnan(least):
        return Outcome(
            f"The compiler does not tell what a step has at its peak. {kept}", "not decided within the intervals"
        )
    others = _elsewhere(summary, lambda name: _say_less(of_flax[name]))
    begin = f"At its peak a step of the {summary['networks'][-1]}, compiled for this machine, has temporaries of"
    peak = _say_bytes(summary, "temporaries", begin, f" (in other networks: {others})" * bool(others))
    most = f"The peak decides: to save up to {_percent(HALF)} % is to save as much of it in one network at least."
    return Outcome(f"{peak} {kept} {most}", decide(Interval(1 - least, 1 - least, 1 - least), least=HALF))


def _is_minor(summary: Summary) -> Outcome:
    last = summary["networks"][-1]
    longer = more(find(summary, last, LEANER))
    others = _elsewhere(summary, lambda name: _span(more(find(summary, name, LEANER)), 1))
    sentence = f"A step of the {last} takes {_span(longer, 1)} more than with jbn otherwise"
    sentence += f"; in other networks: {others}." if others else "."
    return Outcome(sentence, decide(longer, most=MINOR))


IN_PLACE = "Bulò et al. 2018, abstract, of in-place activated batch norm; here jbn.remat_policy"
CLAIMS = (
    Claim(
        "Batch norm accounts for a significant fraction of the time of training",
        "Gitman and Ginsburg 2017, abstract, of ResNet-50 on a GPU",
        _is_significant,
    ),
    Claim(
        "It computes few operations for each byte that it moves, as what is bound by the bandwidth of memory does",
        "Gitman and Ginsburg 2017, abstract: it is bound by the bandwidth of memory",
        _moves_more,
    ),
    Claim(
        "Up to 50 % of the memory, here of that at the peak, is saved where what norms return is not kept but found "
        "again",
        IN_PLACE,
        _saves,
    ),
    Claim("To find it again takes only 0.8 to 2 % more time", IN_PLACE, _is_minor),
)


def _size(value: float) -> str:
    return f"{value / 1e6:.3g} MB"


def tabulate(summary: Summary) -> Sheet:
    """Return a row for each network and arm."""
    rows = []
    for row in summary["rows"]:
        taken, longer = share(row), more(row)
        of_step = "-" if row["arm"] == "none" else f"{_percent(taken.mean)} ±{_percent(taken.half)}"
        by_ours = "-" if row["arm"] in ("none", OURS) else f"{points(longer.mean)} ±{points(longer.half)}"
        needs = (f"{row[name] / 1e6:.3g}" if row[name] else "-" for name in ("kept", "temporaries", "traffic"))
        rows.append((f"{row['network']}: {row['arm']}", of_step, by_ours, *needs))
    none = [f"{name} {np.median(find(summary, name, 'none')['milliseconds']):.3g} ms" for name in summary["networks"]]
    shapes = [f"{name} {'×'.join(map(str, find(summary, name, OURS)['shape']))}" for name in summary["networks"]]
    notes = (
        f"A training step (SGD with momentum, float32) on {summary['device']}, images {', '.join(shapes)}, without "
        f"norms {', '.join(none)} (median). share: percent of the step that is gone without norms; more: percent that "
        f"it takes more than with jbn (-: less); with 95 % intervals over {summary['repeats']} repeats (Student's t). "
        f"Each is of ratios of its own: in a repeat the steps take turns {summary['rounds']} times, a ratio is of one "
        "turn, and their median counts, so that one does not follow from the other.",
        "MB: kept from the forward to the backward pass, as jax.vjp holds it, before compilation; temp: temporaries of "
        "the whole step at its peak; moved: read and written, both by the compiler of this machine. A step with norms "
        "can keep less than one without: a ReLU of its own keeps a mask for its derivative, a byte a number, where "
        "one that is part of jbn's norm needs none.",
        "remat: jax.checkpoint with jbn.remat_policy(), which computes what norms return again. Losses and gradients "
        f"agree to {AGREE:g} before anything is timed; without norms they are others. What the compilers of "
        "TPUs and GPUs make of such steps: python -m benchmarks.passes chains, in a checkout.",
    )
    return Sheet(("step", "share", "more", "kept", "temp", "moved"), tuple(rows), notes)


NAMES = {"Flax": "Flax", OURS: "jbn", LEANER: "jbn with remat_policy"}


def draw(summary: Summary) -> Figure:
    """Draw the share of the step, what is kept for the backward pass, and what is held at the peak."""
    note = (
        f"{summary['device']}; share: what is gone without norms, so none has no mark; 95 % intervals of "
        f"{summary['repeats']} repeats. {_pair(summary)} Kept: as jax.vjp holds it, before compilation (below 1: a "
        "ReLU without jbn's norm keeps a mask); temporaries at the peak, of the step compiled for this machine, are "
        "beside arguments and outputs, which 'kept' may include"
        f"{_least(summary)}. remat_policy, of jbn: what norms return is not kept, but computed again"
    )
    names = ("share of the step", "kept for the backward pass", "temporaries at the peak")
    figure, (time, *memory) = panels(_title(summary), note, names, height=5.3)
    places = np.arange(len(summary["networks"]))
    for number, ((name, arm), look) in enumerate(zip(ARMS.items(), OF_ARMS, strict=True)):
        rows = [find(summary, network, name) for network in summary["networks"]]
        at = (places + 0.15 * (number - 1.5)).tolist()
        for axes, what in zip(memory, MEMORY, strict=True):
            bytes_beside = [_beside(summary, network, what, name) for network in summary["networks"]]
            axes.plot(at, bytes_beside, markersize=6, label=arm.label, **replace(look, line="none").style)
        if name != "none":
            scaled = [Interval(*(100 * value for value in asdict(share(row)).values())) for row in rows]
            draw_intervals(time, at, scaled, replace(look, line="none"), arm.label)
    time.axhline(0, color="0.4", linewidth=0.8)
    time.set(ylabel="share of the step (%)")
    memory[0].set_ylabel("bytes, without norms = 1")
    for axes in (time, *memory):
        axes.set_xticks(places, summary["networks"])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_ylim(min(0, axes.get_ylim()[0]))
    put_legend_beside(figure, *memory)
    return figure


def _pair(summary: Summary) -> str:
    """Say by how much steps take longer than jbn's of the same turn: marks beside each other do not show it."""
    found = []
    for network in summary["networks"]:
        arms = {"Flax": "Flax", LEANER: "remat_policy"}
        longer = {name: more(find(summary, network, arm)) for arm, name in arms.items()}
        told = [f"{name} {round(100 * by.mean, 1) + 0:+.1f} ±{points(by.half)}" for name, by in longer.items()]
        found.append(f"{network} {', '.join(told)}")
    return f"Time against jbn's step in the same turn (%, +: slower): {'; '.join(found)}."


def _least(summary: Summary) -> str:
    """Return what the network of the smallest temporaries has of them, whose multiples are of little; "" if untold."""
    told = {name: [find(summary, name, arm)["temporaries"] or 0 for arm in ARMS] for name in summary["networks"]}
    name, least = min(told.items(), key=lambda pair: max(pair[1]))
    return f"; {name}: {min(least) / 1e6:.2f} to {max(least) / 1e6:.2f} MB" * all(least)


def _title(summary: Summary) -> str:
    """Say which share of a step jbn's norm takes, and what computing its results again does to memory and time."""
    last = summary["networks"][-1]
    taken, longer = share(find(summary, last, OURS)), more(find(summary, last, LEANER))
    beside = {what: _beside(summary, last, what, LEANER, OURS) for what in MEMORY}
    names = {"kept": "keeps {} for the backward pass", "temporaries": "needs {} at the peak"}
    said = [name.format(_say_less(beside[what])) for what, name in names.items() if not math.isnan(beside[what])]
    by = f"{points(abs(longer.mean))} %"
    time = (
        "and " * bool(said)
        + {
            "holds": f"takes {by} more time",
            "does not hold": f"takes {by} less time",
            "not decided within the intervals": f"takes {_span(longer, 1)} more time, undecided,",
        }[decide(longer, least=0)]
    )
    return (
        f"Batch norm (jbn's) takes {_span(taken)} of a {last}'s step.\n"
        f"Computing its results again (remat_policy) {', '.join([*said, time])} than jbn without it"
    )


COST = Study(
    "cost",
    "What does batch normalization add to the time and the memory of a training step?",
    CLAIMS,
    cells,
    measure,
    summarize,
    tabulate,
    draw,
)
