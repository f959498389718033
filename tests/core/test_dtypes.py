"""Dtypes: y in that of x, arithmetic and statistics at least float32, the state in its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support import oracle

ALL = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("state_dtype", ALL)
@pytest.mark.parametrize("dtype", ALL)
def test_every_pair_under_strict_promotion(dtype, state_dtype, shift):
    param_dtype = ALL[(ALL.index(dtype) + ALL.index(state_dtype) + shift) % 4]
    out, train = [None, "bfloat16", "float64"][shift % 3], (ALL.index(dtype) + shift) % 2 == 0
    update = train and state_dtype in ("float32", "float64")  # narrow statistics are refused
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 3)) + 2, dtype)
    params = {"scale": jnp.ones(3, param_dtype), "bias": jnp.zeros(3, param_dtype)}
    state = {"mean": jnp.zeros(3, state_dtype), "var": jnp.ones(3, state_dtype)}

    def loss(params, x):
        options = {"dtype": out, "residual": x, "activation": jax.nn.relu, "update": update}
        y, new = jbn.bn_forward(params, state, x, train, **options)
        return y.sum().astype(jnp.float32), (y, new)

    with jax.numpy_dtype_promotion("strict"):
        (dp, dx), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        jax.jvp(lambda x: loss(params, x)[0], (x,), (x,))
    assert y.dtype == (out or dtype)
    assert dx.dtype == x.dtype
    assert dp["scale"].dtype == dp["bias"].dtype == param_dtype
    assert new["mean"].dtype == new["var"].dtype == state_dtype


@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16", "float16"])
def test_a_residual_of_another_dtype_under_strict_promotion(residual_dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 3)), jnp.bfloat16)
    added = jnp.ones((16, 3), residual_dtype)
    with jax.numpy_dtype_promotion("strict"):
        y, pull = jax.vjp(lambda x, r: jbn.batch_norm(x, residual=r, activation=jax.nn.relu)[0], x, added)
        dx, dr = pull(y)
    assert (dx.dtype, dr.dtype) == (x.dtype, added.dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_x_has_float32_statistics(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4096, 3)) + 30, dtype)
    _, mean, var = oracle.moments(x)
    m = jbn.moments(x)
    assert m.var.dtype == jnp.float32
    np.testing.assert_allclose(m.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(m.var, var, rtol=1e-5)


@pytest.mark.parametrize("field", ["mean", "var"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("train", [True, False])
def test_narrow_statistics_normalize_and_do_not_move(dtype, field, train):
    """An average of 16 bits stalls: in bfloat16 a mean that should be 5 stays at 4."""
    x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32) + 5
    state = {"mean": jnp.full(2, 3.0), "var": jnp.full(2, 2.0)}
    state[field] = state[field].astype(dtype)
    y, same = jbn.bn_forward(None, state, x, train, update=False)
    stats = None if train else (np.full(2, 3), np.full(2, 2))
    np.testing.assert_allclose(y, oracle.forward(x, stats=stats).y, atol=oracle.tolerance("float32", 64, 4))
    assert same is state
    with pytest.raises(
        ValueError, match=rf"state.{field} has dtype {dtype}, in which running statistics stall.*float32"
    ):
        jbn.bn_forward(None, state, x, train, update=True)


def test_the_cast_that_is_proposed_leaves_a_count_as_it_is():
    x = jnp.arange(8.0)[:, None]
    state = jbn.bn_init(1, counted=True)[1]
    state = state._replace(mean=state.mean.astype(jnp.bfloat16), var=state.var.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="running statistics stall") as caught:
        jbn.bn_forward(None, state, x, True)
    cast = str(caught.value).partition("state = ")[2].rstrip(".")
    state = eval(cast, {"jax": jax, "jnp": jnp, "state": state})  # as a user types it
    assert int(jbn.bn_forward(None, state, x, True)[1].count) == 1


@pytest.mark.usefixtures("x64")
def test_finiteness_is_judged_in_the_dtype_of_the_state():
    """A variance of float64 x that float32 does not hold would be inf, and then NaN for ever."""
    x = np.random.default_rng(0).standard_normal((64, 2)) * [1, 1e25]
    _, new = jbn.bn_forward(None, jbn.State(jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32)), x, True, momentum=0.0)
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(new.mean, [mean[0], 0], rtol=1e-5)
    np.testing.assert_allclose(new.var, [var[0], 1], rtol=1e-5)


@pytest.mark.parametrize("size", [1e19, 1e20, 1e30])
def test_squares_that_overflow_are_not_silent(size):
    """The variance does not fit into float32: y is right or NaN, never 0, and the statistics stay."""
    x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32) * np.float32([1, size])
    y, m = jbn.batch_norm(x)
    want = oracle.forward(x)
    right = np.abs(np.asarray(y)[:, 1] - want.y[:, 1]).max() < 1e-4
    assert right or np.isnan(np.asarray(y)[:, 1]).all()
    np.testing.assert_allclose(y[:, 0], want.y[:, 0], atol=oracle.tolerance("float32", 64, 4))
    assert right or np.isnan(m.var[1])
    _, new = jbn.bn_forward(None, jbn.State(jnp.zeros(2), jnp.ones(2)), x, True, momentum=0.0)
    np.testing.assert_allclose(new.var, [want.var[0], want.var[1] if right else 1], rtol=1e-5)


def test_variances_that_overflowed_before_are_not_silent_either():
    state = jbn.State(jnp.zeros(2), jnp.asarray([1, np.inf]))
    x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32)
    for update in (False, True):
        y, _ = jbn.bn_forward(None, state, x, False, update=update)
        np.testing.assert_array_equal(np.isnan(y).all(0), [False, True])
    far = [jbn.moments(np.full((1, 1), mean, np.float32)) for mean in (1e20, -1e20)]
    assert np.isnan(jbn.merge(*far).var)


@pytest.mark.usefixtures("x64")
def test_float64_is_float64_all_the_way():
    x = np.random.default_rng(0).standard_normal((1000, 3)) + 1e6
    want = oracle.forward(x)
    y, m = jbn.batch_norm(x)
    assert m.var.dtype == jnp.float64
    np.testing.assert_allclose(m.var, want.var, rtol=1e-12)
    np.testing.assert_allclose(y, want.y, rtol=0, atol=oracle.tolerance("float64", len(x), x.max()))


def test_numpy_input_without_x64():
    x = np.random.default_rng(0).standard_normal((10, 3))
    y, m = jbn.batch_norm(x)
    assert y.dtype == m.var.dtype == jnp.float32
    y, state = jbn.bn_forward(None, {"mean": np.zeros(3), "var": np.ones(3)}, x, True)
    assert y.dtype == state["mean"].dtype == jnp.float32


def test_large_values_whose_squares_overflow():
    x = np.float32(1e15) * (np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32) + 1e4)
    x64 = oracle.forward(x)
    y, m = jbn.batch_norm(x)
    assert np.isfinite(np.asarray(m.var)).all()
    np.testing.assert_allclose(y, x64.y, atol=1e-4)
