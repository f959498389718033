"""What is said about the shift of inputs and gradients with batch normalization, and which arms decide it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from jbn.studies.figures import LOOKS, OF_BATCH_NORM, OF_NONE, Look
from jbn.studies.intervals import Interval, conclude, decide, interval
from jbn.studies.networks import BatchNorm, Bias, Norm
from jbn.studies.noise import Noisy
from jbn.studies.study import Claim, Outcome, Summary

Judge: TypeAlias = Callable[[Summary], Outcome]

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
    "smoothness": Quantity(
        "change/distance", "that change divided by the distance gone, at most (effective smoothness)"
    ),
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


def scale_of(name: str) -> tuple[bool, int]:
    """Return whether a quantity is told by ratios, and the factor that makes percent of accuracies."""
    return name in QUANTITIES and QUANTITIES[name].ratio, 1 if name in QUANTITIES else 100


def values_of(summary: Summary, arm: str, name: str) -> np.ndarray:
    """Return a quantity of an arm (seeds, looks), its logarithm where it is told by ratios; NaN where it is none."""
    (row,) = (row for row in summary["arms"] if row["arm"] == arm)
    found = np.asarray(row["values"][name], float)
    return np.log(np.where(found > 0, found, np.nan)) if scale_of(name)[0] else found


def interval_of(values: np.ndarray, ratio: bool) -> Interval | None:
    """Return the interval of the seeds whose number is finite, out of logarithms again; None for fewer than two."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return None
    found = interval(finite)
    return Interval(*np.exp([found.mean, found.low, found.high]).tolist()) if ratio else found


def _compare(name: str, one: str, other: str, *, least: float = -math.inf, most: float = math.inf) -> Judge:
    """Return the judgement of a quantity: how one arm stands to the other, seed by seed, by means over the steps."""
    ratio, factor = scale_of(name)

    def find(summary: Summary, one: str, name: str = name, *, first: bool = False) -> tuple[Interval | None, str]:
        values = [values_of(summary, arm, name) for arm in (one, other)]
        means = [each[:, 0] if first else each.mean(1) for each in values]
        differences = factor * (means[0] - means[1])
        by, seeds = interval_of(differences, ratio), int(np.isfinite(differences).sum())
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
            turned = side_of(by, ratio) * side_of(begun, ratio) < 0
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


def side_of(found: Interval | None, same: float = 0) -> int:
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
