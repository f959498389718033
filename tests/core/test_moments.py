"""The algebra of moments: a commutative monoid, up to rounding, whose sum over rows is the statistics of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jbn
from jbn.core.sums import divide
from tests.support import oracle

pytestmark = pytest.mark.core

batches = st.builds(
    lambda rows, mean, spread, seed: (np.random.default_rng(seed).standard_normal((rows, 3)) * spread + mean).astype(
        np.float32
    ),
    rows=st.integers(0, 40),
    mean=st.sampled_from([0.0, -3.0, 77.7, 1e4]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)


def close(m: jbn.Moments, rows: np.ndarray) -> None:
    count, mean, var = oracle.moments(rows)
    # One ulp of the largest row is what float32 data themselves leave undecided.
    ulp = np.abs(rows).max(initial=1e-3) * oracle.ULP["float32"]
    assert float(m.count) == count[0]
    np.testing.assert_allclose(oracle.wide(m.pilot) + oracle.wide(m.offset), mean, rtol=4e-6, atol=ulp)
    np.testing.assert_allclose(m.var, var, rtol=1e-5, atol=1e-5 * var.max() + ulp**2)


@given(batches)
def test_moments_are_those_of_the_rows(rows):
    close(jbn.moments(rows), rows)


@given(batches, batches)
def test_merge_is_the_union_and_commutes(a, b):
    m, n = jbn.moments(a), jbn.moments(b)
    close(jbn.merge(m, n), np.concatenate([a, b]))
    close(jbn.merge(n, m), np.concatenate([a, b]))
    if len(a) != len(b):  # at equal counts either pilot may be kept
        np.testing.assert_array_equal(jbn.merge(m, n).pilot, jbn.merge(n, m).pilot)


@given(batches, batches, batches)
def test_merge_is_associative_up_to_rounding(a, b, c):
    left = jbn.merge(jbn.merge(jbn.moments(a), jbn.moments(b)), jbn.moments(c))
    right = jbn.merge(jbn.moments(a), jbn.merge(jbn.moments(b), jbn.moments(c)))
    close(left, np.concatenate([a, b, c]))
    close(right, np.concatenate([a, b, c]))


@given(batches)
def test_empty_is_neutral(rows):
    m, nothing = jbn.moments(rows), jbn.Moments.empty(3)
    for merged in (jbn.merge(m, nothing), jbn.merge(nothing, m)):
        for p, q in zip(merged, m, strict=True):
            np.testing.assert_array_equal(p, q)


def test_merge_of_per_feature_counts():
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((20, 3)).astype(np.float32), rng.random((20, 3)) < 0.5
    halves = [jbn.moments(x[i : i + 10], mask=mask[i : i + 10]) for i in (0, 10)]
    count, mean, var = oracle.moments(x, mask=mask)
    m = jbn.merge(*halves)
    np.testing.assert_array_equal(m.count, count)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(m.var, var, rtol=1e-5)


def test_scan_of_merges_is_the_whole():
    x = np.random.default_rng(0).standard_normal((10, 16, 3)).astype(np.float32) + 1e4
    m, _ = jax.lax.scan(lambda m, x: (jbn.merge(m, jbn.moments(x)), None), jbn.Moments.empty(3), x)
    close(m, x.reshape(-1, 3))


@pytest.mark.usefixtures("x64")
def test_moments_and_merge_are_differentiable():
    x = np.random.default_rng(0).standard_normal((9, 3))

    def ours(x):
        m = jbn.merge(jbn.moments(x[:4]), jbn.moments(x[4:]))
        return (m.mean**2).sum() + (m.var**3).sum()

    def plain(x):
        return (x.mean(0) ** 2).sum() + (x.var(0) ** 3).sum()

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(jnp.asarray(x)), atol=1e-10)
    np.testing.assert_allclose(jax.hessian(ours)(x), jax.hessian(plain)(jnp.asarray(x)), atol=1e-10)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e4, 98765.43])
def test_a_constant_feature(value):
    x = np.full((1000, 2), value, np.float32)
    y, m = jbn.batch_norm(x)
    assert np.abs(y).max() <= 1e-4
    np.testing.assert_allclose(m.mean, x[0], rtol=1e-7)
    assert jnp.isfinite(jax.grad(lambda x: jbn.batch_norm(x)[0][0].sum())(x)).all()


def test_a_variance_is_never_negative():
    """Σ(x-k)²/n - d² of constant rows is rounding noise, of either sign."""
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32) / 1000
    assert jbn.batch_norm(np.broadcast_to(values, (37, 4096)))[1].var.min() >= 0


def test_a_count_divides_to_rounding_where_the_device_does_not():
    """A TPU v5e divides to 2e-5: here every quotient of the program is off by as much."""
    counts = jnp.arange(1, 2001, dtype=jnp.float32)

    def on_such_a_device(f, *args):
        program = jax.make_jaxpr(f)(*args)
        values = dict(zip(program.jaxpr.invars, args, strict=True))
        for step in program.jaxpr.eqns:
            read = [v.val if hasattr(v, "val") else values[v] for v in step.invars]  # a literal has a value of its own
            value = step.primitive.bind(*read, **step.params)
            values[step.outvars[0]] = value * (1 + 2e-5) if step.primitive.name == "div" else value
        return values[program.jaxpr.outvars[0]]

    rough = on_such_a_device(lambda n: 1 / n, counts)
    assert np.abs(oracle.wide(rough) * oracle.wide(counts) - 1).max() > 1e-5
    for part in (jnp.ones_like(counts), counts, counts + 1):
        got = on_such_a_device(divide, part, counts)
        want = oracle.wide(part) / oracle.wide(counts)
        assert np.abs(oracle.wide(got) / want - 1).max() <= 2 * oracle.ULP["float32"]


@pytest.mark.parametrize("layers", [2, 3])
def test_stacked_moments_of_several_layers_are_not_taken_for_those_of_one(layers):
    """Their counts, one a layer, would be counts of features where there are as many of these."""
    x = np.random.default_rng(0).standard_normal((layers, 8, 3)).astype(np.float32) + 3
    masks = (np.arange(8) < np.array([8, 5, 3])[:layers, None])[..., None]
    of_each = jax.vmap(lambda x, mask: jbn.moments(x, mask=mask))
    a, b = of_each(x, masks), of_each(2 * x, masks)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), jbn.bn_init(3)[1])
    with pytest.raises(ValueError, match=r"moments\[0\] has a count of shape .* jax.vmap\(jbn.merge\)"):
        jbn.merge(a, b)
    with pytest.raises(ValueError, match=r"moments has a count of shape"):
        jbn.update(state, a)
    whole = jax.vmap(jbn.merge)(a, b)
    new = jax.vmap(lambda state, m: jbn.update(state, m, momentum=0.0))(state, whole)
    for layer, mask in enumerate(masks[..., 0]):
        rows = np.concatenate([x[layer, mask], 2 * x[layer, mask]])
        close(jax.tree.map(lambda leaf, layer=layer: leaf[layer], whole), rows)
        np.testing.assert_allclose(new.mean[layer], rows.mean(0), rtol=1e-6)
