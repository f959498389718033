"""States without a batch at hand: they move by moments, and pool, as the rows together would have them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests.support import oracle
from tests.support.shards import mesh

pytestmark = pytest.mark.core

K, M = 4, 10
X = (np.random.default_rng(0).standard_normal((K, M, 3)) * [1, 2, 3] + [4, 5, 6]).astype(np.float32)
X += np.arange(K, dtype=np.float32)[:, None, None]  # the micro-batches lie apart
ROWS = X.reshape(-1, 3)
STATE = jbn.State(jnp.full(3, 2.0), jnp.full(3, 0.5))
BOUND = oracle.tolerance(np.float32, K * M)


def near(got, want, bound=BOUND):
    for name, value in zip(("mean", "var"), want, strict=True):
        found = got[name] if isinstance(got, dict) else getattr(got, name)
        np.testing.assert_allclose(oracle.wide(found), value, rtol=4 * bound, atol=4 * bound)


def merged(parts):
    return jbn.merge(*map(jbn.moments, parts))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.99])
@pytest.mark.parametrize("way", ["merge", "scan", "jit"])
def test_micro_batches_move_the_state_as_one_batch(way, momentum, unbiased):
    if way == "scan":
        seen, _ = jax.lax.scan(lambda m, x: (jbn.merge(m, jbn.moments(x)), None), jbn.Moments.empty(3), X)
    else:
        seen = merged(X)
    call = jax.jit(jbn.update, static_argnames="unbiased") if way == "jit" else jbn.update
    new = call(STATE, seen, momentum=momentum, unbiased=unbiased)
    count, mean, var = oracle.moments(ROWS)
    var = var * count / (count - 1) if unbiased else var
    near(new, (2.0 + (1 - momentum) * (mean - 2.0), 0.5 + (1 - momentum) * (var - 0.5)))


@pytest.mark.parametrize("kind", [dict, types.MappingProxyType, jbn.State._make])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_keeps_type_and_dtypes(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays = {name: np.asarray(value, dtype) for name, value in STATE._asdict().items()}
        state = kind(arrays.values() if kind == jbn.State._make else arrays)
        new = jbn.update(state, jbn.moments(ROWS))
        assert type(new) is type(state)
        values = dict(new) if isinstance(new, dict | types.MappingProxyType) else new._asdict()
        assert {value.dtype.name for value in values.values()} == {dtype}


def test_update_has_no_gradients():
    def loss(x, state, momentum):
        moved = jbn.bn_forward(None, state, x, True, momentum=momentum)[1]
        news = jbn.update(state, jbn.moments(x), momentum=momentum), moved
        return sum(new.mean.sum() + new.var.sum() for new in news)

    found = jax.grad(loss, (0, 1, 2))(ROWS, STATE, 0.9)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(found))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_where_moments_are_none_the_state_stays(bad):
    new = jbn.update(STATE, jbn.moments(ROWS * np.float32([1, bad, 1])), momentum=0.5)
    clean = jbn.update(STATE, jbn.moments(ROWS), momentum=0.5)
    for got, old, other in zip(new, STATE, clean, strict=True):
        assert got[1] == old[1]
        np.testing.assert_array_equal(got[::2], other[::2])
    for few in (jbn.moments(ROWS[:1]), jbn.Moments.empty(3)):
        jax.tree.map(np.testing.assert_array_equal, jbn.update(STATE, few), STATE)
    alone = np.arange(len(ROWS))[:, None] >= np.array([0, 0, len(ROWS) - 1])  # the last feature has one row
    masked = jbn.update(STATE, jbn.moments(ROWS, mask=alone), momentum=0.5)
    np.testing.assert_array_equal(np.asarray(masked) == np.asarray(STATE), [[False, False, True]] * 2)


def test_a_tool_sees_the_moments_that_a_layer_updates_by():
    """So that recalibration works where a function accumulates."""

    def apply(params, state, x):
        return jbn.update(state, merged(x))

    near(jbn.recalibrate(apply, None, STATE, [X[:1], X[1:]]), oracle.moments(ROWS)[1:])


def test_moments_of_a_shard_do_not_move_the_state_of_all():
    def step(x, **axis_name):
        return jbn.update(STATE, jbn.moments(x, **axis_name), momentum=0.0)

    over = {"mesh": mesh(), "in_specs": P("data"), "out_specs": P()}
    near(jax.shard_map(lambda x: step(x, axis_name="data"), **over)(ROWS), oracle.moments(ROWS)[1:])
    with pytest.raises(ValueError, match=r"moments varies over the mesh axis 'data'.*axis_name='data'"):
        jax.shard_map(step, **over)(ROWS)


def test_merge_takes_any_number():
    for parts in ([ROWS], [ROWS[:1], ROWS[1:]], X, [ROWS[:0], ROWS[:7], ROWS[7:8], ROWS[8:]]):
        seen = merged(parts)
        assert float(seen.count) == len(ROWS)
        near(seen, oracle.moments(ROWS)[1:])


def states_of(parts):
    """Return the state of each part, as a tree that holds others too."""
    found = [oracle.moments(x)[1:] for x in parts]
    states = [{"mean": np.float32(mean), "var": np.float32(var)} for mean, var in found]
    return [{"model": {"bn": state}, "step": np.array(3)} for state in states]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("sizes", [[5], [1, 1], [0, 7, 1], [3, 0, 12, 40]], ids=str)
def test_pooled_states_are_those_of_all_rows(sizes, traced):
    rng = np.random.default_rng(len(sizes))
    parts = [(rng.standard_normal((n, 3)) * [1, 2, 3] + 50 + 3 * i).astype(np.float32) for i, n in enumerate(sizes)]
    states = states_of(parts)
    for state, n in zip(states, sizes, strict=True):
        if not n:  # of no rows nothing is taken
            state["model"]["bn"] = jax.tree.map(lambda leaf: leaf * np.nan, state["model"]["bn"])
    statistics = [{"model": state["model"]} for state in states]
    if traced:
        pooled = jax.jit(jbn.merge_states)(statistics, sizes)
    else:
        pooled = jbn.merge_states(states, sizes)
        assert pooled["step"] is states[0]["step"]
    near(pooled["model"]["bn"], oracle.moments(np.concatenate(parts))[1:], oracle.tolerance(np.float32, sum(sizes), 50))


def test_clients_of_many_rows_are_pooled_in_float64():
    """In float32, 1e9 rows and one more would be as many."""
    states = [jbn.State(np.float64([mean]), np.float64([1e-9])) for mean in (0.0, 1.0)]
    with jax.enable_x64(True):
        pooled = jbn.merge_states(states, [10**9, 1])
    np.testing.assert_allclose(pooled.mean, 1 / (10**9 + 1), rtol=1e-12)
    np.testing.assert_allclose(pooled.var, 1e-9 + 1e9 / (1e9 + 1) ** 2, rtol=1e-12)


def test_pooling_keeps_types_and_devices():
    device = jax.devices()[3]
    states = [jax.device_put(jbn.State(jnp.full(3, v, jnp.bfloat16), jnp.ones(3)), device) for v in (0.0, 2.0)]
    pooled = jbn.merge_states(states, np.array([1, 1]))
    assert (type(pooled), pooled.mean.dtype, pooled.var.dtype) == (jbn.State, jnp.bfloat16, jnp.float32)
    assert pooled.mean.devices() == pooled.var.devices() == {device}
    near(pooled, (1.0, 2.0))


def test_no_traced_rows_at_all_leave_the_first():
    pooled = jax.jit(jbn.merge_states)([STATE, jbn.bn_init(3)[1]], [0, 0])
    jax.tree.map(np.testing.assert_array_equal, pooled, STATE)


def test_moments_made_by_hand():
    """What a client sends is numbers, not arrays of JAX."""
    _, mean, var = oracle.moments(ROWS)
    moments = jbn.Moments(np.float32(len(ROWS)), *map(np.float32, (mean, mean * 0, var)), np.float32(0))
    near(jbn.update(STATE, dataclasses.replace(moments, count=len(ROWS)), momentum=0.0), (mean, var))
    near(jbn.update(STATE, moments, momentum=0.0), (mean, var))
