"""What is said about batch normalization in recurrent networks: which networks decide it, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jbn.studies.figures import LOOKS, OF_BATCH_NORM, OF_LAYER_NORM, OF_NONE, Look
from jbn.studies.intervals import Interval, decide, interval, leave_open, note_edges, open_at_edges, points, say_points
from jbn.studies.sequences import Norms, Tanh
from jbn.studies.study import Claim, Outcome, Summary, Verdict

SCALES = (0.1, 0.3, 1.0)
LEVEL = 0.85  # the accuracy on test rows to which steps of training are counted
VANISHED = -1.0  # log₁₀ of what is left of a gradient that is said to vanish
CONSTANT = float(np.log10(2))  # of the factor within which a gradient is nearly constant
SEVERE = 0.05  # loss of accuracy
SAVED = 0.1  # share of the steps: who saves less is no help, who saves more does so substantially
EDGES = {"edge": "The rate that ends most accurate", "soonest_edge": "The rate of fewest steps"}
UNDECIDED: Verdict = "not decided within the intervals"


@dataclass(frozen=True)
class Arm:
    """An LSTM that is trained: its name and look in the figure, its norms, and what γ begins with."""

    label: str
    look: Look
    norms: Norms
    scale: float = 1.0


# By their names in the table.
ARMS = {
    "none": Arm("none", OF_NONE, Norms("none")),
    "BN of input": Arm("BN of input, γ = 1", LOOKS[5], Norms("batch", recurrent=False)),
    "BN, γ = 0.1": Arm("BN, γ = 0.1", LOOKS[1], Norms("batch"), 0.1),
    "BN, γ = 1": Arm("BN, γ = 1", OF_BATCH_NORM, Norms("batch")),
    "layer norm": Arm("layer norm, γ = 1", OF_LAYER_NORM, Norms("layer")),
}
SMALL, LARGE = "BN, γ = 0.1", "BN, γ = 1"


@dataclass(frozen=True)
class Untrained:
    """A tanh network: its name in the table, and what it is."""

    label: str
    network: Tanh


TANH = {
    "": Untrained("", Tanh("batch")),
    "tanh' taken for 1": Untrained("tanh'=1", Tanh("batch", saturates=False)),
    "orthogonal": Untrained("orthogonal", Tanh("batch", identity=False)),
    "two norms": Untrained("two norms", Tanh("batch", apart=True)),
    "two norms, orthogonal": Untrained("two, orth.", Tanh("batch", apart=True, identity=False)),
    "no norm": Untrained("no norm", Tanh("none")),
    "layer norm": Untrained("layer norm", Tanh("layer")),
}


class NotMeasured(LookupError):
    """A network that a size leaves out."""


def find_tanh(summary: Summary, scale: float, network: str = "") -> dict[str, Any]:
    """Return what was found of a tanh network at a γ."""
    for row in summary["tanh"]:
        if (row["network"], row["scale"]) == (network, scale):
            return row  # type: ignore[no-any-return]
    raise NotMeasured(f"tanh, {network}")


def find_lstm(summary: Summary, arm: str) -> dict[str, Any]:
    """Return what was found of an LSTM."""
    for row in summary["lstm"]:
        if row["arm"] == arm:
            return row  # type: ignore[no-any-return]
    raise NotMeasured(arm)


def _if_measured(judge: Callable[[Summary], Outcome]) -> Callable[[Summary], Outcome]:
    """Return a judgement that decides nothing where a size leaves out what it compares."""

    def judge_or_not(summary: Summary) -> Outcome:
        try:
            return judge(summary)
        except NotMeasured as missing:
            return Outcome(f"Not measured at this size: {missing}.", UNDECIDED)

    return judge_or_not


def factor(power: float) -> str:
    """Return 10 to a power in two digits."""
    return f"{float(f'{10**power:.2g}'):g}"


def _left(row: dict[str, Any]) -> str:
    found = interval(row["first"])
    return f"{factor(found.mean)} ({factor(found.low)} to {factor(found.high)})"


def _vanishes(summary: Summary) -> Outcome:
    large = find_tanh(summary, 1.0)
    sentence = (
        f"At γ = 1 the norm at the first of {len(large['path'])} steps is {_left(large)} times that of the last, with "
        f"one norm and the identity for a recurrent kernel; to vanish is to fall below {factor(VANISHED)}. It is "
    )
    others = [
        f"{factor(interval(find_tanh(summary, 1.0, network)['first']).mean)} with {words}"
        for network, words in (
            ("orthogonal", "an orthogonal kernel"),
            ("two norms", "two norms"),
            ("two norms, orthogonal", "both"),
        )
    ]
    return Outcome(f"{sentence}{', '.join(others)}.", decide(interval(large["first"]), most=VANISHED))


def _stays(summary: Summary) -> Outcome:
    small = find_tanh(summary, 0.1)
    sentence = (
        f"At γ = 0.1 the norm at the first of {len(small['path'])} steps is {_left(small)} times that of the last; "
        f"nearly constant is more than half and less than twice as much."
    )
    return Outcome(sentence, decide(interval(small["first"]), least=-CONSTANT, most=CONSTANT))


def _needs_saturation(summary: Summary) -> Outcome:
    large, without = find_tanh(summary, 1.0), find_tanh(summary, 1.0, "tanh' taken for 1")
    mean = dict(zip(summary["derivative"]["deviation"], summary["derivative"]["mean"], strict=True))
    sentence = (
        f"tanh' is {mean[1.0]:.2f} in the mean for inputs of a standard deviation of 1, {mean[0.1]:.2f} for "
        f"0.1. At γ = 1, with the derivative taken for 1, the first norm is {_left(without)} times the last."
    )
    if decide(interval(large["first"]), most=VANISHED) != "holds":
        return Outcome(f"{sentence} It does not vanish for certain: no cause to be found.", UNDECIDED)
    return Outcome(sentence, decide(interval(without["first"]), least=VANISHED))


def _follows_saturation(summary: Summary) -> Outcome:
    other = find_tanh(summary, 1.0, "orthogonal")
    sentence = (
        f"At γ = 1, with an orthogonal kernel, the first norm is {_left(other)} times the last; the norm gives tanh "
        f"numbers of the same deviation, 1, as with the identity, where it is {_left(find_tanh(summary, 1.0))}."
    )
    return Outcome(sentence, decide(interval(other["first"]), most=VANISHED))


def by_accuracy(summary: Summary, better: str, worse: str) -> tuple[str, Interval]:
    """Return in words, and as an interval, by how much more accurate an LSTM is, seed by seed."""
    rows = one, other = [find_lstm(summary, arm) for arm in (better, worse)]
    by = interval(np.subtract(one["accuracy"], other["accuracy"]))
    shown = ", ".join(f"{row['arm']}: {points(float(np.mean(row['accuracy'])))} %" for row in rows)
    edges = [(row["arm"], row["edge"]) for row in rows]
    return " ".join([*note_edges(edges, EDGES["edge"]), f"{shown}; difference {say_points(by)}."]), open_at_edges(
        by, edges
    )


def say_steps(row: dict[str, Any]) -> str:
    """Return the steps of an LSTM to the level, which are too few where a seed never gets there."""
    return f"{'at least ' * (row['never'] > 0)}{np.mean(row['to_level']):.0f}"


def by_steps(summary: Summary, better: str, worse: str, share: float = 0) -> tuple[str, Interval]:
    """Return in words how many steps of training an LSTM saves, seed by seed, and by how many more than a share.

    Seeds that never get there count as the steps that they had, which is too few, and what is at an edge of the grid
    may need fewer than it was seen to need: these ends of the interval are open.
    """
    rows = one, other = [find_lstm(summary, arm) for arm in (better, worse)]
    by = interval(np.subtract(other["to_level"], one["to_level"]))
    shown = ", ".join(f"{row['arm']}: {say_steps(row)}" for row in rows)
    more = interval((1 - share) * np.asarray(other["to_level"]) - one["to_level"])
    sentence = f"Steps to {LEVEL:.0%}, {shown}; fewer by {by.mean:.0f} ({by.low:.0f} to {by.high:.0f})."
    edges = [(row["arm"], row["soonest_edge"]) for row in rows]
    more = leave_open(more, low=one["never"] > 0, high=other["never"] > 0)
    return " ".join([*note_edges(edges, EDGES["soonest_edge"]), sentence]), open_at_edges(more, edges)


def _is_better(better: str, worse: str) -> Callable[[Summary], Outcome]:
    def judge(summary: Summary) -> Outcome:
        sentence, by = by_accuracy(summary, better, worse)
        return Outcome(sentence, decide(by, least=0))

    return judge


def _is_more_accurate(summary: Summary) -> Outcome:
    sentence, by = by_accuracy(summary, SMALL, "none")
    return Outcome(
        f"{sentence} Beside this, and deciding nothing: {by_accuracy(summary, LARGE, 'none')[0]}", decide(by, least=0)
    )


def _is_sooner(summary: Summary) -> Outcome:
    sentence, by = by_steps(summary, SMALL, "none")
    small, large = (find_lstm(summary, arm) for arm in (SMALL, LARGE))
    rows = {"none": find_lstm(summary, "none"), SMALL: small}
    fewer = {arm: interval(np.subtract(row["to_level"], large["to_level"])) for arm, row in rows.items()}
    beside = [f"{by.mean:.0f} ({by.low:.0f} to {by.high:.0f}) fewer than {arm}" for arm, by in fewer.items()]
    sentence += (
        f" {LARGE} takes {say_steps(large)}, {' and '.join(beside)}, which is what its authors begin with, and comes "
        f"to {points(np.mean(large['accuracy']))} % beside {points(np.mean(small['accuracy']))} %."
    )
    return Outcome(sentence, decide(by, least=0))


def _does_not_help(summary: Summary) -> Outcome:
    sentence, by = by_steps(summary, LARGE, "BN of input", SAVED)
    return Outcome(f"{sentence} To help is to save {SAVED:.0%} of the latter.", decide(by, most=0))


def _is_substantially_sooner(summary: Summary) -> Outcome:
    sentence, by = by_steps(summary, "layer norm", SMALL, SAVED)
    return Outcome(f"{sentence} Substantial is {SAVED:.0%} of the latter.", decide(by, least=0))


def _degrades(summary: Summary) -> Outcome:
    row = find_lstm(summary, SMALL)
    by = interval(np.subtract(row["accuracy"], row["pooled"]))
    sentence = (
        f"{SMALL}, the same networks by the statistics of their step: {points(np.mean(row['accuracy']))} %, of all "
        f"steps: {points(np.mean(row['pooled']))} %; difference {say_points(by)}. Severe is {points(SEVERE)} points."
    )
    return Outcome(sentence, decide(by, least=SEVERE))


COOIJMANS = "Cooijmans et al. 2017"
CLAIMS = (
    Claim(
        "For large γ the gradient of a tanh network, here with the identity for a recurrent kernel, quickly goes to "
        "zero as it goes back in time",
        f"{COOIJMANS}, section 4 and figure 1a",
        _if_measured(_vanishes),
    ),
    Claim(
        "For small γ the norm of that gradient is nearly constant",
        f"{COOIJMANS}, section 4 and figure 1a",
        _if_measured(_stays),
    ),
    Claim(
        "It vanishes as tanh saturates: with a derivative of 1 it would not",
        f"{COOIJMANS}, section 4 and figure 1b, a conjecture",
        _if_measured(_needs_saturation),
    ),
    Claim(
        "That tanh saturates is enough for it to vanish: so it does with another recurrent kernel",
        f"Asked here of the conjecture of {COOIJMANS}",
        _if_measured(_follows_saturation),
    ),
    Claim(
        "γ should begin small: an LSTM with γ = 0.1 ends more accurate than with γ = 1",
        f"{COOIJMANS}, section 4: earlier difficulties are largely due to γ",
        _if_measured(_is_better(SMALL, LARGE)),
    ),
    Claim("Batch norm makes an LSTM converge faster", f"{COOIJMANS}, abstract", _if_measured(_is_sooner)),
    Claim("Batch norm makes an LSTM generalize better", f"{COOIJMANS}, abstract", _if_measured(_is_more_accurate)),
    Claim(
        f"Averaging the statistics over time severely degrades performance, by more than {points(SEVERE)} points",
        f"{COOIJMANS}, section 3",
        _if_measured(_degrades),
    ),
    Claim(
        "Batch norm of what comes from the hidden state does not help the training: it saves less than "
        f"{100 * SAVED:.0f} % of the steps",
        "Laurent et al. 2016, abstract; γ = 1, beside batch norm of the input's part alone",
        _if_measured(_does_not_help),
    ),
    Claim(
        "Layer norm substantially reduces the training time compared with what was published before, by more than "
        f"{100 * SAVED:.0f} %",
        f"Ba et al. 2016, abstract; here beside {SMALL}",
        _if_measured(_is_substantially_sooner),
    ),
)
