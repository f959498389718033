"""Four ways to freeze, as a function and in NNX; statistics and masks of parameters by paths."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.test_util import check_grads

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.nnx
from jbn.freezing import decay_mask, keep_statistics, trainable_mask
from jbn.paths import match
from tests.support import oracle
from tests.support.cases import CASES, Case, by_function, call_options, data, nnx_layer


class Way(NamedTuple):
    train: bool  # normalized by the batch
    update: bool  # running statistics move
    affine: bool  # scale and bias are constants

    @property
    def options(self):
        return {"use_running_average": not self.train, "update": self.update, "affine": self.affine}


WAYS = {
    "statistics": Way(False, False, False),
    "everything": Way(False, False, True),
    "statistics used and moving": Way(False, True, False),
    "batch statistics not remembered": Way(True, False, False),
}


def function(case, d, way):
    if way.affine:
        d = d._replace(scale=jax.lax.stop_gradient(d.scale), bias=jax.lax.stop_gradient(d.bias))
    return by_function(case, d, way.train, update=way.update)


def module(case, d, way):
    layer = nnx_layer(jbn.nnx.BatchNorm, case, d, False, activation=case.activation, unbiased=case.unbiased)
    same, paths = jbn.nnx.freeze(layer, **way.options)
    assert same is layer
    assert paths == ("",)
    layer.train()
    return layer(d.x, **call_options(case, d)), {"mean": layer.mean[...], "var": layer.var[...]}


ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
doors = pytest.mark.parametrize("door", [function, module])
over = pytest.mark.parametrize("case", [case for case in CASES if case.affine is None][::6], ids=str)


def options_of(case, d, way):
    return {"axis": case.axis, "epsilon": case.epsilon, "mask": d.mask, "activation": case.activation,
            "residual": d.residual, "stats": None if way.train else (d.mean, d.var)}  # fmt: skip


@ways
@doors
@over
def test_output_and_state(case, door, way):
    d = data(case)
    want = oracle.forward(d.x, d.scale, d.bias, **options_of(case, d, way))
    y, state = door(case, d, way)
    size = np.abs(want.y).max()
    np.testing.assert_allclose(oracle.wide(y), want.y, rtol=0, atol=oracle.tolerance(case.dtype, case.rows, size))
    count, *batch = oracle.moments(d.x, axis=case.axis, mask=d.mask)
    if case.unbiased:
        batch[1] = batch[1] * count / np.maximum(count - 1, 1)
    for old, seen, new in zip((d.mean, d.var), batch, (state["mean"], state["var"]), strict=True):
        if way.update:
            moved = np.where(count > 1, old + (1 - case.momentum) * (seen - old), old)
            np.testing.assert_allclose(new, moved, rtol=0, atol=oracle.tolerance("float32", case.rows, 10))
            assert not np.array_equal(new, old)
        else:
            np.testing.assert_array_equal(new, old, strict=True)


@ways
@doors
@over
def test_gradients(case, door, way):
    d = data(case)
    g = np.random.default_rng(1).standard_normal(case.shape).astype(jnp.dtype(case.dtype))
    want = oracle.gradients(g, d.x, d.scale, d.bias, **options_of(case, d, way))
    names = [name for name in ("x", "scale", "bias", "residual") if getattr(d, name) is not None]

    def f(*values):
        return door(case, d._replace(**dict(zip(names, values, strict=True))), way)[0]

    _, pull = jax.vjp(f, *(getattr(d, name) for name in names))
    for name, got in zip(names, pull(g), strict=True):
        if way.affine and name in ("scale", "bias"):
            np.testing.assert_array_equal(got, np.zeros(case.features))
            continue
        dtype = case.dtype if name in ("x", "residual") else "float32"
        size = np.abs(want[name]).max() + np.abs(want["x"]).max()  # as in test_values.py
        np.testing.assert_allclose(
            oracle.wide(got), want[name], rtol=0, atol=oracle.tolerance(dtype, case.rows, 2 * size), err_msg=name
        )


@ways
@doors
@pytest.mark.usefixtures("x64")
def test_finite_differences(door, way):
    case = Case((6, 3), dtype="float64", activation=jax.nn.silu)
    d = jax.tree.map(oracle.wide, data(case))
    names = ("x",) if way.affine else ("x", "scale", "bias")

    def f(*values):
        return door(case, d._replace(**dict(zip(names, values, strict=True))), way)[0]

    check_grads(f, [getattr(d, name) for name in names], order=1, atol=1e-6, rtol=1e-6)


@ways
@over
def test_the_module_gives_the_bits_of_the_function(case, way):
    d = data(case)
    got, want = module(case, d, way), function(case, d, way)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


X = jax.random.normal(jax.random.key(0), (32, 4)) * 2 + 1


class Block(nnx.Module):
    def __init__(self, features, rngs, norm):
        self.dense = nnx.Linear(features, 8, rngs=rngs)
        self.bn = norm(8, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.dense(x)))


class Model(nnx.Module):
    """Three norms: stem/bn, blocks/0/bn, blocks/1/bn."""

    def __init__(self, norm=jbn.nnx.BatchNorm, features=4, outputs=3, seed=0):
        rngs = nnx.Rngs(seed)
        self.stem = Block(features, rngs, norm)
        self.blocks = nnx.List([Block(8, rngs, norm) for _ in range(2)])
        self.head = nnx.Linear(8, outputs, rngs=rngs)

    def __call__(self, x):
        for block in (self.stem, *self.blocks):
            x = block(x)
        return self.head(x)

    def norms(self):
        return {"stem/bn": self.stem.bn, "blocks/0/bn": self.blocks[0].bn, "blocks/1/bn": self.blocks[1].bn}


def moved(model, x=X):
    """Return the paths of the norms whose statistics a call moves."""
    before = {path: norm.mean[...] for path, norm in model.norms().items()}
    model(x)
    return {path for path, norm in model.norms().items() if not np.array_equal(before[path], norm.mean[...])}


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ("*", {"stem/bn", "blocks/0/bn", "blocks/1/bn"}),
        ("stem", {"stem/bn"}),
        ("blocks/*", {"blocks/0/bn", "blocks/1/bn"}),
        (["stem/bn", "**/1/bn"], {"stem/bn", "blocks/1/bn"}),
        ([], set()),
    ],
)
def test_only_norms_that_match_are_frozen(patterns, frozen):
    model, paths = jbn.nnx.freeze(Model(), patterns)
    assert set(paths) == frozen
    model.train()
    assert moved(model) == set(model.norms()) - frozen


@ways
def test_evaluation_stays_evaluation(way):
    model = Model()
    model(X)
    model.eval()
    want = model(X)
    jbn.nnx.freeze(model, **way.options)
    np.testing.assert_array_equal(model(X), want)
    assert not moved(model)
    model.train()
    assert moved(model) == (set(model.norms()) if way.update else set())
    bn = model.stem.bn
    np.testing.assert_array_equal(bn(X @ jnp.ones((4, 8)), use_running_average=True) == 0, False)
    assert not moved(nnx.view(model, use_running_average=True) if hasattr(nnx, "view") else model.eval() or model)


def test_what_is_frozen_can_train_again():
    never, again = Model(), Model()
    jbn.nnx.freeze(again, affine=True)
    jbn.nnx.freeze(again, use_running_average=False, update=True)
    np.testing.assert_array_equal(again(X), never(X))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(never))


def test_freezing_twice_adds_and_replaces():
    model = Model()
    jbn.nnx.freeze(model, update=True)
    jbn.nnx.freeze(model, "stem")
    assert moved(model) == {"blocks/0/bn", "blocks/1/bn"}


def test_a_copy_of_a_frozen_model_is_frozen_and_a_compiled_call_sees_it():
    model = Model()
    call = nnx.jit(lambda model, x: model(x))
    call(model, X)
    jbn.nnx.freeze(model, "stem")
    before = model.stem.bn.mean[...]
    call(model, X)
    np.testing.assert_array_equal(model.stem.bn.mean[...], before)
    for copy in (nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert moved(copy) == {"blocks/0/bn", "blocks/1/bn"}


@ways
@pytest.mark.parametrize("jit", [False, True])
def test_one_value_per_channel(way, jit):
    layer = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0), bias_init=nnx.initializers.constant(0.5))
    layer(X)
    layer.eval()
    evaluated, state = layer(X[:1]), jax.tree.map(jnp.copy, nnx.state(layer))
    layer.train()
    jbn.nnx.freeze(layer, **way.options)
    call = nnx.jit(lambda layer, x: layer(x)) if jit else lambda layer, x: layer(x)
    if way.train and not jit:
        with pytest.warns(UserWarning, match="one value per channel"):
            y = call(layer, X[:1])
    else:
        y = call(layer, X[:1])
    np.testing.assert_allclose(y, jnp.full((1, 4), 0.5) if way.train else evaluated, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), state)


def test_a_pattern_that_matches_nothing():
    model = Model()
    with pytest.raises(ValueError, match=r"'stm/\*' matches none of the 3 norms of the model.*'stem/bn'"):
        jbn.nnx.freeze(model, ["blocks", "stm/*"])
    assert moved(model) == set(model.norms())
    with pytest.raises(ValueError, match="none of the 0 norms of the model;"):
        jbn.nnx.freeze(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    tree = {f"layer_{i}": jbn.bn_init(2)[1] for i in range(7)}
    with pytest.raises(
        ValueError, match=r"'layer_8' matches none of the 14 paths \('layer_\d/.* and 10 more\); expected .* '/'\.$"
    ):
        keep_statistics(tree, tree, ["layer_1", "layer_8"])
    with pytest.raises(ValueError, match="'layer_' matches none of the 14 paths"):
        trainable_mask(tree, "layer_")
    with pytest.raises(ValueError, match="'!layer_' matches none of the 14 paths"):
        trainable_mask(tree, "!layer_")
    for patterns in (None, 3, [None]):
        with pytest.raises(TypeError, match=r"patterns is .*; expected a string or a sequence of strings"):
            jbn.nnx.freeze(model, patterns)


def test_norms_of_flax_and_other_flags_are_refused():
    model = Model(nnx.BatchNorm)
    with pytest.raises(ValueError, match=r"not jbn's .*'stem/bn'; expected .* jbn.nnx.replace\(model\) first"):
        jbn.nnx.freeze(model, "stem")
    jbn.nnx.freeze(jbn.nnx.replace(model)[0], "stem")
    assert moved(model) == {"blocks/0/bn", "blocks/1/bn"}
    for name in ("use_running_average", "update", "affine"):
        with pytest.raises(TypeError, match=f"{name} is 1 .*expected True or False"):
            jbn.nnx.freeze(model, **{name: 1})


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*", ["", "bn", "a/bn"], []),
        ("a", ["a", "a/bn", "a/b/bn"], ["", "ab/bn", "b/a"]),
        ("a/*", ["a/bn", "a/b/bn"], ["a", "ab/bn"]),
        ("a/**/bn", ["a/bn", "a/b/bn", "a/b/c/bn/mean"], ["a", "a/xbn", "b/a/bn"]),
        ("**/bn", ["bn", "a/b/bn"], ["xbn", "a/xbn"]),
        ("a/**", ["a", "a/bn", "a/b/bn"], ["", "ab", "b/a"]),
        ("a/**/**/bn/**", ["a/bn", "a/b/bn/mean", "a/b/c/bn"], ["a", "bn", "a/xbn"]),
        ("a/**/bn_*", ["a/bn_0", "a/b/bn_12/mean"], ["a/xbn_0", "a/bn"]),
        ("*/mean", ["bn/mean", "a/bn/mean"], ["mean", "a/bn/var"]),
        ("bn_[01]?", ["bn_0x", "bn_12/mean"], ["bn_0", "bn_21"]),
        ("A", ["A"], ["a"]),
        ("!a/bn", ["bn", "a/b"], ["a/bn", "a/bn/mean"]),
        (["a", "!a/bn", "!*/c"], ["a", "a/b"], ["b", "a/bn", "a/b/c"]),
        ("net/~/bn", ["net/~/bn", "net/~/bn/~/mean_ema"], ["net/bn"]),
    ],
)
def test_patterns(pattern, yes, no):
    for path in yes:
        assert match(path, pattern), path
    for path in no:
        assert not match(path, pattern), path


class Theirs(nn.Module):
    """A model of Flax's own norms."""

    @nn.compact
    def __call__(self, x):
        for name in ("backbone", "head"):
            x = nn.Dense(4, name=name)(nn.BatchNorm(False, name=f"{name}_bn")(x))
        return x


def statistics_of_linen():
    variables = Theirs().init(jax.random.key(0), X)
    return variables["batch_stats"], Theirs().apply(variables, X, mutable=["batch_stats"])[1]["batch_stats"]


def statistics_of_nnx():
    model = nnx.Dict(backbone=nnx.BatchNorm(4, rngs=nnx.Rngs(0)), head=nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    old = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    model.head(model.backbone(X))
    return old, nnx.state(model, nnx.BatchStat)


def statistics_of_haiku():
    hk = pytest.importorskip("haiku", reason="haiku is not installed")

    def network(x):
        for name in ("backbone", "head"):
            x = hk.BatchNorm(True, True, 0.9, name=name)(x, is_training=True)
        return x

    pair = hk.transform_with_state(network)
    params, state = pair.init(jax.random.key(0), X)
    return state, pair.apply(params, state, None, X + 1)[1]


def statistics_of_functions():
    old = {"backbone": [jbn.bn_init(4)[1]], "head": (jbn.bn_init(4)[1],)}
    return old, jax.tree.map(lambda value: value + 1, old)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "library", [statistics_of_linen, statistics_of_nnx, statistics_of_haiku, statistics_of_functions]
)
def test_statistics_stay_where_the_layer_matches_in_any_library(library, jit):
    old, new = library()
    keep = jax.jit(keep_statistics, static_argnums=2) if jit else keep_statistics
    chosen = keep(old, new, "backbone*")
    assert jax.tree.structure(chosen) == jax.tree.structure(old)
    triples = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (chosen, old, new)), strict=True)
    for (path, got), (_, before), (_, after) in triples:
        assert not np.array_equal(before, after)
        np.testing.assert_array_equal(got, before if "backbone" in jax.tree_util.keystr(path) else after)
    kept = keep_statistics(old, new)
    for (_, got), (_, before) in zip(*map(jax.tree_util.tree_leaves_with_path, (kept, old)), strict=True):
        np.testing.assert_array_equal(got, before)


def test_the_tree_is_that_of_the_old_statistics():
    old, new = statistics_of_functions()
    assert type(keep_statistics(FrozenDict(old), new, "head")) is FrozenDict
    with pytest.raises(ValueError, match=r"old and new differ: of 4 and 2 paths, only old has 'head/0/mean', 'head/0/"):
        keep_statistics(old, {"backbone": new["backbone"]})
    with pytest.raises(ValueError, match=r"only old has 'batch_stats/.*only new has 'backbone/0/mean'.*updates\["):
        keep_statistics({"batch_stats": old}, new)


def test_fine_tuning_keeps_the_statistics_of_the_digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    x = (images[:1024] / 16).astype(np.float32)
    model = Model(features=64, outputs=10)

    def trained(x, labels, steps):
        optimizer = nnx.Optimizer(model, optax.adamw(0.02, mask=decay_mask), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, labels):
            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        rows = np.arange(len(x)).reshape(-1, 128)
        return [float(step(model, optimizer, x[rows[i % 8]], labels[rows[i % 8]])) for i in range(steps)]

    trained(x, labels[:1024], 40)
    jbn.nnx.freeze(model)
    model.train()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    losses = trained(0.5 * x + 0.3, labels[:1024], 40)  # paler images: the statistics would move far
    first, *_, last = np.reshape(losses, (-1, 8)).mean(1)  # of epochs
    assert last < 0.8 * first  # 0.32 to 0.56 of it with ten other seeds of the model
    same = jax.tree.map(np.array_equal, before, nnx.state(model))
    assert all(jax.tree.leaves(nnx.filter_state(same, nnx.BatchStat)))
    assert not any(jax.tree.leaves(nnx.filter_state(same, nnx.Param)))


def test_the_name_of_before_warns():
    old, new = {"bn": jbn.bn_init(2)[1]}, {"bn": jbn.State(jnp.ones(2), jnp.ones(2))}
    with pytest.warns(DeprecationWarning, match=r"jbn.freeze is jbn.keep_statistics now"):
        kept = jbn.freeze(old, new)
    assert kept["bn"] is not new["bn"]
    np.testing.assert_array_equal(kept["bn"].mean, old["bn"].mean)
