"""The sequences that LSTMs are trained on, the cell, its gradient through time, and what is counted of its training."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.studies.sequences import (
    Effort,
    Norms,
    Reader,
    Sequences,
    Tanh,
    begin,
    loss,
    no_push,
    norms_of,
    pool,
    reuse_last,
    split,
    steps_to,
    train,
)


def test_seeds_have_splits_and_batches_of_their_own_and_no_row_twice():
    numbered = Sequences(np.zeros((1797, 2, 1)), np.full(1797, 2), np.arange(1797))
    *parts, batches = split(numbered, Effort(2, 30, 4, 16, 10, (1e-3, 1e-2)))
    for seed in range(2):
        rows = np.concatenate([part.labels[seed] for part in parts])
        np.testing.assert_array_equal(np.sort(rows), np.arange(1797))
    assert batches.shape == (2, 30, 16)
    assert batches.max() < parts[0].labels.shape[1]
    epoch = parts[0].labels.shape[1] // 16  # batches
    first = batches[0, : min(epoch, 30)].ravel()
    assert len(set(first)) == len(first)
    assert (batches[0] != batches[1]).any()


@pytest.mark.parametrize("norms", [Norms("none"), Norms("batch"), Norms("batch", recurrent=False), Norms("layer")])
def test_what_pads_changes_nothing(norms):
    rng = np.random.default_rng(0)
    x, lengths = rng.standard_normal((6, 3, 2)).astype(np.float32), jnp.array([1, 2, 3, 3, 2, 3])
    model = Reader(norms, 4, 2, train=True)
    variables = model.init(jax.random.key(0), x, lengths)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(variables.get("batch_stats", {}))} <= {3}  # one for each step
    other = np.where(np.arange(3)[:, None] < np.asarray(lengths)[:, None, None], x, 9).astype(np.float32)
    apply = jax.jit(lambda x: model.apply(variables, x, lengths, mutable=["batch_stats"]))
    jax.tree.map(np.testing.assert_array_equal, apply(other), apply(x))


def test_without_a_norm_it_is_flax_s_lstm():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 2)).astype(np.float32)
    theirs = nn.RNN(nn.OptimizedLSTMCell(4))
    known = theirs.init(jax.random.key(0), x)["params"]["cell"]
    order = "fiog"
    cell = {
        "input": {"kernel": jnp.concatenate([known[f"i{gate}"]["kernel"] for gate in order], 1)},
        "recurrent": {"kernel": jnp.concatenate([known[f"h{gate}"]["kernel"] for gate in order], 1)},
        "bias": jnp.stack([known[f"h{gate}"]["bias"] - (gate == "f") for gate in order]),
    }
    model = Reader(Norms("none"), 4, 2)
    lengths = jnp.array([3, 3, 1, 3, 2])
    params = model.init(jax.random.key(0), x, lengths)["params"]
    (name,) = params.keys() - {"Dense_0"}
    params = params | {name: cell, "Dense_0": {"kernel": jnp.eye(4)[:, :2], "bias": jnp.zeros(2)}}
    h = theirs.apply({"params": {"cell": known}}, x)[jnp.arange(5), lengths - 1]
    np.testing.assert_allclose(model.apply({"params": params}, x, lengths), h[:, :2], rtol=0, atol=1e-5)


def test_late_steps_take_the_statistics_of_the_last_that_enough_rows_have():
    stats = {"mean": jnp.arange(6.0)[:, None]}
    lengths = jnp.array([2] * 40 + [4] * 57 + [6] * 3)
    reused = reuse_last(stats, lengths)
    np.testing.assert_array_equal(reused["mean"].ravel(), [0, 1, 2, 3, 3, 3])
    assert reuse_last({}, lengths) == {}


def test_steps_are_counted_to_the_first_look_that_reaches_the_level():
    curve = np.array([[0.1, 0.9, 0.1], [0.8, 0.1, 0.2], [0.9, 0.1, 0.3]])
    assert steps_to(0.8, curve, 10) == [20, 10, None]


def test_gradients_through_time_are_those_of_each_hidden_state():
    rng = np.random.default_rng(0)
    rows = Sequences(rng.standard_normal((6, 4, 2)).astype(np.float32), np.full(6, 4), rng.integers(0, 2, 6))
    model = Reader(Norms("batch"), 3, 2, train=True)
    params, stats = begin(model, 0, 0.5, rows)
    assert {
        float(leaf) for name in ("input", "recurrent", "cell") for leaf in params["ScanCell_0"][f"norm_{name}"]["scale"]
    } == {0.5}
    of_push = partial(loss, model, params, stats=stats, rows=rows)
    found = 10 ** norms_of(jax.grad(of_push, has_aux=True)(no_push(rows, 3))[0])
    value = jax.jit(of_push)
    for t in range(4):
        square = 0.0
        for place in np.ndindex(6, 3):
            push = np.zeros((4, 6, 3), np.float32)
            push[t, *place] = 0.01
            square += ((float(value(push)[0]) - float(value(-push)[0])) / 0.02) ** 2
        np.testing.assert_allclose(float(found[t]), square**0.5, rtol=0.01)


def test_training_is_told_of_every_rate_and_seed():
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 2, 80), 0.1 * rng.standard_normal((80, 3, 2))
    data = Sequences((labels[:, None, None] + noise).astype(np.float32), labels * 0 + 3, labels)
    effort, looks = Effort(2, 20, 4, 16, 10, (1e-7, 0.1)), []
    found = train(Reader(Norms("batch"), 4, 2), effort, split(data, effort), 0.1, lambda: looks.append(0))
    assert found.validation.shape == found.test.shape == (2, 2, 2)
    assert found.pooled.shape == (2, 2)
    assert len(looks) == 2
    at_first, at_last = found.gradients
    assert at_first.shape == (2, 2, 3)
    np.testing.assert_array_equal(at_first[0], at_first[1])  # nothing has moved
    np.testing.assert_array_equal(found.test[0, 0], found.test[1, 0])  # nor does it at this rate
    assert (at_last[1] != at_first[1]).all()
    assert (at_first[0, 0] != at_first[0, 1]).all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("saturates", [False, True])
def test_the_gradient_of_a_tanh_network_is_the_product_of_its_steps(apart, saturates):
    rng = np.random.default_rng(0)
    rows = Sequences(rng.standard_normal((5, 3, 2)).astype(np.float32), np.full(5, 3), rng.integers(0, 2, 5))
    network = Tanh("batch", apart, identity=True, saturates=saturates, features=3)
    found = 10 ** np.asarray(network.gradients(jnp.int32(4), jnp.float32(0.7), rows, 2))
    keys, orthogonal = jax.random.split(jax.random.key(4), 4), nn.initializers.orthogonal()
    h = 0.1 * np.asarray(jax.random.normal(keys[3], (5, 3)), float)
    of_input, last = np.asarray(orthogonal(keys[1], (2, 3)), float), np.asarray(orthogonal(keys[2], (3, 2)), float)

    def norm(z):
        return 0.7 * (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)

    kept = []
    for t in range(3):
        moving, given = h, rows.x[:, t].astype(float) @ of_input
        through = moving if apart else moving + given
        z = norm(moving) + norm(given) if apart else norm(through)
        kept.append((through, 1 - np.tanh(z) ** 2 if saturates else np.ones_like(z)))
        h = np.tanh(z)
    logits = h @ last
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = (shares - np.eye(2)[rows.labels]) / 5 @ last.T
    for t in reversed(range(3)):
        np.testing.assert_allclose(found[t], np.linalg.norm(g), rtol=1e-3)
        through, slope = kept[t]
        g, deviation = g * slope, np.sqrt(through.var(0) + 1e-5)
        normal = (through - through.mean(0)) / deviation
        g = 0.7 * (g - g.mean(0) - normal * (g * normal).mean(0)) / deviation


def test_pooled_statistics_are_those_of_all_steps():
    x = np.random.default_rng(0).standard_normal((40, 3, 2)) * [[[1.0], [2.0], [3.0]]] + [[[0.0], [5.0], [1.0]]]
    stats = {"cell": {"norm": {"mean": jnp.asarray(x.mean(0)), "var": jnp.asarray(x.var(0))}}}
    found = pool(stats)["cell"]["norm"]
    rows = x.reshape(-1, 2)
    np.testing.assert_allclose(found["mean"], np.broadcast_to(rows.mean(0), (3, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["var"], np.broadcast_to(rows.var(0), (3, 2)), rtol=1e-5)
    assert pool({}) == {}
