"""The NNX module beside Flax's: the same variables and switches; one value per channel; ``replace``."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
from jbn.nnx import BatchNorm, replace
from jbn.nnx.editing import OPTIONS
from tests.support import oracle

MINE, THEIRS = BatchNorm, nnx.BatchNorm
X = jax.random.normal(jax.random.key(0), (32, 4)) * 2 + 1
HAS_METADATA = "scale_metadata" in inspect.signature(THEIRS.__init__).parameters


def make(norm=MINE, features=4, **options):
    return norm(features, rngs=nnx.Rngs(3), **options)


def close(a, b, size=1.0):
    bound = oracle.tolerance("float32", len(X), 4 * size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), a, b)


def test_the_constructor_is_flax_s_with_new_arguments_last():
    mine, theirs = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (MINE, THEIRS))
    assert mine[: len(theirs)] == theirs
    new = "activation group_size unbiased normalize_by sow_moments"
    assert " ".join(p.name for p in mine[len(theirs) :]) == new


def test_the_call_is_flax_s_with_new_arguments_last():
    mine, theirs = (list(inspect.signature(cls.__call__).parameters.values()) for cls in (MINE, THEIRS))
    assert [(p.name, p.kind, p.default) for p in mine[:4]] == [(p.name, p.kind, p.default) for p in theirs]
    assert [p.name for p in mine[4:]] == ["residual", "scale", "bias"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.float16, "axis": 0, "momentum": 0.5, "use_fast_variance": False},
        {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.uniform()},
        pytest.param(
            {"scale_metadata": {"a": 1}, "bias_metadata": {"b": 2}},
            marks=pytest.mark.skipif(not HAS_METADATA, reason="this Flax has no metadata arguments"),
        ),
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_variables_and_attributes_are_flax_s(options):
    mine, theirs = (make(cls, **options) for cls in (MINE, THEIRS))
    (flat, structure), (want, wanted) = (jax.tree.flatten(nnx.state(layer)) for layer in (mine, theirs))
    assert structure == wanted  # paths, types of variables, metadata
    for a, b in zip(flat, want, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert {type(mine.scale), type(mine.bias)} <= {nnx.Param, type(None)}
    assert {type(mine.mean), type(mine.var)} == {nnx.BatchStat}
    assert (mine.scale is None) == (options.get("use_scale") is False)
    plain = {name for name, value in vars(theirs).items() if not isinstance(value, nnx.Variable)}
    plain = {name for name in plain if not name.startswith("_")}
    assert {name: getattr(mine, name) for name in plain} == {name: getattr(theirs, name) for name in plain}


def test_a_state_of_flax_s_layer_goes_on_unchanged():
    theirs, mine = make(THEIRS, use_fast_variance=False), make(MINE)
    theirs(X + 3)
    nnx.update(mine, nnx.state(theirs))
    close(mine(X), theirs(X), size=3)
    close(mine.mean[...], theirs.mean[...], size=3)
    nnx.update(theirs, nnx.state(mine))
    np.testing.assert_array_equal(theirs.var[...], mine.var[...])


def evaluates(layer):
    """Whether a call leaves the statistics alone and uses them."""
    before = layer.mean[...], layer.var[...]
    y = layer(X)
    kept = all(np.array_equal(a, b) for a, b in zip(before, (layer.mean[...], layer.var[...]), strict=True))
    assert np.array_equal(y, make(use_running_average=True)(X)) == kept  # mean 0, variance 1
    return kept


def test_who_decides_between_training_and_evaluation():
    layer = make()
    layer.eval()
    assert evaluates(layer)
    layer.set_attributes(nnx.BatchNorm, use_running_average=False)  # found by Flax's type
    layer(X, use_running_average=True)
    assert not layer.mean[...].any()
    layer.eval()
    layer(X, use_running_average=False)
    assert layer.mean[...].all()
    layer = make(use_running_average=True)
    layer.train()
    assert not evaluates(layer)
    assert not evaluates(make())  # Flax's default


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
def test_view():
    layer = make()
    view = nnx.view(layer, use_running_average=True)
    assert evaluates(view)
    assert isinstance(view, MINE)
    layer(X)
    np.testing.assert_array_equal(view.mean[...], layer.mean[...])


@pytest.mark.parametrize("flag", [None, 1, "train"])
def test_a_flag_that_is_neither_true_nor_false(flag):
    with pytest.raises(TypeError, match=r"use_running_average is .* expected True or False"):
        make(use_running_average=flag)(X)


@pytest.mark.parametrize("train", [True, False])
def test_everything_reaches_bn_forward(train):
    options = {"epsilon": 1e-2, "momentum": 0.3, "activation": nnx.relu, "group_size": 4, "dtype": jnp.bfloat16}
    layer, mask = make(**options), (np.arange(32) % 3 > 0)[:, None]
    layer(X + 0.1)
    state = jbn.State(layer.mean[...], layer.var[...])
    y = layer(X, use_running_average=not train, mask=mask, residual=X)
    want, state = jbn.bn_forward(jbn.bn_init(4)[0], state, X, train, mask=mask, residual=X, **options)
    np.testing.assert_array_equal(y, want, strict=True)
    np.testing.assert_array_equal(layer.mean[...], state.mean)
    np.testing.assert_array_equal(layer.var[...], state.var)


def test_names_and_groups_of_axes_reach_bn_forward():
    options = {"axis_name": "batch", "axis_index_groups": [[0, 1], [2, 3]]}
    x, axes = X.reshape(4, 8, 4), nnx.StateAxes({...: None})

    def function(x):
        return jbn.bn_forward(*jbn.bn_init(4), x, True, **options)[0]

    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="batch")(make(**options), x)
    np.testing.assert_array_equal(y, jax.vmap(function, axis_name="batch")(x))


@pytest.mark.parametrize("number", ["momentum", "epsilon"])
def test_numbers_are_checked_where_they_are_written(number):
    with pytest.raises(ValueError, match=f"{number} is -1"):
        BatchNorm(4, **{number: -1}, rngs=nnx.Rngs(0))


def test_a_mask_of_lower_rank_is_refused():
    for shape in [(4,), (8,), (8, 4), (4, 1)]:
        with pytest.raises(ValueError, match=r"mask has shape .* x has shape \(8, 4, 4\); expected the same rank"):
            make()(X.reshape(8, 4, 4), mask=np.ones(shape))


def test_a_mask_may_be_of_any_dtype_that_flax_linen_takes():
    x = X.reshape(8, 4, 4)
    for mask in [np.array([1, 1, 0, 1])[None, :, None], np.ones((8, 4, 1)), [[[True]], [[False]]] * 4]:
        mine, theirs = make(), make(THEIRS, use_fast_variance=False)
        valid = np.broadcast_to(np.asarray(mask, bool), x.shape)
        with jax.numpy_rank_promotion("allow"):
            y, z = mine(x, mask=mask), theirs(x, mask=jnp.asarray(mask, bool))
        close(np.where(valid, y, 0), np.where(valid, z, 0), size=3)
        close(mine.var[...], theirs.var[...], size=8)


def test_an_activation_may_be_a_module_with_parameters():
    layer = make(activation=nnx.PReLU(0.3))
    plain = make()(X)
    np.testing.assert_allclose(layer(X), jnp.where(plain > 0, plain, 0.3 * plain), atol=1e-6)
    grads = nnx.grad(lambda layer: layer(X).sum())(layer)
    np.testing.assert_allclose(
        grads["activation"]["negative_slope"][...], jnp.where(plain > 0, 0, plain).sum(), rtol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"activation": nnx.relu}, {"group_size": 1}], ids=", ".join)
@pytest.mark.parametrize("jit", [False, True])
def test_one_value_per_channel_keeps_the_statistics_and_warns_where_python_runs(options, jit):
    x = X if "group_size" in options else X[:1]
    layer = make(bias_init=nnx.initializers.constant(0.5), **options)
    layer(X[:8], use_running_average=True)
    call = nnx.jit(lambda layer, x: layer(x)) if jit else lambda layer, x: layer(x)
    if jit:
        y = call(layer, x)
    else:
        with pytest.warns(UserWarning, match=r"one value per channel.*This BatchNorm of 4 features") as caught:
            y = call(layer, x)
        assert caught[0].filename == __file__
    np.testing.assert_array_equal(y, np.full(x.shape, 0.5))
    np.testing.assert_array_equal(layer.mean[...], np.zeros(4))
    np.testing.assert_array_equal(layer.var[...], np.ones(4))


MAPPED = {
    "jax.vmap": lambda layer, axes: jax.vmap(lambda x: layer(x[None]))(X),
    "of jit": lambda layer, axes: jax.vmap(jax.jit(lambda x: layer(x[None])))(X),
    "nnx.vmap": lambda layer, axes: nnx.vmap(lambda layer, x: layer(x[None]), in_axes=(axes, 0))(layer, X),
    "in jit": lambda layer, axes: nnx.jit(nnx.vmap(lambda m, x: m(x[None]), in_axes=(axes, 0)))(layer, X),
}
DIFFERENTIATED = (nnx.grad, nnx.value_and_grad, lambda f: nnx.jit(nnx.grad(f)), lambda f: nnx.grad(nnx.jit(f)))


@pytest.mark.parametrize("transform", MAPPED.values(), ids=MAPPED)
def test_one_value_per_channel_raises_where_examples_are_mapped(transform):
    """A model that is mapped over single examples would train a dead layer."""
    layer, axes = make(), nnx.StateAxes({...: None})
    with pytest.raises(ValueError, match=r"one value per channel.*no gradients of single examples.*GroupNorm"):
        transform(layer, axes)
    np.testing.assert_array_equal(layer.var[...], np.ones(4))


@pytest.mark.parametrize("grad", DIFFERENTIATED)
def test_one_value_per_channel_raises_where_it_is_differentiated(grad):
    with pytest.raises(ValueError, match="one value per channel"):
        grad(lambda layer: (layer(X[:1]) ** 2).sum())(make())


def test_one_value_per_channel_is_silent_where_nothing_is_computed():
    layer = make()
    y = nnx.eval_shape(lambda layer: layer(jnp.zeros((1, 4))), layer)
    assert y.shape == (1, 4)
    nnx.tabulate(layer, X[:1])
    jax.make_jaxpr(lambda x: layer(x))(X[:1])


def test_one_value_per_channel_warns_only_where_it_matters():
    make()(X[:1], use_running_average=True)
    make()(X[:2])
    layer = make(axis_name="batch")
    axes = nnx.StateAxes({...: None})
    nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="batch")(layer, X[:, None])
    assert layer.mean[...].all()


def test_other_errors_stay_errors():
    for options, x, kind, words in [
        ({"momentum": 1.5}, X[:1], ValueError, "momentum is 1.5"),
        ({"epsilon": 0.0}, X, ValueError, "epsilon is 0.0"),
        ({"axis_name": "data"}, X[:1], ValueError, "axis_name 'data' is not bound"),
        ({}, X[:, :3], ValueError, r"scale has shape \(4,\)"),
        ({}, X.astype(int), TypeError, "x has dtype int32"),
    ]:
        with pytest.raises(kind, match=words):
            make(**options)(x)


class Own(nnx.BatchNorm):
    """A norm of somebody else."""


class Block(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.bn = norm(4, use_fast_variance=False, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.dense(x)))


class Model(nnx.Module):
    def __init__(self, norm=THEIRS, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.layers = nnx.List([Block(norm, rngs) for _ in range(2)])
        self.named = nnx.Dict(last=norm(4, rngs=rngs, use_fast_variance=False))
        self.shared = self.layers[1].bn
        self.own = Own(4, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(self.own(self.named["last"](self.shared(x))))


KINDS = ["nothing", "function", "module"]
PATHS = {"layers/0/bn", "layers/1/bn", "named/last"}


def test_replace_finds_every_norm_once():
    model = Model()
    before = dict(nnx.iter_graph(model))
    same, (paths, skipped) = replace(model, momentum=0.5, activation=nnx.relu, use_running_average=True)
    assert same is model
    assert set(paths) == PATHS
    assert len(paths) == 3
    assert skipped == ("own",)
    for norm in (model.layers[0].bn, model.layers[1].bn, model.named["last"]):
        assert type(norm) is MINE
        assert (norm.momentum, norm.activation, norm.use_running_average) == (0.5, nnx.relu, True)
        assert (norm.epsilon, norm.group_size, norm.num_features) == (1e-5, None, 4)
    assert type(model.own) is Own
    assert model.own.momentum == 0.99
    assert model.shared is model.layers[1].bn
    after = dict(nnx.iter_graph(model))
    variables = {path: value for path, value in before.items() if isinstance(value, nnx.Variable)}
    assert all(after[path] is value for path, value in variables.items())
    assert len(variables) == 2 * 6 + 4 + 4 + 2


def test_replace_again_sets_options_and_nothing_else():
    model, first = replace(Model(), activation=nnx.relu)
    state = jax.tree.leaves(nnx.state(model))
    model, second = replace(model, axis_name="data")
    assert first == second
    norm = model.layers[0].bn
    assert (norm.activation, norm.axis_name, norm.momentum) == (nnx.relu, "data", 0.99)
    assert all(a is b for a, b in zip(state, jax.tree.leaves(nnx.state(model)), strict=True))


@pytest.mark.parametrize("before", [None, nnx.relu, nnx.PReLU(0.5)], ids=KINDS)
@pytest.mark.parametrize("after", [None, nnx.relu, nnx.PReLU(0.5)], ids=KINDS)
def test_an_option_may_change_between_function_and_module(before, after):
    layer, _ = replace(make(THEIRS), activation=before)
    replace(layer, activation=after)
    want = make(activation=after)
    assert jax.tree.structure(nnx.state(layer)) == jax.tree.structure(nnx.state(want))
    np.testing.assert_array_equal(nnx.jit(lambda layer: layer(X))(layer), nnx.jit(lambda layer: layer(X))(want))


@pytest.mark.parametrize("container", [lambda m: m, lambda m: [m], lambda m: (m, m), lambda m: {"a": {"b": m}}])
def test_replace_takes_a_norm_or_a_container(container):
    layer = make(THEIRS)
    model = container(layer)
    same, replaced = replace(model)
    assert same is model
    assert type(layer) is MINE
    assert replaced.paths in [("",), ("0",), ("a/b",)]


def test_different_places_may_have_one_name():
    norms = [make(THEIRS) for _ in range(2)]
    assert replace({"a/b": norms[0], "a": {"b": norms[1]}})[1].paths == ("a/b", "a/b")
    assert {type(norm) for norm in norms} == {MINE}


def test_a_model_of_an_outer_trace_is_left_as_it_was():
    layer = make(THEIRS)
    with pytest.raises(Exception, match="different trace level"):
        jax.jit(lambda: replace(layer)[1])()
    assert type(layer) is THEIRS


def test_replace_keeps_subclasses_of_ours_and_sets_their_options():
    class Mine(BatchNorm):
        pass

    layer, replaced = replace(make(Mine), epsilon=1e-3)
    assert type(layer) is Mine
    assert layer.epsilon == 1e-3
    assert [*replaced] == [("",), ()]


def test_replace_warns_where_there_is_nothing():
    with pytest.warns(UserWarning, match=r"of type Linear and holds no flax.nnx.BatchNorm\.") as caught:
        assert [*replace(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))[1]] == [(), ()]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"norms of other classes, which keep their own code, are inner/own"):
        replace({"inner": {"own": Own(4, rngs=nnx.Rngs(0))}})


def test_replace_refuses_unknown_names_before_it_changes_anything():
    layer = make(THEIRS)
    with pytest.raises(TypeError, match=r"replace\(\) got eps, num_features; expected overrides named .*momentum"):
        replace(layer, momentum=0.5, eps=1e-3, num_features=3)
    assert type(layer) is THEIRS
    assert layer.momentum == 0.99
    assert set(OPTIONS) <= set(vars(make()))


def trained(model, optimizer, steps):
    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: ((model(x) - x.sum(1, keepdims=True)) ** 2).mean())(model)
        optimizer.update(model, grads)

    for i in range(steps):
        step(model, optimizer, jnp.roll(X, i, 1))
    return nnx.state(model)


def test_an_optimizer_made_before_works_after():
    theirs, mine = Model(), Model()
    ours, peers = (nnx.Optimizer(m, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param) for m in (mine, theirs))
    trained(mine, ours, 3)
    replace(mine)
    got = trained(mine, ours, 3)
    trained(theirs, peers, 3)
    want = trained(theirs, peers, 3)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    steps_and_layers = 6 * 4
    close(got, want, size * steps_and_layers)
    assert int(ours.step[...]) == 6


def test_a_function_compiled_before_sees_the_replacement():
    model = Model()
    call = nnx.jit(lambda model, x: model(x))
    first = call(model, X)
    nnx.update(model, nnx.state(Model()))
    replace(model, epsilon=10.0)
    assert np.abs(call(model, X) - first).max() > 0.01


def test_replace_says_nothing_where_it_found_something():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(Model())
