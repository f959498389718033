"""``jbn.linen.freeze``, also around Flax's layers inside ``replace``: bit for bit what ``bn_forward`` does."""

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
