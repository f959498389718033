"""What is said about the noise of batch statistics, of labels and of dropout, and which networks decide it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jbn.studies.intervals import (
    Interval,
    conclude,
    decide,
    interval,
    leave_open,
    note_edges,
    open_at_edges,
    points,
    say_better,
    say_points,
    weigh,
)
from jbn.studies.study import Claim, Outcome, Summary

# A batch is all of the training rows: its own statistics are those of the population, and know no noise.
ROWS = 200
USUAL = 40  # the group with dropout: the divisor of 200 that is nearest to the usual batch of 32
# How far apart two accuracies may lie and still be called the same, in every claim.
SAME = 0.01


def find(summary: Summary, noise: float, group: int, dropout: float = 0.0) -> dict[str, Any]:
    """Return what was found of an arm."""
    wanted = (noise, group, dropout)
    return next(row for row in summary["arms"] if (row["noise"], row["group"], row["dropout"]) == wanted)


def groups_of(summary: Summary, noise: float) -> list[dict[str, Any]]:
    """Return what was found of batch norm alone, from the smallest group to the whole batch."""
    rows = [row for row in summary["arms"] if row["noise"] == noise and row["group"] and not row["dropout"]]
    return sorted(rows, key=lambda row: row["group"])


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the arm that does best on validation rows; test rows have no say in it."""
    return max(rows, key=lambda row: row["validation"])


def best_group(summary: Summary, noise: float) -> dict[str, Any]:
    """Return the best of the groups that are smaller than the batch."""
    return _best(groups_of(summary, noise)[:-1])


def best_dropout(summary: Summary, noise: float, group: int) -> dict[str, Any]:
    """Return the best share dropped, beside groups of this size or, for 0, beside no norm."""
    return _best([row for row in summary["arms"] if (row["noise"], row["group"]) == (noise, group) and row["dropout"]])


def _mean(row: dict[str, Any], what: str = "test") -> str:
    return points(float(np.mean(row[what])))


def better(one: dict[str, Any], other: dict[str, Any]) -> tuple[Interval, list[tuple[str, str]]]:
    """Return by how much an arm is better than another, seed by seed, and their edges."""
    return interval(np.subtract(one["test"], other["test"])), [(row["arm"], row["edge"]) for row in (one, other)]


def _compare(one: dict[str, Any], other: dict[str, Any], *more: str, least: float) -> Outcome:
    """Return how two arms did, with more sentences, and whether by so much the first is better."""
    by, edges = better(one, other)
    shown = ", ".join(f"{row['arm']}: {_mean(row)} %" for row in (one, other))
    sentence = f"{shown}; {one['arm']} is {say_better(by)}, {weigh(open_at_edges(by, edges), SAME)}."
    return conclude(" ".join([sentence, *more]), by, edges, least=least)


# Which share of noise a judgement is about, out of those of a summary.
Noise = Callable[[Sequence[float]], float]
CLEAN, NOISY = min, max


def _gap_falls(noise: Noise) -> Callable[[Summary], Outcome]:
    """Return the judgement whether the gap rises with the group: the slope of each seed, among groups of one rate.

    The rate moves the gap too. What cannot fit the training rows, with labels as they are, has a small gap for this
    reason, and no part in it.
    """

    def judge(summary: Summary) -> Outcome:
        fits = {row["group"]: float(np.mean(row["training"])) for row in groups_of(summary, CLEAN(summary["noises"]))}
        rows = [row for row in groups_of(summary, noise(summary["noises"])) if fits[row["group"]] >= 1 - SAME]
        poor = ", ".join(f"bn {group} ({points(fit)} %)" for group, fit in fits.items() if fit < 1 - SAME)
        unfit = f"Groups that fit less than {1 - SAME:.0%} of the training rows where labels are as they are"
        beside = [f"{unfit} have no part in it: {poor}."] * bool(poor)
        if (by := _slope(rows)) is None:
            return Outcome(" ".join(["No two groups have the same rate.", *beside]), "not decided within the intervals")
        gaps: dict[float, list[str]] = {}
        for row in rows:
            gaps.setdefault(row["rate"], []).append(f"{row['arm']}: {_mean(row, 'gap')}")
        shown = "; ".join(f"at rate {rate:g} {', '.join(each)}" for rate, each in gaps.items())
        sentence = f"Training less test, {shown} points; at the same rate it grows by {say_points(by)} a doubling."
        edges = note_edges((row["arm"], row["edge"]) for row in rows)
        verdict = decide(leave_open(by, low=bool(edges), high=bool(edges)), least=0)
        return Outcome(" ".join([*edges, sentence, *beside]), verdict)

    return judge


def _slope(rows: Sequence[dict[str, Any]]) -> Interval | None:
    """Return by how much the gap grows with each doubling of the group, among those of one rate; None for no two."""
    same = np.equal.outer(*[[row["rate"] for row in rows]] * 2)
    # From the middle of those of its rate.
    doublings = (np.eye(len(rows)) - same / same.sum(1, keepdims=True)) @ np.log2([row["group"] for row in rows])
    return interval(doublings @ [row["gap"] for row in rows] / (doublings @ doublings)) if doublings.any() else None


Pick = Callable[[Summary, float], dict[str, Any]]


def _arm(group: int, dropout: float = 0.0) -> Pick:
    return lambda summary, noise: find(summary, noise, group, dropout)


def _is_better(noise: Noise, one: Pick, other: Pick) -> Callable[[Summary], Outcome]:
    """Return the judgement whether an arm beats another by more than what is called the same."""

    def judge(summary: Summary) -> Outcome:
        share = noise(summary["noises"])
        chosen = ["The group is the best on validation rows."] * (one is best_group)
        return _compare(one(summary, share), other(summary, share), *chosen, least=SAME)

    return judge


def _dropout_can_go(noise: Noise) -> Callable[[Summary], Outcome]:
    """Return the judgement whether batch norm is as good without dropout as with the best share dropped."""

    def judge(summary: Summary) -> Outcome:
        share = noise(summary["noises"])
        without, dropped = find(summary, share, 0), best_dropout(summary, share, 0)
        beside = f"Without batch norm: {_mean(without)} %, {dropped['arm']}: {_mean(dropped)} %."
        rows = find(summary, share, USUAL), best_dropout(summary, share, USUAL)
        return _compare(*rows, beside, least=-SAME)

    return judge


LUO = "Luo et al. 2019, section 2: the noise of batch statistics regularizes, and less the larger the batch"
HOFFER = "Hoffer et al. 2017, algorithm 1 and table 1"
MORE = f"by more than {points(SAME)} points"
REMOVED = f"With batch norm dropout can be removed and at most {points(SAME)} points are lost"
IOFFE = "Ioffe and Szegedy 2015, section 3.4: removed, or reduced in strength; here removed"
CLAIMS = (
    Claim(
        f"Batch norm regularizes: the network generalizes better than without it, {MORE}",
        "Ioffe and Szegedy 2015, section 3.4; here the best groups against no norm at all",
        _is_better(CLEAN, best_group, _arm(0)),
    ),
    Claim(
        f"Batch norm regularizes where labels are noise that can be learned by heart, too, {MORE}",
        "Asked here",
        _is_better(NOISY, best_group, _arm(0)),
    ),
    Claim(
        "At the same rate training and test come apart the more the larger the batch",
        LUO,
        _gap_falls(CLEAN),
    ),
    Claim(
        "At the same rate training and test come apart the more the larger the batch where labels are noise, too",
        LUO,
        _gap_falls(NOISY),
    ),
    Claim(
        f"Statistics of small groups generalize better than those of the whole batch, {MORE}",
        HOFFER,
        _is_better(CLEAN, best_group, _arm(ROWS)),
    ),
    Claim(
        f"Statistics of small groups generalize better where labels are noise, {MORE}",
        HOFFER,
        _is_better(NOISY, best_group, _arm(ROWS)),
    ),
    Claim(REMOVED, IOFFE, _dropout_can_go(CLEAN)),
    Claim(f"{REMOVED} where labels are noise", IOFFE, _dropout_can_go(NOISY)),
    Claim(
        f"Dropout before batch norm does worse than batch norm alone, {MORE}: it shifts the variance in training",
        "Li et al. 2019, abstract, here with half of the features dropped",
        _is_better(CLEAN, _arm(USUAL), _arm(USUAL, 0.5)),
    ),
)
