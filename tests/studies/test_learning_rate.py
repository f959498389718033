"""The study of learning rates: nothing here asserts how accurate a network becomes."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from jbn.studies import learning_rate as study
from jbn.studies.gallery import run
from jbn.studies.intervals import points
from jbn.studies.study import Measured
from jbn.studies.terminal import show_sheet

UNDECIDED = "not decided within the intervals"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    return run("learning-rate", size="quick", out=out), out / "learning-rate"


def test_each_arm_is_measured_at_each_rate(quick):
    found, out = quick
    assert set(found["summary"]["arms"]) == set(study.ARMS)
    for arm in found["summary"]["arms"].values():
        assert np.shape(arm["test_accuracy"]) == (2, len(found["summary"]["rates"]))
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "does not hold", UNDECIDED}
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("size", study.EXTENTS)
def test_rates_span_four_decades(size):
    rates = study.rates_of(study.EXTENTS[size])
    assert rates[-1] / rates[0] == pytest.approx(1e4)
    np.testing.assert_allclose(np.diff(np.log10(rates)), 4 / (len(rates) - 1), atol=0.02)


def measured(seeds=4, **accuracies):
    """Return cells whose seeds end at these accuracies, one for each rate, 0.001 apart from each other."""
    rates = [0.01, 0.1, 1.0, 10.0]
    cells = []
    for arm in study.ARMS:
        means = np.array(accuracies.get(arm.replace(" ", "_"), [0.85, 0.95, 0.1, 0.1]))
        test = means + 0.001 * np.arange(seeds)[:, None]
        settings = {"arm": arm, "rates": rates, "seeds": seeds, "steps": 8}
        cells.append(Measured(settings, {"validation": test, "test": test, "diverged": test < 0.11}))
    return cells


def verdicts(**accuracies):
    summary = study.summarize(measured(**accuracies))
    return [claim.judge(summary).verdict for claim in study.CLAIMS]


def test_claims_can_be_refuted_and_hold():
    assert verdicts(batch_norm=[0.85, 0.953, 0.98, 0.1]) == ["holds"] * 5
    # Batch norm is best, and best at all, where none is: at the smallest rate, and nothing else trains.
    worse = verdicts(batch_norm=[0.97, 0.2, 0.1, 0.1], none=[0.85, 0.90, 0.1, 0.1])
    assert worse == ["does not hold", "does not hold", "holds", "holds", UNDECIDED]
    wrong = verdicts(batch_norm=[0.96, 0.97, 0.98, 0.1], none=[0.85, 0.95, 0.99, 0.9])
    assert wrong == ["does not hold", "does not hold", "does not hold", "holds", UNDECIDED]
    assert verdicts(batch_norm=[0.8, 0.99, 0.97, 0.9])[3] == "does not hold"


def test_the_larger_rates_are_the_cause_where_they_give_the_larger_part():
    # They give 0.02 of 0.03, of 0.09 and of nothing; and the best rate of batch norm may be the lower one.
    for norm, none, verdict in (
        ([0.85, 0.96, 0.98, 0.1], [0.85, 0.95, 0.1, 0.1], "holds"),
        ([0.85, 0.96, 0.98, 0.1], [0.85, 0.89, 0.1, 0.1], "does not hold"),
        ([0.85, 0.96, 0.9, 0.1], [0.85, 0.9, 0.95, 0.1], "does not hold"),
    ):
        assert verdicts(batch_norm=norm, none=none)[-1] == verdict
    cells = measured(batch_norm=[0.85, 0.96, 0.98, 0.1], none=[0.85, 0.94, 0.1, 0.1])
    cells[-1].numbers["test"][:, 1] += [-0.01, 0.01, -0.01, 0.01]
    outcome = study.CLAIMS[-1].judge(study.summarize(cells))
    assert outcome.verdict == UNDECIDED
    assert (
        "from 0.1, the best rate of none, to 1, its own, batch norm gains 2.0 (2.0 to 2.0)" in outcome.sentence.lower()
    )


def test_a_sentence_begins_with_the_rates_at_an_edge_of_the_grid_which_decide_nothing_against_their_arms():
    cells = study.summarize(measured(batch_norm=[0.85, 0.95, 0.96, 0.97], none=[0.85, 0.9, 0.98, 0.1]))
    better, little, _ = (claim.judge(cells) for claim in study.CLAIMS[2:])
    assert better.sentence.startswith(
        "The best rate is at an edge of the grid, and a better one may lie outside: batch"
    )
    assert (better.verdict, little.verdict) == (UNDECIDED, "holds")
    assert little.sentence.startswith("At 1, the best rate without it")
    assert little.sentence.endswith(
        "At 0.01, in as many steps, it is equal in the mean (0.0 to 0.0 points); all in means, not medians."
    )
    # Where that of none is at an edge, more of none would be nearer: this gain is too large, and refutes nothing.
    cells = study.summarize(measured(batch_norm=[0.85, 0.95, 0.96, 0.98], none=[0.85, 0.9, 0.92, 0.95]))
    assert study.CLAIMS[3].judge(cells).verdict == UNDECIDED


def test_larger_rates_that_gain_nothing_refute_the_claim():
    cells = measured(batch_norm=[0.85, 0.95, 0.97, 0.1])
    numbers = cells[0].numbers
    cells[0] = Measured(cells[0].settings, numbers | {"test": numbers["test"] - [0, 0, 0.05, 0]})
    assert study.CLAIMS[-1].judge(study.summarize(cells)).verdict == "does not hold"


def test_a_rate_at_which_half_of_the_seeds_end_trains():
    cells = measured()
    test = np.array([[0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.3, 0.1], [0.9, 0.9, 0.3, 0.9]])
    cells[0] = Measured(cells[0].settings, cells[0].numbers | {"test": test, "diverged": np.zeros((4, 4), bool)})
    arm = json.loads(json.dumps(study.summarize(cells)))["arms"]["batch norm"]
    assert (arm["largest"], arm["largest_of_seed"], arm["failed"]) == (2, [2, 2, 1, 3], [0, 0, 2, 3])
    diverged = np.zeros((4, 4), bool)
    diverged[0, 2] = True
    cells[0] = Measured(cells[0].settings, cells[0].numbers | {"diverged": diverged})
    arm = study.summarize(cells)["arms"]["batch norm"]
    assert (arm["largest"], arm["failed"], arm["diverged"]) == (1, [0, 0, 3, 3], [0, 0, 1, 0])


def test_what_trains_everywhere_and_what_trains_nowhere_is_said():
    cells = measured(batch_norm=[0.9] * 4, none=[0.2] * 4)
    notes = " ".join(study.tabulate(study.summarize(cells)).notes)
    assert "batch norm: at least 10; layer norm: 0.1; none: below 0.01." in notes
    nowhere = study.summarize(measured(batch_norm=[0.2] * 4))
    assert study.CLAIMS[1].judge(nowhere).verdict == UNDECIDED


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_its_terminal(width):
    sheet = study.tabulate(study.summarize(measured(none=[0.85, 0.95, 0.4, 0.1])))
    with io.StringIO() as file:
        show_sheet(Console(file=file, width=width), type(sheet)(sheet.heading, sheet.rows))
        lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any(re.fullmatch(r"1 +10\.2 \(4\) +10\.2 \(4\) +40\.2 \(4\)", line) for line in lines), lines


def test_the_title_of_the_figure_says_what_came_out():
    summary = study.summarize(measured(batch_norm=[0.85, 0.953, 0.98, 0.1]))
    right = [points(summary["arms"][arm]["interval"]["mean"]) for arm in ("batch norm", "layer norm", "none")]
    figure = study.draw(summary)
    assert right[0] not in right[1:]
    assert " ".join(figure.get_suptitle().split()) == (
        "Batch norm trains at larger rates: the largest is 1, of layer norm 0.1, of none 0.1. "
        f"Right in the mean, each at its best rate: batch norm {right[0]} %, layer norm {right[1]} %, none {right[2]} "
        "%; batch norm is 3.0 points better (3.0 to 3.0) than none; at none's rate 0.3 points better (0.3 to 0.3)"
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(study.ARMS)
