"""Modules whose momentum is a function of the number of updates: one variable more, and everything else as ever."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from tests.support.oracle import tolerance

X = (np.random.default_rng(0).standard_normal((6, 16, 3)) * [1, 2, 3] + [4, 5, 6]).astype(np.float32)
F = jbn.debiased(0.9)


def expected(momentum=F, batches=X):
    state = jbn.bn_init(3, counted=True)[1]
    for x in batches:
        _, state = jbn.bn_forward(None, state, x, True, momentum=momentum)
    return state._asdict()


def same(got, want):
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        found = got[name].value if isinstance(got[name], nnx.Variable) else got[name]
        np.testing.assert_allclose(found, value, rtol=tolerance(np.float32, X.shape[1]), err_msg=name)
        assert found.dtype == value.dtype


class Net(nn.Module):
    momentum: object = F
    kind: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = self.kind(not train, momentum=self.momentum, name="bn")(x)
        return nn.Dense(2, name="dense")(x)


def make(momentum=F, kind=jbn.nnx.BatchNorm):
    return nnx.Sequential(kind(3, momentum=momentum, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))


def stats(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["layers"][0]


@pytest.mark.parametrize("momentum", [F, jbn.cumulative])
def test_linen_counts(momentum):
    net, traces = Net(momentum), []
    variables = net.init(jax.random.key(0), X[0])
    same(variables["batch_stats"]["bn"], expected(batches=()))

    @jax.jit
    def step(variables, x):
        traces.append(x)
        return variables | net.apply(variables, x, mutable=["batch_stats"])[1]

    for x in X:
        variables = step(variables, x)
    same(variables["batch_stats"]["bn"], expected(momentum))
    assert len(traces) == 1
    net.apply(variables, X[0], train=False)
    # A number counts on, and a model without a count evaluates.
    _, new = Net(0.9).apply(variables, X[0], mutable=["batch_stats"])
    assert int(new["batch_stats"]["bn"]["count"]) == len(X) + 1
    plain = Net(0.9).init(jax.random.key(0), X[0])
    assert sorted(plain["batch_stats"]["bn"]) == ["mean", "var"]
    net.apply(plain, X[0], train=False)


def test_linen_does_not_begin_to_count_in_the_midst_of_training():
    plain = Net(0.9).init(jax.random.key(0), X[0])
    with pytest.raises(ValueError, match=r"batch_stats holds no count of them for bn\. .*\['count'\] = jnp\.zeros"):
        Net().apply(plain, X[0], mutable=["batch_stats"])
    plain["batch_stats"]["bn"]["count"] = jnp.zeros((), jnp.int32)
    _, new = Net().apply(plain, X[0], mutable=["batch_stats"])
    same(new["batch_stats"]["bn"], expected(batches=X[:1]))


class Copied(nn.BatchNorm):
    """A copy of Flax's norm."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(x, use_running_average, mask=mask)


@pytest.mark.parametrize("kind", [nn.BatchNorm, Copied, jbn.linen.BatchNorm])
def test_linen_replace(kind):
    net = Net(0.9, kind)
    with jbn.linen.replace(also=Copied, momentum=F) as replaced:
        variables = net.init(jax.random.key(0), X[0])
        for x in X:
            variables |= net.apply(variables, x, mutable=["batch_stats"])[1]
    same(variables["batch_stats"]["bn"], expected())
    assert replaced.paths == ("bn",)


def test_linen_layers_that_are_stacked():
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return layer(x), None

            over = {"params": 0, "batch_stats": 0}
            scanned = nn.scan(body, variable_axes=over, split_rngs={"params": True}, length=2)
            return scanned(jbn.linen.BatchNorm(False, momentum=F, name="bn"), x, None)[0]

    variables = Stacked().init(jax.random.key(0), X[0])
    _, new = Stacked().apply(variables, X[0], mutable=["batch_stats"])
    assert new["batch_stats"]["bn"]["count"].tolist() == [1, 1]
    same(jax.tree.map(lambda leaf: leaf[0], new["batch_stats"]["bn"]), expected(batches=X[:1]))


@pytest.mark.parametrize("momentum", [F, jbn.cumulative])
def test_nnx_counts(momentum):
    model, traces = make(momentum), []
    same(stats(model), expected(batches=()))

    @nnx.jit
    def step(model, x):
        traces.append(x)
        return model(x)

    for x in X:
        step(model, x)
    same(stats(model), expected(momentum))
    assert len(traces) == 1
    again = nnx.merge(*nnx.split(model))
    again.eval()
    again(X[0])
    assert int(stats(again)["count"]) == len(X)
    model.set_attributes(momentum=0.9)
    model(X[0])
    assert int(stats(model)["count"]) == len(X) + 1
    assert sorted(stats(make(0.9))) == ["mean", "var"]


@pytest.mark.parametrize("kind", [nnx.BatchNorm, jbn.nnx.BatchNorm])
def test_nnx_replace_adds_a_count_where_there_is_none(kind):
    model = make(0.9, kind)
    jbn.nnx.replace(model, momentum=F)
    for x in X[:3]:
        model(x)
    jbn.nnx.replace(model, momentum=F, epsilon=1e-5)  # it counts on
    for x in X[3:]:
        model(x)
    same(stats(model), expected())
    late = make(0.9)
    late.set_attributes(momentum=F)
    with pytest.raises(ValueError, match=r"the state has no count.*jbn\.nnx\.replace"):
        late(X[0])


@pytest.mark.parametrize("replaced", [False, True])
def test_nnx_layers_that_are_stacked(replaced):
    @nnx.vmap(in_axes=0, out_axes=0)
    def many(key):
        return (nnx if replaced else jbn.nnx).BatchNorm(3, momentum=0.9 if replaced else F, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    layers = many(jax.random.split(jax.random.key(0), 2))
    if replaced:
        jbn.nnx.replace(layers, momentum=F)
    forward(X[0], layers)
    assert layers.count[...].tolist() == [1, 1]
    same({name: getattr(layers, name)[...][0] for name in ("mean", "var", "count")}, expected(batches=X[:1]))


@pytest.mark.parametrize("door", ["linen", "nnx"])
def test_tools_take_a_count_for_no_statistic_and_keep_it(door):
    if door == "linen":
        net = Net()
        variables = net.init(jax.random.key(0), X[0]) | net.apply(
            net.init(jax.random.key(0), X[0]), X[0], mutable=["batch_stats"]
        )[1]  # fmt: skip
        params, state = variables["params"], variables["batch_stats"]
        diagnosis = jbn.linen.diagnose(net, variables, X[0], train=True)
        exact = jbn.linen.recalibrate(net, variables, list(X), train=True)["batch_stats"]["bn"]
        with jbn.linen.freeze("bn") as frozen:
            kept = net.apply(variables, X[0], mutable=["batch_stats"])[1]["batch_stats"]["bn"]
        assert frozen.paths == ("bn",)
        _, folded, folds = jbn.linen.fold(net, variables, X[0], train=False)
        assert not folded["batch_stats"]
    else:
        model = make()
        model(X[0])
        params, state = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        diagnosis = jbn.nnx.diagnose(model, X[0])
        exact = stats(jbn.nnx.recalibrate(nnx.clone(model), list(X)))
        frozen, _ = jbn.nnx.freeze(nnx.clone(model))
        frozen(X[0])
        kept = stats(frozen)
        folded, folds = jbn.nnx.fold(model, X[0])
        assert not nnx.state(folded, nnx.BatchStat)
    assert len(diagnosis.layers) == len(folds.pairs) == 1
    count, rows = exact.pop("count"), X.reshape(-1, 3)
    same(exact, {"mean": rows.mean(0), "var": rows.var(0)})
    assert int(count) == int(kept["count"]) == 1
    assert sorted(jax.tree.leaves(jbn.norm_mask(params, state))) == [False, False, True, True]
    jax.tree.map(
        np.testing.assert_array_equal, jbn.keep_statistics(state, state, "*bn" if door == "linen" else "*"), state
    )
    pooled = jbn.merge_states([state, state], [1, 3])
    assert sorted(np.size(leaf) for leaf in jax.tree.leaves(pooled)) == [1, 3, 3]
    assert 2 in [leaf.item() for leaf in jax.tree.leaves(pooled) if leaf.size == 1]


def test_a_prior_is_not_told_by_a_function():
    with pytest.raises(TypeError, match=r"momentum is the function .*expected a number, or neither"):
        jbn.nnx.diagnose(make(), X[0], momentum=F, updates=3)
