"""``renorm``: its limits, states that are no numbers, and what it costs in passes."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
from benchmarks import passes
from tests.core.test_choice import near
from tests.core.test_passes import on_accelerators
from tests.support import oracle

pytestmark = pytest.mark.core


@pytest.mark.parametrize("limits", [(0.5, 1.0), (np.nan, 1.0), (2.0, -1.0), ("3", 1.0), (jnp.ones(3), 1.0)])
def test_limits_of_renorm_are_checked_by_value(limits):
    with pytest.raises(ValueError, match=r"[rd]_max is .*; expected a scalar of [01] or more"):
        jbn.renorm(*limits)


def test_renorm_is_equal_by_its_limits_and_travels_with_a_model():
    assert jbn.renorm(3, np.float32(5)) == pickle.loads(pickle.dumps(jbn.renorm(3.0, 5.0))) != jbn.renorm(3.0, 4.0)
    assert len({jbn.renorm(3.0, 5.0), jbn.renorm(3, 5)}) == 1


@pytest.mark.parametrize("state", [(np.nan, 1.0), (0.0, np.nan), (0.0, -1.0), (np.inf, 1.0)])
def test_a_state_that_is_no_number_ties_nothing(state):
    x = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32) + 2
    state = jbn.State(*(jnp.full(3, v) for v in state))
    y, new = jbn.bn_forward(None, state, x, True, normalize_by=jbn.renorm(3.0, 5.0))
    near(y, oracle.forward(x).y, "float32", 16, 4)
    assert np.isfinite(new.mean).all()
    assert np.isfinite(new.var).all()


def compiled(x, on):
    """Compile a layer with renorm; the state, an input, holds the old statistics."""
    with jbn.linen.replace(normalize_by=jbn.renorm(3.0, 5.0)):
        return passes.layer("jbn", x, on, activation=nn.relu)


@on_accelerators
def test_renorm_costs_no_pass(on):
    forward, forced, _ = compiled(passes.IMAGES, on)
    assert forward.passes(passes.IMAGES) <= 3.02
    assert forced.passes(passes.IMAGES) <= 8.03
    assert forward.conditionals == forced.conditionals == 1


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the sums of XLA's CPU loops do not fuse with what they sum")
def test_renorm_costs_no_pass_on_cpus():
    _, forced, _ = compiled(passes.ON_CPU, "cpu")
    assert forced.passes(passes.ON_CPU) <= 13.1
