"""Masks: only valid positions count, and nothing in the others reaches anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.core.layout import Layout
from jbn.core.sums import count_rows
from tests.support import oracle
from tests.support.cases import CASES, DOORS, data

pytestmark = pytest.mark.core

MASKED = [case for case in CASES if case.mask is not None and case.dtype != "float64"]
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@doors
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_nothing_leaks(case, door, train):
    clean = data(case)
    hidden = ~np.broadcast_to(clean.mask, case.shape)

    def everything(poison):
        def poisoned(a):
            if a is None or np.ndim(a) < len(case.shape):
                return a
            shared = tuple(i for i, n in enumerate(a.shape) if n < case.shape[i])  # by the positions of a part of x
            with np.errstate(over="ignore"):
                return np.where(hidden.all(shared, keepdims=True), np.asarray(poison).astype(a.dtype), a)

        names = ("x", "scale", "bias", "residual")
        d = clean._replace(**{name: poisoned(getattr(clean, name)) for name in names})
        names = [name for name in ("x", "scale", "bias", "residual") if getattr(d, name) is not None]
        # The cotangent is poisoned as well: what is computed from masked outputs must not matter either.
        g = poisoned(np.ones(case.shape, jnp.dtype(case.dtype)))
        f = lambda *v: door(case, d._replace(**dict(zip(names, v, strict=True))), train)  # noqa: E731
        y, pull, state = jax.vjp(f, *(getattr(d, name) for name in names), has_aux=True)
        ones = {name: np.ones_like(getattr(d, name)) for name in names}
        tangents = tuple(poisoned(one) for one in ones.values())
        _, dy = jax.jvp(lambda *v: f(*v)[0], tuple(getattr(d, name) for name in names), tangents)
        return y, state, pull(g), dy

    clean_ones, *others = map(everything, (1.5, np.nan, np.inf, 1e30))
    for found in others:
        for a, b in zip(jax.tree.leaves(clean_ones), jax.tree.leaves(found), strict=True):
            assert np.isfinite(oracle.wide(a)).all()
            np.testing.assert_array_equal(oracle.wide(a), oracle.wide(b))
        y, _, (dx, *_), dy = found
        for a in (y, dx, dy):
            assert not oracle.wide(a)[hidden].any()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, jax.nn.silu], ids=["none", "silu"])
def test_what_is_hidden_alarms_nobody(train, activation):
    """An array that is only kept for the derivative is no output, in which JAX would look for NaN."""
    rng, (params, state) = np.random.default_rng(0), jbn.bn_init(4)
    mask = jnp.asarray(np.arange(8)[:, None] != 3)
    x, residual = (jnp.where(mask, rng.standard_normal((8, 4)).astype(np.float32), jnp.nan) for _ in range(2))

    def loss(params, x, residual):
        options = {"mask": mask, "residual": residual, "activation": activation}
        return jbn.bn_forward(params, state, x, train, **options)[0].sum()

    with jax.debug_nans(True):
        gradients = jax.grad(loss, (0, 1, 2))(params, x, residual)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@doors
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_all_masked(case, door):
    d = data(case)._replace(mask=np.zeros(case.mask, bool), x=np.full(case.shape, np.nan, jnp.dtype(case.dtype)))
    (y, state), pull = jax.vjp(lambda x: door(case, d._replace(x=x), True), d.x)
    assert not oracle.wide(y).any()
    np.testing.assert_array_equal(state["mean"], d.mean)
    np.testing.assert_array_equal(state["var"], d.var)
    (dx,) = pull((jnp.ones_like(y), jax.tree.map(jnp.ones_like, state)))
    assert not oracle.wide(dx).any()


@doors
@pytest.mark.parametrize("value", [3.0, 1e4, -7.3e-3])
def test_one_valid_row_at_run_time(door, value):
    case = next(c for c in MASKED if c.mask == (12, 4) and c.residual)
    mask = np.zeros(case.mask, bool)
    mask[5] = True
    d = data(case)._replace(mask=mask, x=np.full(case.shape, value, np.float32))
    y, state = jax.jit(lambda d: door(case, d, True))(d)
    want = np.where(mask, np.maximum(d.bias[None] + d.residual, 0), 0)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(state["mean"], d.mean)
    np.testing.assert_array_equal(state["var"], d.var)


def test_a_mask_may_tell_features_apart():
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    mask = np.ones((50, 3), bool)
    mask[10:, 1] = False
    mask[:, 2] = False
    m = jbn.moments(x, mask=mask)
    np.testing.assert_array_equal(m.count, [50, 10, 0])
    np.testing.assert_allclose(m.mean[1], x[:10, 1].mean(), rtol=1e-5)
    _, state = jbn.bn_forward(None, jbn.State(jnp.zeros(3), jnp.ones(3)), x, True, mask=mask)
    assert state.mean[2] == 0
    assert state.var[2] == 1
    assert state.mean[1] != 0


def test_counts_beyond_the_integers_of_float32():
    # A sum of ones in float32 stops at 2²⁴.
    rows = 2**24 + 10
    m = jax.eval_shape(lambda: jbn.moments(jnp.zeros((1, 1)), mask=jnp.ones((1, 1), bool)))
    assert m.count.dtype == jnp.float32
    layout = Layout((rows, 1), (1,))
    dtype = np.dtype(np.float32)
    assert count_rows(layout, np.broadcast_to(np.ones((), bool), (rows, 1)), dtype) == rows
    assert count_rows(layout, np.ones((1, 1), bool), dtype) == rows


@pytest.mark.parametrize("shape", [(2**16, 2**15, 1), (2**20, 2**14, 1), (2**31 + 2**8, 1)])
def test_counts_of_masks_beyond_32_bits(shape):
    """Masks that cover more positions than int32 counts, as a mask of examples over large images does."""
    mask = np.ones((1,) * len(shape), bool)
    count = count_rows(Layout(shape, (len(shape) - 1,)), mask, np.dtype(np.float32))
    np.testing.assert_allclose(count, float(np.prod(shape, dtype=object)), rtol=2**-23)
    if len(shape) > 2:
        half = np.arange(shape[0])[:, None, None] % 2 == 0
        np.testing.assert_allclose(
            count_rows(Layout(shape, (2,)), half, np.dtype(np.float32)), np.prod(shape, dtype=object) / 2, rtol=2**-23
        )


def test_counts_of_one_example_beyond_32_bits():
    """A scan or a film is one example; a part of it that is valid is counted too."""
    shape = (1, 2**16, 2**15 + 2**10, 1)
    count = jax.jit(
        lambda: count_rows(
            Layout(shape, (3,)), jax.lax.broadcasted_iota(jnp.int32, shape, 2) < 2**15 + 2**9, np.dtype(np.float32)
        )
    )()
    np.testing.assert_allclose(count, 2.0**16 * (2**15 + 2**9), rtol=2**-23)


def test_merges_beyond_the_integers_of_float32_lose_no_row():
    """2²⁴ + 1 is no float32: what one addition loses is kept, and counts once it is large enough."""
    many = jbn.Moments(*(np.float32(v) for v in (2**24, 0, 1, 1, 0)))
    total, one = many, jbn.Moments(*(np.float32(v) for v in (1, 0, 3, 0, 0)))
    for _ in range(64):
        total = jbn.merge(total, one)
    assert float(total.count) + float(total.rest) == 2**24 + 64
    mean = (2**24 + 3 * 64) / (2**24 + 64)
    np.testing.assert_allclose(total.mean, mean, rtol=1e-6)


def test_an_all_true_mask_changes_nothing():
    x = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float32) + 100
    for a, b in zip(jbn.moments(x), jbn.moments(x, mask=np.ones((1, 1, 1), bool)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
