"""Rounding-level accuracy at any mean, from the first step, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support import oracle

pytestmark = pytest.mark.core

SHAPES = [(32, 56, 56, 64), (4096, 12), (16, 7, 9, 5, 3)]
# Round ones, random ones, and those around the threshold of the second sweep.
MEANS = [0.0, 1.0, 1.3, 1.5, 2.0, 3.0, 10.0, 33.71, 100.0, 1e3, 1234.567, 1e4, 12345.678, 1e5, 98765.43]


def data(shape: tuple[int, ...], mean: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, int(mean * 1000), *shape])
    return (rng.standard_normal(shape) + mean).astype(np.float32)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", MEANS)
def test_output_and_variance_in_training(shape, mean, warm):
    x = data(shape, mean)
    want = oracle.forward(x)
    params, state = jbn.bn_init(shape[-1])
    if warm:
        state = jbn.State(jnp.asarray(want.mean + 0.1, jnp.float32), jnp.asarray(want.var, jnp.float32))
    y, new = jbn.bn_forward(params, state, x, True, momentum=0.0)
    assert np.abs(oracle.wide(y) - want.y).max() <= 4e-6
    assert np.abs(oracle.wide(new.var) / want.var - 1).max() <= 4e-6
    assert np.abs(oracle.wide(new.mean) - want.mean).max() <= 4e-6 + abs(mean) * oracle.ULP["float32"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", MEANS)
def test_output_in_evaluation(shape, mean):
    x = data(shape, mean)
    _, mu, var = oracle.moments(x)
    state = jbn.State(mu.astype(np.float32), var.astype(np.float32))
    want = oracle.forward(x, stats=state)
    y, same = jbn.bn_forward(jbn.bn_init(shape[-1])[0], state, x, False)
    assert np.abs(oracle.wide(y) - want.y).max() <= 4e-6
    assert same is state


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", MEANS)
def test_gradients(shape, mean):
    x = data(shape, mean)
    rng = np.random.default_rng(1)
    g = rng.standard_normal(shape).astype(np.float32)
    scale, bias = (rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32) for _ in range(2))
    want = oracle.gradients(g, x, scale, bias)
    _, pull = jax.vjp(lambda x, scale, bias: jbn.batch_norm(x, scale, bias)[0], x, scale, bias)
    for name, got in zip(("x", "scale", "bias"), pull(g), strict=True):
        assert oracle.relative_l2(got, want[name]) <= 1e-5, name


@pytest.mark.parametrize("state", ["constant", "argument", "none", "groups"])
@pytest.mark.parametrize("shape", [(64, 7, 7, 96), (32, 28, 28, 64), (4096, 12)], ids=str)
@pytest.mark.parametrize("mean", [1234.567, 12345.678, 98765.43])
def test_gradients_under_jit(shape, mean, state):
    """What the compiler knows of the pilot, and fuses, must not make it another number at another place."""
    x, g = data(shape, mean), data(shape, 0.0, seed=1)
    params, fresh = jbn.bn_init(shape[-1])

    def dx(given, x, g):
        def loss(x):
            if state == "none":
                return (jbn.batch_norm(x)[0] * g).sum()
            size = shape[0] // 4 if state == "groups" else None
            return (jbn.bn_forward(params, given, x, True, group_size=size)[0] * g).sum()

        return jax.grad(loss)(x)

    got = jax.jit(dx)(fresh, x, g) if state == "argument" else jax.jit(lambda x, g: dx(fresh, x, g))(x, g)
    parts = [(x, g)] if state != "groups" else zip(np.split(x, 4), np.split(g, 4), strict=True)
    want = np.concatenate([oracle.gradients(g, x)["x"] for x, g in parts])
    assert oracle.relative_l2(got, want) <= 16 * oracle.ULP["float32"]


@pytest.mark.parametrize("start", [0.0, 1e4], ids=["fresh", "warm"])
def test_running_mean_after_a_thousand_updates(start):
    """A float32 mean of 10⁴ is rounded to steps of 1e-3 a thousand times: the root mean square is what is left."""
    momentum, features, rows, mean = 0.99, 64, 4096, 1e4
    params, _ = jbn.bn_init(features)
    exact = np.full(features, start)
    state = jbn.State(jnp.full(features, start), jnp.ones(features))
    step = jax.jit(lambda state, x: jbn.bn_forward(params, state, x, True, momentum=momentum)[1])
    rng = np.random.default_rng(0)
    for _ in range(1000):
        x = rng.standard_normal((rows, features), np.float32) + np.float32(mean)
        exact = momentum * exact + (1 - momentum) * x.mean(0, dtype=np.float64)
        state = step(state, x)
    error = oracle.wide(state.mean) - exact
    assert np.sqrt(np.mean(error**2)) <= 2e-3
    if start:
        assert abs(error.mean()) <= 5e-4


@pytest.mark.parametrize("shards", [2, 3, 8, 64])
@pytest.mark.parametrize("tree", [False, True], ids=["in order", "as a tree"])
def test_merge_of_unequal_shards(shards, tree):
    rng = np.random.default_rng(shards)
    counts = rng.integers(16, 4097, shards)
    counts[shards // 2] = 0
    counts[0] = 16
    parts = [data((n, 12), 1e4, seed=i) for i, n in enumerate(counts)]
    want = oracle.moments(np.concatenate(parts))
    found = [jbn.moments(part) for part in parts]
    while len(found) > 1:
        found = [jbn.merge(found[0], found[1]), *found[2:]] if not tree else [
            *(jbn.merge(a, b) for a, b in zip(found[::2], found[1::2], strict=False)),
            *(found[-1:] if len(found) % 2 else []),
        ]  # fmt: skip
    (m,) = found
    assert float(m.count) == want[0][0]
    assert np.abs((oracle.wide(m.pilot) + oracle.wide(m.offset)) / want[1] - 1).max() <= 4e-6
    assert np.abs(oracle.wide(m.var) / want[2] - 1).max() <= 4e-6
