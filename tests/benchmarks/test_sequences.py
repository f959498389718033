"""The sequences that LSTMs are trained on, the cell, and what the program says about what came out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich", reason="the tables are printed with rich")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from benchmarks import sequences

SETTINGS = sequences.Settings("digits", 2, 30, 4, 16, 10, (1e-3, 1e-2))


def test_seeds_have_splits_and_batches_of_their_own_and_no_row_twice():
    whole = sequences.digits()
    assert set(whole.lengths) == {5, 6, 7, 8}
    assert not whole.x[np.arange(8) >= whole.lengths[:, None]].any()
    numbered = sequences.Sequences(whole.x, whole.lengths, np.arange(len(whole.labels)))
    *parts, batches = sequences.split(numbered, SETTINGS)
    for seed in range(2):
        rows = np.concatenate([part.labels[seed] for part in parts])
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(whole.labels)))
    assert batches.shape == (2, 30, 16)
    assert batches.max() < parts[0].labels.shape[1]
    epoch = parts[0].labels.shape[1] // 16  # batches
    first = batches[0, : min(epoch, 30)].ravel()
    assert len(set(first)) == len(first)
    assert (batches[0] != batches[1]).any()


@pytest.mark.parametrize("arm", sequences.ARMS)
def test_what_pads_changes_nothing(arm):
    rng = np.random.default_rng(0)
    x, lengths = rng.standard_normal((6, 3, 2)).astype(np.float32), jnp.array([1, 2, 3, 3, 2, 3])
    model = sequences.Reader(arm, 4, 2, train=True)
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
    model = sequences.Reader("plain", 4, 2)
    lengths = jnp.array([3, 3, 1, 3, 2])
    params = model.init(jax.random.key(0), x, lengths)["params"]
    (name,) = params.keys() - {"Dense_0"}
    params = params | {name: cell, "Dense_0": {"kernel": jnp.eye(4)[:, :2], "bias": jnp.zeros(2)}}
    h = theirs.apply({"params": {"cell": known}}, x)[jnp.arange(5), lengths - 1]
    np.testing.assert_allclose(model.apply({"params": params}, x, lengths), h[:, :2], rtol=0, atol=1e-5)


def test_late_steps_take_the_statistics_of_the_last_that_enough_rows_have():
    stats = {"mean": jnp.arange(6.0)[:, None]}
    lengths = jnp.array([2] * 40 + [4] * 57 + [6] * 3)
    reused = sequences.reuse_last(stats, lengths)
    np.testing.assert_array_equal(reused["mean"].ravel(), [0, 1, 2, 3, 3, 3])
    assert sequences.reuse_last({}, lengths) == {}


def test_steps_are_counted_to_the_first_look_that_reaches_the_level():
    curve = np.array([[0.1, 0.9, 0.1], [0.8, 0.1, 0.2], [0.9, 0.1, 0.3]])
    assert sequences.steps_to(0.8, curve, 10) == [20, 10, None]


def test_an_arm_is_told_at_the_rate_that_is_best_on_validation_rows():
    def curves(best, test):
        valid = np.zeros((1, 2, 3))
        valid[0, best] = 0.9
        return {"valid": valid, "test": np.array(test)}

    found = {arm: curves(0, [[0.8, 0.8, 0.8], [1.0, 1.0, 1.0]]) for arm in sequences.ARMS}
    found[sequences.OURS] = curves(1, [[1.0, 1.0, 1.0], [0.7, 0.8, 0.6]])
    summary = sequences.summary(found, SETTINGS)
    assert {arm: row["rate"] for arm, row in summary["arms"].items()} == dict.fromkeys(sequences.ARMS, 1e-3) | {
        sequences.OURS: 1e-2
    }
    assert summary["arms"]["plain"]["steps"] == [10, 10, 10]
    low, mean, high = summary[f"{sequences.OURS} less"]["plain"]
    assert mean == pytest.approx(-0.1)
    assert "not told apart" in sequences.verdict("plain", [low, mean, high])
    assert "less accurate" in sequences.verdict("plain", [-0.2, -0.1, -0.05])
