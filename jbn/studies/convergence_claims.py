"""What is said about how soon networks converge with batch normalization, and which of them decide it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jbn.studies.intervals import Interval, conclude, decide, interval, leave_open, points, say_better
from jbn.studies.study import Claim, Outcome, Summary

SAME = 0.01  # how much lower an accuracy may be and still count as good
LEVEL = 0.9  # the accuracy to be reached


@dataclass(frozen=True)
class Case:
    """A network and its data: its name, what it is, the rows of a step, and what is compared in it."""

    label: str
    what: str
    data: str
    batch_size: int
    arms: tuple[str, ...] = ("batch norm", "none")


CASES = {
    "sigmoid": Case("sigmoid", "3×100 sigmoid (MNIST)", "mnist", 60),
    "relu": Case("ReLU", "3×100 ReLU (MNIST)", "mnist", 60),
    "residual": Case("residual", "2 residual blocks (digits)", "digits", 32, ("batch norm", "none", "from 0")),
}
ARMS = {"batch norm": "batch norm", "none": "none", "from 0": "none, from 0"}


def find(summary: Summary, case: str, *arms: str) -> list[dict[str, Any]]:
    """Return what was found of arms of a network."""
    found = {row["arm"]: row for row in summary["arms"] if row["case"] == case}
    return [found[arm] for arm in arms]


def steps_of(row: dict[str, Any]) -> Interval:
    """Return the steps that an arm needs, a geometric mean."""
    return exp_of(interval(np.log(row["needed"])))


def exp_of(found: Interval) -> Interval:
    """Return the interval of which this is the logarithm."""
    return Interval(*np.exp([found.mean, found.low, found.high]).tolist())


def speed_up(summary: Summary, case: str) -> Interval:
    """Return the logarithm of how many times as many steps are needed without batch norm, seed by seed."""
    norm, none = find(summary, case, "batch norm", "none")
    return interval(np.log(none["needed"]) - np.log(norm["needed"]))


def is_faster(case: str) -> Callable[[Summary], Outcome]:
    """Return the judgement whether batch norm needs fewer steps than none."""

    def judge(summary: Summary) -> Outcome:
        norm, none = find(summary, case, "batch norm", "none")
        by = speed_up(summary, case)
        late = ", where a seed that is late counts as if it had got there with the last step"
        times, bound = exp_of(by), late * (not all(none["reached"] + norm["reached"]))
        sentence = (
            f"To {points(LEVEL)} % of the test rows: {_say_steps(norm)}, {_say_steps(none)}; "
            f"{times.mean:.1f} ({times.low:.1f} to {times.high:.1f}) times as many without it{bound}."
        )
        # What never gets there counts as if it had at the end. That is in its favour and may not decide anything.
        by = leave_open(by, low=not all(norm["reached"]), high=not all(none["reached"]))
        return conclude(sentence, by, [(ARMS[row["arm"]], row["edge"]) for row in (norm, none)], least=0)

    return judge


def _say_steps(row: dict[str, Any]) -> str:
    late = row["reached"].count(False)
    never = f" ({late} of {len(row['reached'])} seeds are late: not there after {row['steps']})" if late else ""
    return f"{ARMS[row['arm']]} {'at least ' if late else ''}{steps_of(row).mean:.0f} steps{never}"


def ends_better(case: str, one: str, other: str, least: float) -> Callable[[Summary], Outcome]:
    """Return the judgement whether an arm ends better than another by ``least`` or more, which may be below 0."""

    def judge(summary: Summary) -> Outcome:
        rows = find(summary, case, one, other)
        by = interval(np.subtract(*(row["test_accuracy"] for row in rows)))
        said = [
            f"{ARMS[row['arm']]} {points(row['interval']['mean'])} %" for row in find(summary, case, *CASES[case].arms)
        ]
        beats = f"'{ARMS[one]}' is {say_better(by, repr(ARMS[other]))}"
        sentence = f"After {rows[0]['steps']} steps: {', '.join(said)}; {beats}."
        same = f"As well is at most {points(-least)} points worse."
        few = [_say_few(row) for row in rows if row["end_edge"]]
        sentence = " ".join(part for part in (*few, sentence, same * bool(least)) if part)
        return conclude(sentence, by, [(ARMS[row["arm"]], row["end_edge"]) for row in rows], least=least)

    return judge


def _say_few(row: dict[str, Any]) -> str:
    """Return that most seeds of an arm were not given steps enough, "" where they were."""
    below, seeds = sum(value < LEVEL for value in row["test_accuracy"]), len(row["test_accuracy"])
    few = f"{row['steps']} steps are few for it: {below} of {seeds} seeds end below {points(LEVEL)} %."
    return few * (2 * below > seeds)


def say_begin_at_0(summary: Summary) -> str:
    """Return why it is open whether branches that begin at 0 end as well, "" where that is decided."""
    (row,) = find(summary, "residual", "from 0")
    if _AS_WELL(summary).verdict != "not decided within the intervals":
        return ""
    reasons = [f"its best rate is the {row['end_edge']} tried"] * bool(row["end_edge"])
    reasons += [f"{row['steps']} steps are few"] * bool(_say_few(row))
    return f" Begin at 0: {' and '.join(reasons)}{': ' * bool(reasons)}undecided."


def _is_stabler(summary: Summary) -> Outcome:
    ways = [np.asarray(row["travel"], float) for row in find(summary, "sigmoid", "batch norm", "none")]
    by = interval(np.log(ways[1]) - np.log(ways[0]))
    times = exp_of(by)
    sentence = (
        f"In the median unit the percentiles travel {ways[0].mean():.2f} times their spread with batch norm, "
        f"{ways[1].mean():.2f} times without: {times.mean:.1f} ({times.low:.1f} to {times.high:.1f}) times as far."
    )
    return Outcome(sentence, decide(by, least=0))


_AS_WELL = ends_better("residual", "from 0", "batch norm", -SAME)
CLAIMS = (
    Claim(
        "Batch norm reaches an accuracy in fewer steps",
        "Ioffe and Szegedy 2015, section 4.1 and figure 1a: 3×100 sigmoid units on MNIST",
        is_faster("sigmoid"),
    ),
    Claim(
        "Sigmoid units end higher with it",
        "Ioffe and Szegedy 2015, section 4.1 and figure 1a",
        ends_better("sigmoid", "batch norm", "none", 0),
    ),
    Claim(
        "What a unit is given is more stable with it",
        "Ioffe and Szegedy 2015, figure 1b and c: percentiles of a typical sigmoid's input",
        _is_stabler,
    ),
    Claim(
        "With ReLU, too, it takes fewer steps",
        "Ioffe and Szegedy 2015, section 4.2: Inception on ImageNet takes less than half as many",
        is_faster("relu"),
    ),
    Claim(
        "In a residual network, too, it takes fewer steps",
        "Zhang et al. 2019, abstract: norms are widely believed to accelerate convergence",
        is_faster("residual"),
    ),
    Claim(
        f"A residual network whose branches begin at 0 trains as well without it (at most {points(SAME)} points worse)",
        "De and Smith 2020 (SkipInit), abstract; so too Zhang et al. 2019 (Fixup)",
        _AS_WELL,
    ),
)
