"""The digits that LSTMs read, and what the program says about what came out."""

import numpy as np
import pytest

pytest.importorskip("rich", reason="the tables are printed with rich")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from benchmarks import sequences
from jbn.studies.sequences import Effort, Trained


def test_digits_keep_their_first_rows():
    whole = sequences.digits()
    assert set(whole.lengths) == {5, 6, 7, 8}
    assert not whole.x[np.arange(8) >= whole.lengths[:, None]].any()


def test_an_arm_is_told_at_the_rate_that_is_best_on_validation_rows():
    def curves(best, test):
        valid = np.zeros((1, 2, 3))
        valid[0, best] = 0.9
        return Trained(valid, np.array([test]), np.array(test), np.zeros((2, 2, 3, 8)))

    found = {arm: curves(0, [[0.8, 0.8, 0.8], [1.0, 1.0, 1.0]]) for arm in sequences.ARMS}
    found[sequences.OURS] = curves(1, [[1.0, 1.0, 1.0], [0.7, 0.8, 0.6]])
    summary = sequences.summary(found, Effort(3, 10, 4, 16, 10, (1e-3, 1e-2)), 0.85)
    assert {arm: row["rate"] for arm, row in summary["arms"].items()} == dict.fromkeys(sequences.ARMS, 1e-3) | {
        sequences.OURS: 1e-2
    }
    assert summary["arms"]["plain"]["steps"] == [10, 10, 10]
    low, mean, high = summary[f"{sequences.OURS} less"]["plain"]
    assert mean == pytest.approx(-0.1)
    assert "not told apart" in sequences.verdict("plain", [low, mean, high])
    assert "less accurate" in sequences.verdict("plain", [-0.2, -0.1, -0.05])
