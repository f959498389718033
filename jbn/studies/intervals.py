"""Means over seeds with their intervals, what they decide, and which learning rate an arm is given.

``interval`` makes an ``Interval`` of one value per seed, ``decide`` says whether a number lies where a claim has it.
``choose_rate`` gives an arm the rate that is ``Chosen`` on validation rows; where that is at an edge of its grid,
``note_edges`` says so, ``open_at_edges`` and ``leave_open`` leave an interval without an end, and ``conclude`` decides
nothing. ``points``, ``say_points``, ``say_better``, ``say_half`` and ``weigh`` put numbers into words.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from jbn.studies.study import Outcome, Verdict

__all__ = [
    "Chosen",
    "Interval",
    "choose_rate",
    "conclude",
    "decide",
    "interval",
    "leave_open",
    "note_edges",
    "open_at_edges",
    "points",
    "say_better",
    "say_half",
    "say_points",
    "weigh",
]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its confidence interval: of many such studies, 95 % have the true mean in theirs.

    Attributes:
        mean: the mean.
        low: the lower end.
        high: the upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the width: the mean ± this."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of one value per seed with its interval, by Student's t; ``ValueError`` for fewer than two."""
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or numbers.size < 2:
        raise ValueError(f"values has shape {numbers.shape}; expected one number per seed, and two seeds at least.")
    mean = float(numbers.mean())
    quantile = float(student.ppf((1 + LEVEL) / 2, numbers.size - 1))
    half = quantile * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    return Interval(mean, mean - half, mean + half)


def decide(found: Interval, *, least: float = -math.inf, most: float = math.inf) -> Verdict:
    """Say whether a number lies from ``least`` to ``most``: not decided where an end is in its interval."""
    above, below = least == -math.inf or least < found.low, most == math.inf or found.high < most
    if above and below:
        return "holds"
    if found.high < least or most < found.low:
        return "does not hold"
    return "not decided within the intervals"


def leave_open(found: Interval, *, low: bool, high: bool) -> Interval:
    """Return an interval without its lower or its upper end, for means of what is in part known as a bound only.

    Steps that a seed was not given time for may be any number more: what they favour must not be decided by them.
    """
    return Interval(found.mean, -math.inf if low else found.low, math.inf if high else found.high)


@dataclass(frozen=True)
class Chosen:
    """The learning rate of an arm.

    Attributes:
        index: which one of the grid.
        edge: "lowest" or "highest" where the best may lie outside of the grid, else "".
    """

    index: int
    edge: str


def choose_rate(validation: np.ndarray) -> Chosen:
    """Return the rate of the largest mean accuracy on validation rows; test rows must have no say in it.

    Args:
        validation: accuracies (seeds, rates), with the rates in ascending order. Of two equal ones the lower is taken.
    """
    means = np.asarray(validation, np.float64).mean(0)
    index = int(np.argmax(means))
    edges = {0: "lowest", len(means) - 1: "highest"}
    return Chosen(index, edges.get(index, ""))


def note_edges(found: Iterable[tuple[str, str]], what: str = "The best rate") -> list[str]:
    """Return a sentence about the arms, by name and ``Chosen.edge``, whose rate is at an edge; none where none is."""
    named = [f"{name} ({edge})" for name, edge in found if edge]
    return [f"{what} is at an edge of the grid, and a better one may lie outside: {', '.join(named)}."] * bool(named)


def open_at_edges(found: Interval, edges: Sequence[tuple[str, str]]) -> Interval:
    """Return by how much one arm is better than another, open where one may be better than it was seen to be.

    Args:
        found: the difference, as it was seen.
        edges: of the first arm and of the second one the name, and ``Chosen.edge``.
    """
    (_, first), (_, second) = edges
    return leave_open(found, low=bool(second), high=bool(first))


def conclude(
    sentence: str,
    found: Interval,
    edges: Sequence[tuple[str, str]],
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> Outcome:
    """Return what a difference between two arms decides: nothing against one whose best rate is at an edge.

    Args:
        sentence: what came out; edges are said before it, for they may be why it decides nothing.
        found: by how much the first arm is better.
        edges: as ``open_at_edges`` has them.
        least: as ``decide`` has it.
        most: the same.
    """
    verdict = decide(open_at_edges(found, edges), least=least, most=most)
    return Outcome(" ".join([*note_edges(edges), sentence]), verdict)


def points(value: float) -> str:
    """Return a share in percent, with one digit behind the point and never -0.0."""
    return f"{round(100 * value, 1) + 0:.1f}"


def say_points(found: Interval) -> str:
    """Return a difference of shares in words."""
    return f"{points(found.mean)} ({points(found.low)} to {points(found.high)}) points"


def say_better(found: Interval, other: str = "") -> str:
    """Return by how much one arm is better than another, if it is named, in words that need no sign of the mean.

    >>> from jbn.studies.intervals import Interval, say_better
    >>> say_better(Interval(-0.05, -0.06, -0.03))
    '5.0 points worse (3.0 to 6.0)'
    >>> say_better(Interval(0.0, -0.02, 0.02), "none")
    'equal to none in the mean (-2.0 to 2.0 points)'
    """
    than, mean = f" than {other}" * bool(other), round(100 * found.mean, 1)
    if mean < 0:
        return f"{points(-found.mean)} points worse ({points(-found.high)} to {points(-found.low)}){than}"
    span = f"{points(found.low)} to {points(found.high)}"
    if mean == 0:
        return f"equal{f' to {other}' * bool(other)} in the mean ({span} points)"
    return f"{points(found.mean)} points better ({span}){than}"


def weigh(found: Interval, same: float) -> str:
    """Return in words whether two arms are called the same: where they are less than ``same`` apart."""
    verdict = decide(found, least=-same, most=same)
    place = {"holds": "within", "does not hold": "beyond"}.get(verdict, "perhaps beyond")
    return f"{place} the {points(same)} that are called the same"


def say_half(found: Interval) -> str:
    """Return a share in percent with half of its interval, as a table has it."""
    return f"{points(found.mean)} ±{points(found.half)}"


def __dir__() -> list[str]:
    return __all__
