"""The layer that CrossQ is given in the place of its own, and what the program says about its returns."""

import jax
import numpy as np
import pytest

import jbn

pytest.importorskip("rich", reason="the tables are printed with rich")

from benchmarks import crossq
from tests.support import oracle


def test_the_layer_is_plain_until_it_is_warm_and_then_normalizes_by_the_state():
    x = (np.random.default_rng(0).standard_normal((64, 3)) * 1.5 + 0.5).astype(np.float32)
    layer = crossq.BatchRenorm(use_running_average=False, warmup_steps=1)
    variables = layer.init(jax.random.key(0), x)
    assert variables["batch_stats"]["steps"] == 0  # to initialize is no step
    plain, after = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(plain, jbn.bn_forward(*jbn.bn_init(3), x, True, epsilon=1e-3)[0])
    assert after["batch_stats"]["steps"] == 1
    warm = variables | after
    tied, _ = layer.apply(warm, x, mutable=["batch_stats"])  # nothing is clipped here
    evaluated = crossq.BatchRenorm().apply(warm, x, use_running_average=True)
    np.testing.assert_allclose(tied, evaluated, rtol=0, atol=oracle.tolerance("float32", 64, 8))
    assert np.abs(tied - plain).max() > 0.1


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([-150, -140, -130], "learns as with"),
        ([-500, -510, -490], "learns worse"),
        ([-150, -900, -130], "few seeds do not show"),
    ],
)
def test_the_verdict(ours, said):
    curves = {"sbx-rl": [[-1500.0, -140.0]] * 3, "jbn": [[-1500.0, float(end)] for end in ours]}
    found = crossq.summary(curves)
    assert found["margin"] == pytest.approx(136)
    assert said in found["verdict"]
    low, mean, high = found["jbn - sbx-rl"][-1]
    assert mean - low == pytest.approx(high - mean)


def test_where_their_layer_has_not_learned_nothing_is_shown():
    curves = {"sbx-rl": [[-1500.0, -1600.0]] * 2, "jbn": [[-1500.0, -1600.0]] * 2}
    assert "shows nothing" in crossq.summary(curves)["verdict"]
