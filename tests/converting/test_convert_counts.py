"""convert and the number of updates: where one is wanted it arrives, and training goes on with the same averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support.oracle import tolerance

M = 0.9
X = (np.random.default_rng(0).standard_normal((6, 16, 3)) * [1, 2, 3] + [4, 5, 6]).astype(np.float32)
LIKE = jbn.bn_init(3, counted=True)
TREE = (LIKE[0], jbn.CountedState(jnp.arange(3.0), jnp.arange(1.0, 4.0), jnp.int32(5)))
BOUND = tolerance(np.float32, X.shape[1], 10)


def go_on(state, momentum, **options):
    for x in X[3:]:
        _, state = jbn.bn_forward(None, state, x, True, momentum=momentum, **options)
    return state


def same(got, mean, var, count):
    assert int(got.count) == count
    np.testing.assert_allclose(got.mean, np.ravel(mean), rtol=0, atol=BOUND)
    np.testing.assert_allclose(got.var, np.ravel(var), rtol=0, atol=BOUND)


def test_pytorch():
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm1d(3, momentum=None)

    def train(norm, batches):
        for x in batches:
            norm(torch.from_numpy(x))

    train(norm, X[:3])
    options = jbn.convert_options(norm, "torch", "jbn")
    assert options["momentum"] is jbn.cumulative
    _, state = jbn.convert(norm, "torch", "jbn", like=LIKE)
    _, plain = jbn.convert(norm, "torch", "jbn")
    assert type(plain) is jbn.State  # nobody asked
    back = torch.nn.BatchNorm1d(3, **jbn.convert_options(options, "jbn", "torch"))
    back.load_state_dict(jbn.convert((LIKE[0], state), "jbn", "torch", like=back))
    state = go_on(state, options["momentum"], unbiased=options["unbiased"])
    for layer in (norm, back):
        train(layer, X[3:])
        same(state, layer.running_mean.numpy(), layer.running_var.numpy(), int(layer.num_batches_tracked))
    assert jbn.convert(TREE, "jbn", "torch")["num_batches_tracked"].dtype == np.int64


def test_a_layer_of_pytorch_without_running_statistics_is_batch_norm():
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm1d(3, track_running_stats=False).eval()
    torch.nn.init.normal_(norm.weight)
    params = jbn.convert(norm, "torch", "linen")["params"]
    want = norm(torch.from_numpy(X[0])).detach().numpy()
    np.testing.assert_allclose(jbn.batch_norm(X[0], **params)[0], want, rtol=0, atol=BOUND)
    with pytest.raises(ValueError, match=r"track_running_stats=False evaluates by .*jbn\.batch_norm"):
        jbn.convert_options(norm, "torch", "linen")


def test_haiku():
    hk = pytest.importorskip("haiku")
    norm = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, M, name="bn")(x, True))
    tree = norm.init(jax.random.key(0), X[0])

    def train(state, batches):
        for x in batches:
            _, state = norm.apply(tree[0], state, None, x)
        return state

    state = train(tree[1], X[:3])
    options = {"names": {"bn": ""}, "like": LIKE}
    _, ours = jbn.convert((tree[0], state), "haiku", "jbn", **options)
    state = train(state, X[3:])
    average = [state[f"bn/~/{name}_ema"]["average"] for name in ("mean", "var")]
    same(go_on(ours, jbn.debiased(M)), *average, 6)
    settled = jbn.convert((LIKE[0], ours), "jbn", "haiku", names={"": "bn"}, like=tree)[1]["bn/~/mean_ema"]
    assert settled["counter"] > 10**9  # its decay is in no array
    np.testing.assert_array_equal(settled["hidden"], settled["average"])


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox(mode):
    eqx = pytest.importorskip("equinox")
    model, start = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", momentum=M, mode=mode)

    def copy(state):  # of which each is good for one call
        return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))

    @jax.jit
    def step(state, x):
        return jax.vmap(lambda x: model(x, state), axis_name="batch", out_axes=(0, None))(x)[1]

    def ours(state):
        return jbn.convert((model, copy(state)), "equinox", "jbn", like=LIKE)[1]

    def theirs(state):
        return jbn.convert((LIKE[0], state), "jbn", "equinox", like=(model, copy(start)))[1]

    state = copy(start)
    for x in X[:3]:
        state = step(state, x)
    found = ours(state)
    assert int(found.count) == 3 if mode == "batch" else int(found.count) > 10**9
    again, went_on = theirs(found), go_on(found, jbn.debiased(M))
    for x in X[3:]:
        state, again = step(state, x), step(again, x)
    for each in map(ours, (state, again)):
        same(went_on, each.mean, each.var, int(found.count) + 3)
    untrained = ours(theirs(LIKE[1]))
    jax.tree.map(np.testing.assert_array_equal, untrained, LIKE[1])


@pytest.mark.parametrize("target", ["jbn", "linen", "nnx"])
def test_flax(target):
    """A count is there because the momentum is a function of it, so that it goes along."""
    there = jbn.convert(TREE, "jbn", target, names={"": "bn"})
    counts = [leaf for leaf in jax.tree.leaves(there) if leaf.dtype == np.int32]
    assert [int(count) for count in counts] == [5]
    back = jbn.convert(there, target, "jbn", names={"bn": ""}, like=LIKE)
    jax.tree.map(np.testing.assert_array_equal, back, TREE)
    plain = jbn.bn_init(3)
    with pytest.raises(ValueError, match="1 are left over: 'count' from 'bn'"):
        jbn.convert(there, target, "jbn", names={"bn": ""}, like=plain)
    left = jbn.convert(there, target, "jbn", names={"bn": "", "*/count": None}, like=plain)
    assert type(left[1]) is jbn.State


def test_keras_has_none():
    arrays = jbn.convert(TREE, "jbn", "keras", names={"": "bn"})
    assert sorted(arrays) == ["bn/beta", "bn/gamma", "bn/moving_mean", "bn/moving_variance"]
    with pytest.raises(ValueError, match="1 are lacking: 'count'"):
        jbn.convert(arrays, "keras", "jbn", names={"bn": ""}, like=LIKE)


def test_what_else_is_called_count_stays_what_it_is():
    rms = {"mean": np.ones(3, np.float32), "var": np.ones(3, np.float32), "count": np.float32([4])}  # of rows
    variables = {"params": {"a": {"count": np.ones(3, np.float32)}}, "batch_stats": {"rms": rms}}
    found = jbn.convert(variables, "linen", "nnx")
    assert found["a"]["count"].shape == (3,)
    assert found["rms"]["count"].dtype == np.float32


def test_members_of_an_ensemble_of_equinox_have_counts_of_their_own():
    eqx = pytest.importorskip("equinox")
    for features in (3, 5):  # as many as members, and not
        make = eqx.filter_vmap(lambda _: eqx.nn.make_with_state(eqx.nn.BatchNorm)(features, "batch", mode="batch"))  # noqa: B023
        model, state = make(jnp.arange(3))
        counted = [
            jnp.arange(1, 4, dtype=leaf.dtype) if leaf.ndim == 1 else jnp.full_like(leaf, 0.5)
            for leaf in jax.tree.leaves(state)
        ]
        state = jax.tree.unflatten(jax.tree.structure(state), counted)
        whole = jbn.convert((model, state), "equinox", "linen")
        weights = np.asarray(1 - model.momentum ** np.arange(1.0, 4.0))
        rounded = float(np.finfo(np.float32).eps / weights.min())  # of 1 - momentum^count in float32
        for name in ("mean", "var"):
            (found,) = (
                leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(whole["batch_stats"])
                if name in jax.tree_util.keystr(path)
            )
            np.testing.assert_allclose(found, np.tile(0.5 / weights[:, None], features), rtol=rounded)
