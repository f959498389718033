"""``jbn.linen.freeze``, also around Flax's layers inside ``replace``: bit for bit what ``bn_forward`` does."""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from jbn.linen import freeze, replace
from tests.flax.test_linen_replace import MINE, ROWS, THEIRS, X, inside, models, nested, run, same

MODES = [(running, update, affine) for running in (True, False) for update in (True, False) for affine in (True, False)]


def stacked(norm):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            for name in ("first", "second"):
                x = norm(use_running_average=not train, momentum=0.5, name=name)(x)
            return x

    return Model()


def start(model):
    variables = model.init(jax.random.key(0), ROWS)
    return jax.tree.map(lambda v: v + jnp.linspace(0.1, 0.4, 4), variables)


def step(model, variables):
    def loss(params, x):
        y, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return (y**3).sum(), (y, new["batch_stats"])

    return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], ROWS)


def by_hand(variables, modes):
    """Do with ``bn_forward`` what ``step`` does, each layer in a mode of its own."""

    def loss(params, x):
        new = {}
        for name, (running, update, affine) in modes.items():
            values = jax.lax.stop_gradient(params[name]) if affine else params[name]
            old = variables["batch_stats"][name]
            x, new[name] = jbn.bn_forward(values, old, x, not running, update=update, momentum=0.5)
        return (x**3).sum(), (x, new)

    return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], ROWS)


TRAINING = (False, True, False)
SETTINGS = {
    "jbn's": (MINE, lambda *args, **options: [freeze(*args, **options)]),
    "Flax's": (THEIRS, lambda *args, **options: [replace(), freeze(*args, **options)]),
    "Flax's, frozen around": (THEIRS, lambda *args, **options: [freeze(*args, **options), replace()]),
}
settings = pytest.mark.parametrize(("norm", "contexts"), SETTINGS.values(), ids=SETTINGS)


@settings
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_frozen_layer_does_what_bn_forward_does(norm, contexts, mode):
    model = stacked(norm)
    variables = start(model)
    options = dict(zip(("use_running_average", "update", "affine"), mode, strict=True))
    got = inside(contexts("second", **options), step, model, variables)
    same(got, by_hand(variables, {"first": TRAINING, "second": mode}))
    same(step(stacked(MINE), variables), by_hand(variables, {"first": TRAINING, "second": TRAINING}))


@settings
def test_unless_told_otherwise_all_layers_normalize_by_running_statistics_that_stay(norm, contexts):
    model = stacked(norm)
    variables = start(model)
    grads, (_, stats) = inside(contexts(), step, model, variables)
    same(stats, variables["batch_stats"])
    assert all(leaf.all() for leaf in jax.tree.leaves(grads))
    y = inside(contexts(), model.apply, variables, ROWS)  # nothing moves, so nothing need be mutable
    same(y, stacked(MINE).apply(variables, ROWS, train=False))


@settings
@pytest.mark.parametrize("update", [True, False])
def test_evaluation_and_initialization_stay_what_they_are(norm, contexts, update):
    model = stacked(norm)
    variables, options = start(model), {"use_running_average": False, "update": update}

    def both(model):
        def evaluate(variables):
            y, new = model.apply(variables, ROWS, train=False, mutable=["batch_stats"])
            return (y**2).sum(), (y, new)

        return jax.grad(evaluate, has_aux=True)(variables), model.init_with_output(jax.random.key(0), ROWS)

    got = inside(contexts(**options), both, model)
    same(got, both(stacked(MINE)))
    assert np.abs(got[0][0]["params"]["first"]["scale"]).min() > 0
    constant = inside(contexts(**options, affine=True), both, model)  # constants wherever the layer is used
    assert not np.abs(constant[0][0]["params"]["first"]["scale"]).any()


def test_freeze_reports_what_matches():
    model = nested(MINE)
    with freeze(["jitted", "BatchNorm_*"]) as frozen:
        assert frozen == jbn.linen.Found((), ())
        model.apply(model.init(jax.random.key(0), X), X, mutable=["batch_stats"])
    assert set(frozen.paths) == {"BatchNorm_0", "jitted/first", "jitted/bns_1"}
    assert set(frozen.skipped) == {"CheckpointBlock_0/first", "CheckpointBlock_0/bns_1"}


def test_of_several_freezes_the_innermost_that_matches_decides_and_each_ends_with_its_block():
    model = stacked(MINE)
    variables = start(model)
    with freeze(affine=True) as outer:
        with freeze("second", use_running_average=False) as inner:
            got = step(model, variables)
        everything = step(model, variables)
    same(got, by_hand(variables, {"first": (True, False, True), "second": (False, False, False)}))
    same(everything, by_hand(variables, dict.fromkeys(("first", "second"), (True, False, True))))
    with pytest.raises(KeyError), freeze():
        raise KeyError
    same(step(model, variables), by_hand(variables, dict.fromkeys(("first", "second"), TRAINING)))
    assert outer == jbn.linen.Found(("first", "second"), ())
    assert inner == jbn.linen.Found(("second",), ("first",))


@models
def test_layers_under_transforms_are_frozen_too(make):
    with freeze(), replace():
        variables, _, new, _ = jax.jit(run, static_argnums=0)(make(THEIRS), X)
    same(new["batch_stats"], variables["batch_stats"])


def in_a_module(norm):
    class Block(nn.Module):
        momentum: float
        use_running_average: bool

        @nn.compact
        def __call__(self, x):
            return norm(self.use_running_average, momentum=self.momentum)(x)

    return Block


@pytest.mark.parametrize(
    "kind", [nn.jit(MINE), nn.jit(in_a_module(MINE)), nn.remat(nn.jit(MINE)), in_a_module(nn.jit(MINE))]
)
def test_layers_that_flax_compiles_as_one_are_frozen_by_their_paths(kind):
    model = stacked(kind)
    variables = model.init(jax.random.key(0), ROWS)
    for patterns, moving in [("first", {"second"}), ("second*", {"first"}), ((), {"first", "second"})]:
        with freeze(patterns):
            new = model.apply(variables, ROWS, mutable=True)[1]
        assert new.keys() == variables.keys()  # no more is returned than without the block
        old = variables["batch_stats"]
        assert {name for name in old if not same_numbers(old[name], new["batch_stats"][name])} == moving
    with freeze(["first", "second"]):  # which are one program: no pattern is said to match nothing
        model.init(jax.random.key(0), ROWS)
        model.apply(variables, ROWS, mutable=True)


def test_where_layers_cannot_be_told_apart_freeze_says_so():
    model = nn.Sequential([nn.jit(in_a_module(MINE))(0.5, False) for _ in range(2)])
    variables = model.init(jax.random.key(0), ROWS)
    call = partial(model.apply, method=lambda model, x: model.layers[1](model.layers[0](x)), mutable=["batch_stats"])
    words = r"freeze\(\) may take others for 'layers_0': .*expected a method of the model"
    with pytest.warns(UserWarning, match=f"(?i){words}") as caught, freeze("layers_0"):
        call(variables, ROWS)
    assert caught[0].filename == __file__
    with freeze():
        call(variables, ROWS)


def same_numbers(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("contexts", [(freeze, freeze), (freeze, replace)], ids=["freeze", "freeze and replace"])
def test_contexts_of_tasks_that_run_in_turns_are_refused_and_leave_nothing_behind(contexts):
    first, second = (context() for context in contexts)
    model = stacked(MINE)
    variables = start(model)
    compiled = jax.jit(partial(step, model))
    want = compiled(variables)
    same(inside([freeze()], compiled, variables)[1][1], variables["batch_stats"])
    first.__enter__()
    second.__enter__()
    for context, name in zip((first, second), contexts, strict=True):
        with pytest.raises(RuntimeError, match=rf"{name.__name__}\(\) ends while .*without await or yield"):
            context.__exit__(None, None, None)
    same(compiled(variables), want)


@pytest.mark.parametrize("context", [freeze, replace])
def test_equal_contexts_inside_one_another_are_two(context):
    with context() as outer, context() as inner:
        start(stacked(MINE))
    assert outer.paths == inner.paths == ("first", "second")


def test_a_context_that_another_thread_inherits_meets_what_is_met_there():
    model = stacked(MINE)
    variables = start(model)

    def run():
        with freeze("first") as frozen:
            model.apply(variables, ROWS, mutable=["batch_stats"])
        return frozen

    with freeze(), ThreadPoolExecutor(1) as pool:
        model.apply(variables, ROWS)
        frozen = pool.submit(copy_context().run, run).result()
    assert frozen == jbn.linen.Found(("first",), ("second",))


@pytest.mark.parametrize("patterns", ["third", ["first", "third"], "first/second"])
def test_freeze_warns_of_a_pattern_that_matched_nothing(patterns):
    words = r"freeze\(\): .*matches none of the 2.*acts on what is called inside the block"
    with pytest.warns(UserWarning, match=words) as caught, freeze(patterns):
        start(stacked(MINE))
    assert caught[0].filename == __file__


def test_freeze_refuses_other_kinds():
    for options, words in [
        ({"patterns": 3}, "patterns is 3"),
        ({"use_running_average": None}, "use_running_average is None"),
        ({"update": 1}, "update is 1"),
        ({"affine": "yes"}, "affine is 'yes'"),
    ]:
        with pytest.raises(TypeError, match=words), freeze(**options):
            raise AssertionError
