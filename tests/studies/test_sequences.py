"""The sequences that LSTMs are trained on, the cell, its gradient through time, and what is counted of its training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbn.studies.sequences import Effort, Norms, Reader, Sequences, reuse_last, split, steps_to, train


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


@pytest.mark.parametrize("norms", [Norms("none"), Norms("batch", 0.1), Norms("batch", recurrent=False), Norms("layer")])
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
    x, labels = rng.standard_normal((6, 4, 2)).astype(np.float32), rng.integers(0, 2, 6)
    rows = Sequences(x, np.full(6, 4), labels)
    model = Reader(Norms("batch"), 3, 2)
    variables = model.init(jax.random.key(0), rows.x, rows.lengths)
    found = model.gradients(variables["params"], variables["batch_stats"], rows)

    def loss(push):
        held = model.clone(train=True)
        logits, _ = held.apply(variables, x, rows.lengths, push, mutable=["batch_stats"])
        return float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())

    for t in range(4):
        square = 0.0
        for place in np.ndindex(6, 3):
            push = np.zeros((4, 6, 3), np.float32)
            push[t, *place] = 0.01
            square += ((loss(push) - loss(-push)) / 0.02) ** 2
        np.testing.assert_allclose(10 ** float(found[t]), square**0.5, rtol=0.01)


def test_training_lowers_what_is_lost_at_every_rate_and_keeps_seeds_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    data = Sequences(
        (labels[:, None, None] + 0.1 * rng.standard_normal((80, 3, 2))).astype(np.float32), labels * 0 + 3, labels
    )
    effort = Effort(2, 20, 4, 16, 10, (0.03, 0.1))
    reader, parts, looks = Reader(Norms("batch"), 4, 2), split(data, effort), []
    found = train(reader, effort, parts, advance=lambda: looks.append(0))
    assert found.validation.shape == found.test.shape == (2, 2, 2)
    assert len(looks) == 2
    for seed in range(2):
        rows = jax.tree.map(lambda leaf, seed=seed: leaf[seed], parts.training)

        def loss(learnt):
            params, stats = learnt
            logits = reader.apply({"params": params, "batch_stats": stats}, rows.x, rows.lengths)
            return float(optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels).mean())

        before = loss(jax.tree.map(lambda leaf, seed=seed: leaf[seed], found.begin))
        for rate in range(2):
            assert loss(jax.tree.map(lambda leaf, at=(rate, seed): leaf[at], found.end)) < before
    assert all((leaf[:, 0] != leaf[:, 1]).any() for leaf in jax.tree.leaves(found.end))
