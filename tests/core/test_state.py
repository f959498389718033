"""State in, state out: its type, its shapes, and when it moves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

import jbn
from tests.support import oracle

pytestmark = pytest.mark.core

X = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32) * [1, 2, 3] + np.float32([4, 5, 6])
X = X.astype(np.float32)


@pytest.mark.parametrize("make", [lambda s: s, lambda s: s._asdict(), lambda s: FrozenDict(s._asdict())])
@pytest.mark.parametrize("train", [True, False])
def test_the_type_comes_back(make, train):
    params, state = map(make, jbn.bn_init(3))
    _, new = jbn.bn_forward(params, state, X, train)
    assert type(new) is type(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_absent_parameters():
    bare = jbn.batch_norm(X)[0]
    state = jbn.bn_init(3)[1]
    for params in (None, {}, jbn.Params(None, None), {"scale": None}, {"bias": np.zeros(3)}, {"scale": np.ones(3)}):
        np.testing.assert_allclose(jbn.bn_forward(params, state, X, True)[0], bare, atol=1e-6)
    params, _ = jbn.bn_init(3, use_scale=False, use_bias=False)
    assert params == jbn.Params(None, None)


def test_bn_init():
    params, state = jbn.bn_init((2, 3), dtype=jnp.bfloat16)
    assert params.scale.shape == state.mean.shape == (2, 3)
    assert params.bias.dtype == jnp.bfloat16
    assert state.var.dtype == jnp.float32
    assert params.scale.min() == state.var.max() == 1
    assert params.bias.max() == state.mean.max() == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 1.0, np.float32(0.9), jnp.float32(0.9)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_momentum_is_the_weight_of_the_old_value(momentum, unbiased):
    count, mean, var = oracle.moments(X)
    var = var * count / (count - 1) if unbiased else var
    old = jbn.State(jnp.full(3, 2.0), jnp.full(3, 0.5))
    _, new = jbn.bn_forward(None, old, X, True, momentum=momentum, unbiased=unbiased)
    m = float(momentum)
    np.testing.assert_allclose(new.mean, m * 2.0 + (1 - m) * mean, rtol=1e-6)
    np.testing.assert_allclose(new.var, m * 0.5 + (1 - m) * var, rtol=1e-6)


def test_momentum_may_be_a_schedule():
    step = jax.jit(lambda m: jbn.bn_forward(None, jbn.bn_init(3)[1], X, True, momentum=m)[1])
    np.testing.assert_allclose(step(0.25).mean, 0.75 * X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(step(jnp.bfloat16(0.5)).mean, 0.5 * X.mean(0), rtol=1e-6)
    assert step._cache_size() == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_feature_that_is_not_finite_keeps_its_statistics(bad):
    x = X.copy()
    x[3, 1] = bad
    x[4, 1] = -bad if bad == 3e38 else x[4, 1]  # a finite mean, an infinite variance
    old = jbn.State(jnp.full(3, 2.0), jnp.full(3, 0.5))
    _, clean = jbn.bn_forward(None, old, X, True)
    _, new = jbn.bn_forward(None, old, x, True)
    for a, b, o in zip(new, clean, old, strict=True):
        np.testing.assert_allclose(a[::2], b[::2], rtol=1e-6)
        assert a[1] == o[1]


@pytest.mark.parametrize(
    ("field", "bad"), [*itertools.product(["mean", "var"], [np.nan, np.inf, -np.inf]), ("var", -1.0)]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_broken_state_recovers(bad, field, momentum):
    """A channel whose running statistics are none takes those of the first batch that has some."""
    state = jbn.State(jnp.full(3, 2.0), jnp.full(3, 0.5))
    broken = state._replace(**{field: state._asdict()[field].at[1].set(bad)})
    y, new = jbn.bn_forward(None, broken, X, True, momentum=momentum)
    np.testing.assert_allclose(y, jbn.batch_norm(X)[0], atol=1e-6)
    _, clean = jbn.bn_forward(None, state, X, True, momentum=momentum)
    _, *batch = oracle.moments(X)
    for got, other, whole in zip(new, clean, batch, strict=True):
        np.testing.assert_allclose(got[::2], other[::2], rtol=1e-6)
        np.testing.assert_allclose(got[1], whole[1], rtol=1e-6)
    _, still = jbn.bn_forward(None, broken, X * np.float32([1, np.nan, 1]), True)
    np.testing.assert_array_equal(still._asdict()[field][1], broken._asdict()[field][1])  # not hidden


@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("old", [(1e7, 1e8), (-1e12, 1e30), (0.0, 3e38)])
def test_a_state_far_from_the_batch_leaves_it_no_rounding(old, momentum):
    """A momentum of 0 is the batch alone; beside a variance of 1e8 that of the batch became 0."""
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32) + 2
    state = jbn.State(*(jnp.full(3, value, jnp.float32) for value in old))
    _, mean, var = oracle.moments(x)
    for step in (jbn.bn_forward, jax.jit(jbn.bn_forward, static_argnums=3)):
        new = step(None, state, x, True, momentum=momentum)[1]
        for got, start, end in zip(new, map(oracle.wide, state), (mean, var), strict=True):
            want = momentum * start + (1 - momentum) * end
            np.testing.assert_allclose(got, want, rtol=oracle.tolerance("float32", len(x)))


@pytest.mark.parametrize("train", [True, False])
def test_no_features_and_no_rows_are_shapes_like_others(train):
    params, state = jbn.bn_init(0)
    y, new = jbn.bn_forward(params, state, np.zeros((8, 0), np.float32), train)
    assert y.shape == (8, 0)
    assert new.mean.shape == (0,)
    assert jax.grad(lambda x: jbn.bn_forward(params, state, x, train)[0].sum())(jnp.zeros((8, 0))).shape == (8, 0)
    state = jbn.State(jnp.full(3, 2.0), jnp.full(3, 0.5))
    y, new = jbn.bn_forward(None, state, np.zeros((0, 3), np.float32), train)
    assert y.shape == (0, 3)
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_the_state_is_a_carry_of_scan():
    state = jbn.bn_init(3)[1]
    final, _ = jax.lax.scan(lambda s, x: jbn.bn_forward(None, s, x, True)[::-1], state, np.stack([X, X + 1]))
    assert final.mean.dtype == jnp.float32
    np.testing.assert_allclose(final.mean, (0.99 * 0.01 + 0.01) * X.mean(0) + 0.01, rtol=1e-4)


def test_a_donated_state_is_reused():
    step = jax.jit(lambda s, x: jbn.bn_forward(None, s, x, True)[1], donate_argnums=0)
    state = jbn.bn_init(3)[1]
    new = step(state, X)
    assert state.mean.is_deleted()
    assert not new.mean.is_deleted()


def test_remat_updates_once():
    """The backward pass of a rematerialized layer runs the forward again; the state must not move again."""
    state = jbn.bn_init(3)[1]

    def loss(x, wrap):
        y, new = wrap(lambda x: jbn.bn_forward(None, state, x, True))(x)
        return (y**3).sum(), new

    (_, plain), _ = jax.value_and_grad(lambda x: loss(x, lambda f: f), has_aux=True)(X)
    (_, again), _ = jax.value_and_grad(lambda x: loss(x, jax.checkpoint), has_aux=True)(X)
    np.testing.assert_array_equal(plain.mean, again.mean)
