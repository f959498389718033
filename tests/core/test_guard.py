"""When the second sweep is taken: where digits would be lost, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.core.axes import Sync
from jbn.core.checks import read_layout
from jbn.core.statistics import SharedRows, choose_pilot, statistics
from jbn.core.sums import sweep_again_if
from tests.support import oracle

pytestmark = pytest.mark.core


def fires(x, mean, mask=None, epsilon=1e-5):
    """The guard moves the pilot, and nothing else does."""
    pilot = choose_pilot(jnp.asarray(mean, jnp.float32), np.dtype(np.float32))
    m = statistics(SharedRows(read_layout(x, -1), Sync(), epsilon), jnp.asarray(x), mask, pilot)
    return bool((m.pilot != pilot).any())


def normal(mean, std=1.0, rows=4096):
    return (np.random.default_rng(0).standard_normal((rows, 3)) * std + mean).astype(np.float32)


@pytest.mark.parametrize(("distance", "fired"), [(0.0, False), (1.0, False), (1.3, False), (1.5, True), (1e4, True)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_it_fires_where_the_pilot_is_far(distance, fired, mean):
    assert fires(normal(mean + distance), np.full(3, mean)) == fired


def test_one_far_channel_is_enough():
    assert fires(normal(0) + np.float32([0, 0, 5]), np.zeros(3))


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e5])
def test_a_warmed_model_with_large_means_sweeps_once(mean):
    step = jax.jit(lambda s, x: jbn.bn_forward(None, s, x, True, momentum=0.9)[1])
    state = jbn.bn_init(3)[1]
    rng = np.random.default_rng(0)
    draw = lambda: (rng.standard_normal((256, 3)) + mean).astype(np.float32)  # noqa: E731
    for _ in range(150):
        state = step(state, draw())
    assert not any(fires(draw(), state.mean) for _ in range(20))


@pytest.mark.parametrize("momentum", [0.9, 0.99])
@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, -700.0, 1e4, 123456.789])
def test_a_constant_channel_does_not_hold_it_open(value, momentum):
    x = normal(0).astype(np.float32)
    x[:, 1] = value
    step = jax.jit(lambda s: jbn.bn_forward(None, s, x, True, momentum=momentum)[1])
    state = jax.lax.fori_loop(0, 2500, lambda _, s: step(s), jbn.bn_init(3)[1])
    assert not fires(x, state.mean)


def test_masked_rows_do_not_open_it():
    x = normal(0)
    x[100:] = 1e6
    assert not fires(x, np.zeros(3), mask=jnp.arange(4096)[:, None] < 100)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_does_not_open_it(bad):
    x = normal(0)
    x[5, 1] = bad
    assert not fires(x, np.zeros(3))


def test_a_state_that_is_not_finite_is_no_pilot():
    assert not fires(normal(0), np.array([np.nan, np.inf, 0]))


@pytest.mark.parametrize("near", [100, 99.5, np.float32(100), np.full(3, 100.2, np.float32)], ids=str)
def test_moments_around_a_near_pilot_sweep_once(near):
    """The guard leaves the pilot where it is; around 0 it moves it."""
    x = normal(100)
    found, other = jbn.moments(x, pilot=near), jbn.moments(x)
    np.testing.assert_array_equal(found.pilot, np.broadcast_to(np.float32(near), 3))
    assert (other.pilot != 0).all()
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(found.mean, mean, rtol=2.0**-22)
    np.testing.assert_allclose(found.var, var, rtol=1e-5)


@pytest.mark.parametrize("pilot", [np.nan, np.inf, -1e30, 1e300, 1e5, np.float32([np.nan, 100, 1e30])], ids=str)
def test_moments_are_right_around_any_pilot(pilot):
    x = normal(100)
    m = jbn.moments(x, pilot=pilot)
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(m.mean, mean, rtol=2.0**-22)
    np.testing.assert_allclose(m.var, var, rtol=1e-5)
    slope = jax.grad(lambda x: jbn.moments(x, pilot=pilot).var.sum())(x)
    np.testing.assert_allclose(slope, 2 * (x - mean) / len(x), atol=1e-7)


def test_epsilon_decides_what_digits_matter():
    x = normal(1e-3, std=1e-6)
    assert not fires(x, np.zeros(3), epsilon=1e-5)
    assert fires(x, np.zeros(3), epsilon=1e-9)


def test_a_nan_channel_beside_one_that_is_far():
    x = normal(0) + np.float32([0, 1e4, 0])
    x[7, 0] = np.nan
    state = jbn.bn_init(3)[1]
    y, new = jbn.bn_forward(None, state, x, True)
    far = x[:, 1].astype(np.float64)
    np.testing.assert_allclose(y[:, 1], (far - far.mean()) / np.sqrt(far.var() + 1e-5), atol=4e-6)
    assert new.mean[0] == 0
    assert new.mean[1] > 0


@pytest.mark.parametrize("group_size", [None, 125])
@pytest.mark.parametrize(("x_mean", "std"), [(0.0, 1.0), (3.0, 1.0), (1e3, 1.0), (0.0, 1e-3)])
@pytest.mark.parametrize("mean", [12345679.0, -1e9, 1e12, -1e15, 1e20, 1e30, -3e38])
def test_a_running_mean_far_beyond_the_batch_spoils_nothing(mean, x_mean, std, group_size):
    """It is left behind by one batch of huge values, finite, and x - k has no digit of x then."""
    x = (np.random.default_rng(0).standard_normal((250, 4)) * std + x_mean).astype(np.float32)
    state = jbn.State(jnp.full(4, mean), jnp.ones(4))
    y, new = jax.jit(lambda s, x: jbn.bn_forward(None, s, x, True, momentum=0.0, group_size=group_size))(state, x)
    parts = [x] if group_size is None else np.split(x, 2)
    want = np.concatenate([oracle.forward(part).y for part in parts])
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
    _, batch_mean, var = oracle.moments(x)
    np.testing.assert_allclose(new.var, var, rtol=2e-5, atol=2.0**-23)  # an ulp of the old one, from which it moves
    assert np.abs(new.mean - batch_mean).max() <= 2.0**-22 * abs(mean)


def over_members(depth):
    """A training call under ``depth`` vmaps, of states and batches."""
    step = lambda state, x: jbn.bn_forward(None, state, x, True)  # noqa: E731
    for _ in range(depth):
        step = jax.vmap(step)
    return jax.jit(step)


def members(*shape):
    states = jax.tree.map(lambda a: jnp.broadcast_to(a, (*shape, 3)), jbn.bn_init(3)[1])
    return states, np.random.default_rng(1).standard_normal((*shape, 64, 3)).astype(np.float32)


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_members_of_vmap_are_asked_together_whether_any_is_far(shape):
    """A condition for each would be a selection, of which both sides are always computed."""
    program = over_members(len(shape)).lower(*members(*shape)).compile()
    assert " conditional(" in program.as_text()


def test_a_member_of_vmap_that_is_near_keeps_what_was_found():
    far, pilot, found = jnp.array([True, False]), jnp.zeros((2, 3)), (jnp.ones((2, 3)), jnp.full((2, 3), 2.0))
    again = lambda far, pilot, found: sweep_again_if(far, lambda k: (k + 5, k + 6), pilot, found)  # noqa: E731
    for mapped in (jax.vmap(again), jax.jit(jax.vmap(again))):
        first, second = mapped(far, pilot, found)
        np.testing.assert_array_equal(first[:, 0], [5, 1])
        np.testing.assert_array_equal(second[:, 0], [6, 2])


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("means", [[0, 0, 0, 0], [0, 1e4, 0, 1], [0, np.nan, 1e30, 1e5]], ids=str)
def test_a_member_of_vmap_does_not_feel_its_neighbours(shape, means):
    states, x = members(*shape)
    x = x + np.float32(means).reshape(*shape, 1, 1)
    every = over_members(len(shape))
    y, new = every(states, x)
    for member in np.ndindex(*shape):
        alone = np.zeros_like(x)
        alone[member] = x[member]
        found = every(states, alone)
        for a, b in zip(jax.tree.leaves((y, new)), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(a[member], b[member])
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(want := oracle.forward(x[member]).y).all() and abs(x[member]).max() < 1e6:
                np.testing.assert_allclose(y[member], want, atol=4e-6)
