"""Intervals, what they decide, and which learning rate an arm is given."""

import math

import numpy as np
import pytest
from scipy import stats

from jbn.studies.intervals import (
    Chosen,
    Interval,
    choose_rate,
    conclude,
    decide,
    interval,
    leave_open,
    points,
    say_better,
    weigh,
)


def test_an_interval_is_that_of_students_t():
    values = np.random.default_rng(0).standard_normal(10)
    found, expected = interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], rtol=1e-12)
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx((expected.high - expected.low) / 2)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Of 2000 intervals 95 % do, ± 1 % in two of three runs; the seed is fixed."""
    draws = np.random.default_rng(1).standard_normal((2000, 10))
    held = np.mean([found.low <= 0 <= found.high for found in map(interval, draws)])
    assert 0.935 < held < 0.965


@pytest.mark.parametrize("values", [[1.0], [], [[1.0, 2.0]]])
def test_one_seed_has_no_interval(values):
    with pytest.raises(ValueError, match="expected one number per seed, and two seeds at least"):
        interval(values)


@pytest.mark.parametrize(
    ("low", "high", "limits", "expected"),
    [
        (0.1, 0.3, {"least": 0}, "holds"),
        (-0.3, -0.1, {"least": 0}, "does not hold"),
        (-0.1, 0.3, {"least": 0}, "not decided within the intervals"),
        (0.0, 0.0, {"least": 0}, "not decided within the intervals"),
        (-0.1, 0.1, {"least": -0.2, "most": 0.2}, "holds"),
        (0.3, 0.4, {"least": -0.2, "most": 0.2}, "does not hold"),
        (0.1, 0.4, {"least": -0.2, "most": 0.2}, "not decided within the intervals"),
        (-0.4, 0.4, {"least": -0.2, "most": 0.2}, "not decided within the intervals"),
    ],
)
def test_a_verdict_is_that_of_the_whole_interval(low, high, limits, expected):
    assert decide(Interval((low + high) / 2, low, high), **limits) == expected


def test_what_is_known_as_a_bound_decides_nothing_in_its_favour():
    for low, high, verdict in [(False, True, "holds"), (True, False, "not decided within the intervals")]:
        assert decide(leave_open(Interval(0.2, 0.1, 0.3), low=low, high=high), least=0) == verdict
        assert decide(leave_open(Interval(-0.2, -0.3, -0.1), low=high, high=low), most=0) == verdict
    assert leave_open(Interval(0.2, 0.1, 0.3), low=True, high=True) == Interval(0.2, -math.inf, math.inf)


def test_the_rate_is_the_one_of_the_best_mean_and_an_edge_is_said():
    assert choose_rate(np.array([[0.1, 0.9, 0.2], [0.2, 0.7, 0.9]])) == Chosen(1, "")
    # One lucky seed does not decide, and neither does one that diverged.
    assert choose_rate(np.array([[0.1, 0.7, 0.9], [0.1, 0.7, 0.2]])).index == 1
    assert choose_rate(np.array([[0.5, 0.2, 0.3], [0.5, 0.9, 0.3], [0.5, 0.9, 0.3]])).index == 1
    assert choose_rate(np.array([[0.5, 0.4, 0.3]])) == Chosen(0, "lowest")
    assert choose_rate(np.array([[0.3, 0.4, 0.5]])) == Chosen(2, "highest")
    assert choose_rate(np.array([[0.3, 0.5, 0.5, 0.1]])).index == 1


def test_shares_have_one_digit_and_no_sign_of_nothing():
    assert [points(value) for value in (0.98765, -0.0123, -0.0004, 0.0)] == ["98.8", "-1.2", "0.0", "0.0"]


def test_a_difference_is_said_without_a_sign_and_weighed_by_what_is_called_the_same():
    for found, said, place in (
        (Interval(-0.456, -0.699, -0.214), "45.6 points worse (21.4 to 69.9)", "beyond"),
        (Interval(-0.015, -0.016, -0.014), "1.5 points worse (1.4 to 1.6)", "beyond"),
        (Interval(0.004, -0.002, 0.009), "0.4 points better (-0.2 to 0.9)", "within"),
        (Interval(-0.0001, -0.02, 0.02), "equal in the mean (-2.0 to 2.0 points)", "perhaps beyond"),
        (Interval(0.02, 0.015, math.inf), "2.0 points better (1.5 to inf)", "beyond"),
    ):
        assert say_better(found) == said
        named = said.replace("equal", "equal to b") if "equal" in said else f"{said} than b"
        assert say_better(found, "b") == named
        assert weigh(found, 0.01) == f"{place} the 1.0 that are called the same"


@pytest.mark.parametrize(
    ("by", "first", "second", "verdict"),
    [
        (0.1, "", "", "holds"),
        (0.1, "highest", "", "holds"),
        (0.1, "", "lowest", "not decided within the intervals"),
        (-0.1, "highest", "", "not decided within the intervals"),
        (-0.1, "", "highest", "does not hold"),
        (0.0, "highest", "", "not decided within the intervals"),
    ],
)
def test_an_edge_decides_nothing_against_its_arm_and_is_said_first(by, first, second, verdict):
    found = conclude("A beats b.", Interval(by, by - 0.01, by + 0.01), [("a", first), ("b", second)], least=0)
    assert found.verdict == verdict
    assert found.sentence.startswith("The best rate is at an edge") == bool(first or second)
    assert found.sentence.endswith("A beats b.")
