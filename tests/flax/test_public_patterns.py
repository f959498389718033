"""What public models do with batch norms: every tool takes it, or says what it leaves alone."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError
from jax import export

import jbn.linen
import jbn.nnx
from tests.support.fold_cases import numbers
from tests.support.patterns import (
    IMAGES,
    Copied,
    CopiedNNX,
    Decides,
    Forgets,
    NamesAnAxis,
    OfNNX,
    WithCopies,
)

BOTH = (("c0", "n0"), ("c1", "n1"))
X = numbers(jnp.zeros(IMAGES))

LINEN = {"mutable decides": Decides, "copied class": WithCopies, "flag not passed": Forgets, "axis name": NamesAnAxis}
NNX = {
    "copied class": lambda: OfNNX(CopiedNNX),
    "flag not passed": lambda: OfNNX(nnx.BatchNorm, forgets=True),
    "axis name": lambda: OfNNX(nnx.BatchNorm, axis_name="batch"),
}
linen = pytest.mark.parametrize("make", LINEN.values(), ids=LINEN)
of_nnx = pytest.mark.parametrize("make", NNX.values(), ids=NNX)


def close(got: Any, want: Any) -> None:
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def same(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


def in_training(apply: Any, model: Any, variables: Any) -> Any:
    """Call in training, the axis bound where Flax asks for one; return logits and statistics."""
    flag = {} if isinstance(model, Decides) else {"train": True}
    one = jax.vmap(lambda x: apply(variables, x, mutable=["batch_stats"], **flag), axis_name="batch")(X[None])
    return jax.tree.map(lambda leaf: leaf[0], one)


def started(make: Any) -> Any:
    model = make()
    return model, numbers(model.init(jax.random.key(0), X))


@linen
def test_replace_gives_the_same_logits(make):
    model, variables = started(make)
    with jbn.linen.replace(also=(Copied,)) as replaced:
        got, y = model.apply(variables, X), in_training(model.apply, model, variables)
        again = model.init(jax.random.key(0), X)
    assert replaced == jbn.linen.Found(("n0", "n1"), ())
    close(got, model.apply(variables, X))
    jax.tree.map(close, y, in_training(model.apply, model, variables))
    same(again, model.init(jax.random.key(0), X))


@linen
def test_fold_takes_every_norm_and_its_result_is_exported(make):
    model, variables = started(make)
    apply, folded, folds = jbn.linen.fold(model, variables, X, also=Copied)
    assert tuple(folds) == (BOTH, ())
    assert jbn.linen.foldable(model, jax.eval_shape(lambda: variables), X, also=Copied) == folds
    assert "batch_stats" not in folded or not folded["batch_stats"]
    close(apply(folded, X), model.apply(variables, X))
    exported = export.export(jax.jit(lambda x: apply(folded, x)))(jax.ShapeDtypeStruct(X.shape, X.dtype))
    close(export.deserialize(exported.serialize()).call(X), model.apply(variables, X))
    with pytest.raises(ValueError, match="n0 is folded into the layer beside it and cannot train"):
        in_training(apply, model, folded)


@linen
def test_a_frozen_model_keeps_its_statistics(make):
    model, variables = started(make)
    with jbn.linen.replace(also=Copied), jbn.linen.freeze() as frozen:
        y, new = in_training(model.apply, model, variables)
    assert frozen == jbn.linen.Found(("n0", "n1"), ())
    close(y, model.apply(variables, X))
    same(new["batch_stats"], variables["batch_stats"])


def test_a_copied_class_is_observed_where_it_is_named():
    model, variables = started(WithCopies)
    x = jbn.linen.record(model, variables, X)["c0"].outputs[0].astype("d")
    found = jbn.linen.diagnose(model, variables, X, also=Copied, train=True)
    assert [layer.count.min() for layer in found.layers] == [X.size // 3] * 2
    new = jbn.linen.recalibrate(model, variables, [X], also=(Copied,), train=True)["batch_stats"]["n0"]
    close(new["mean"], x.mean((0, 1, 2)))
    close(new["var"], x.var((0, 1, 2)))


def test_an_axis_name_that_is_written_into_a_model_is_taken_away():
    model, variables = started(NamesAnAxis)
    with jbn.linen.replace(axis_name=None):
        got = model.apply(variables, X, train=True, mutable=["batch_stats"])
    jax.tree.map(close, got, in_training(model.apply, model, variables))


def test_whatever_holds_statistics_is_reported():
    model, variables = started(WithCopies)
    with jbn.linen.replace() as replaced:
        model.apply(variables, X)
    assert replaced == jbn.linen.Found(("n1",), ("n0",))
    apply, folded, folds = jbn.linen.fold(model, variables, X)
    assert tuple(folds) == (BOTH[1:], ("n0",))
    close(apply(folded, X), model.apply(variables, X))
    words = r"freeze\(\) leaves 'n0' as they are, which match and are not jbn's"
    with (
        pytest.warns(UserWarning, match=words) as caught,
        jbn.linen.freeze("n*") as frozen,
        jbn.linen.replace(),
    ):
        model.apply(variables, X, train=True, mutable=["batch_stats"])
    assert frozen == jbn.linen.Found(("n1",), ("n0",))
    assert caught[0].filename == __file__
    with jbn.linen.freeze("n1") as frozen, jbn.linen.replace():  # nobody asked for the other
        model.apply(variables, X, train=True, mutable=["batch_stats"])
    assert frozen == jbn.linen.Found(("n1",), ("n0",))


@pytest.mark.parametrize("also", [(), (Copied,)], ids=["unknown", "known"])
def test_a_copy_that_trains_is_not_folded(also):
    model, variables = started(WithCopies)
    with pytest.raises(ValueError, match=r"n0 normalizes by the batch.*expected a call in evaluation"):
        jbn.linen.foldable(model, variables, X, train=True, also=also)


def test_other_collections_that_a_call_changes_are_the_caller_s():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("counts", "calls", lambda: jnp.zeros(()))
            calls.value += 1
            return nn.BatchNorm(True, name="n")(nn.Dense(3, name="a")(x))

    model, x = Counts(), jnp.ones((4, 3))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ModifyScopeVariableError, match='"counts" is immutable'):
        jbn.linen.foldable(model, variables, x)
    assert jbn.linen.foldable(model, variables, x, mutable=["counts"]).pairs == (("a", "n"),)


class Clips(Copied):
    most: float = 3.0

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return super().__call__(jnp.clip(x, -self.most, self.most), use_running_average)


class Nameless(nn.Module):
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return x


class Lacks(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x):
        return x


class Trains(Copied):
    @nn.compact
    def __call__(self, x, train=False):
        return super().__call__(x, not train)


class Renorms(Copied):
    """It holds more than Flax's norm does, and so does something else with it."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        self.variable("batch_stats", "steps", jnp.zeros, ())
        return super().__call__(x, use_running_average)


REFUSED = {
    "a field of its own": (
        Clips,
        TypeError,
        r"also has Clips, whose fields most Flax's BatchNorm has not.*Leave Clips",
    ),
    "a field of another name": (Nameless, TypeError, "also has Nameless, whose fields eps"),
    "no field": (
        Lacks,
        TypeError,
        "also has Lacks, which has no field epsilon, use_running_average; expected it by the",
    ),
    "another call": (Trains, TypeError, "also has Trains, whose call takes train; expected"),
    "other variables": (Renorms, ValueError, "also has Renorms, which holds steps at layers_1; expected no"),
    "no class": ((3,), TypeError, "also has 3; expected classes of norms"),
    "no module": (dict, TypeError, "also has <class 'dict'>; expected classes of norms, subclasses of linen.Module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_compute_something_else_is_refused(case):
    also, error, words = REFUSED[case]
    kind = also if isinstance(also, type) and issubclass(also, nn.Module) else Copied
    x = jnp.ones((4, 3))
    flag = {} if kind in (Trains, Lacks, Nameless) else {"use_running_average": True}
    model = nn.Sequential([nn.Dense(4), kind(**flag)])
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(error, match=words):
        jbn.linen.fold(model, variables, x, also=also)
    with pytest.raises(error, match=words):
        jbn.linen.diagnose(model, {"batch_stats": {}} | variables, x, also=also)
    for call in (lambda: model.apply(variables, x), lambda: model.init(jax.random.key(0), x)):
        with pytest.raises(error, match=words), jbn.linen.replace(also=also):
            call()


def filled(make: Any) -> Any:
    model = make()
    nnx.update(model, numbers(nnx.state(model)))
    return model


def both(model: Any) -> Any:
    """Return logits in training, the state after it, and logits in evaluation."""
    model.train()
    graph, state = nnx.split(model)

    def train(x: Any) -> Any:
        model = nnx.merge(graph, state, copy=True)
        return model(x), nnx.to_pure_dict(nnx.state(model))

    y, new = jax.tree.map(lambda leaf: leaf[0], jax.vmap(train, axis_name="batch")(X[None]))
    model.eval()
    return y, new, model(X)


@of_nnx
def test_replace_gives_the_same_logits_in_nnx(make):
    want, model = both(filled(make)), filled(make)
    variables = nnx.to_pure_dict(nnx.state(model))
    model, replaced = jbn.nnx.replace(model, also=(CopiedNNX,))
    assert (set(replaced.paths), replaced.skipped) == ({"n0", "n1"}, ())
    same(nnx.to_pure_dict(nnx.state(model)), variables)
    jax.tree.map(close, both(model), want)
    model, paths = jbn.nnx.freeze(model)
    assert set(paths) == {"n0", "n1"}
    frozen = both(model)
    close(frozen[0], want[2])
    same(frozen[1], variables)


@of_nnx
def test_fold_takes_every_norm_in_nnx_and_its_result_is_exported(make):
    model = filled(make)
    folded, folds = jbn.nnx.fold(model, X, also=CopiedNNX)
    assert tuple(folds) == (BOTH, ())
    assert jbn.nnx.foldable(model, X, also=CopiedNNX) == folds
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert type(model.n0) is type(make().n0)  # it stays as it is
    model.eval()
    close(folded(X), model(X))
    graph, state = nnx.split(folded)
    program = jax.jit(lambda x: nnx.merge(graph, state)(x))
    exported = export.export(program)(jax.ShapeDtypeStruct(X.shape, X.dtype))
    close(export.deserialize(exported.serialize()).call(X), model(X))


def test_a_copied_class_is_observed_where_it_is_named_in_nnx():
    model = filled(NNX["copied class"])
    x = np.asarray(model.c0(X), "d")
    found = jbn.nnx.diagnose(model, X, also=CopiedNNX)
    assert [layer.count.min() for layer in found.layers] == [X.size // 3] * 2
    jbn.nnx.recalibrate(model, [X], also=(CopiedNNX,))
    assert type(model.n0) is CopiedNNX
    close(model.n0.mean[...], x.mean((0, 1, 2)))
    close(model.n0.var[...], x.var((0, 1, 2)))


def test_an_axis_name_that_is_written_into_an_nnx_model_is_taken_away():
    model, _ = jbn.nnx.replace(filled(NNX["axis name"]), axis_name=None)
    model.train()
    close(model(X), both(filled(NNX["axis name"]))[0])


def test_whatever_holds_statistics_is_reported_in_nnx():
    model = filled(NNX["copied class"])
    folded, folds = jbn.nnx.fold(model, X)
    assert tuple(folds) == (BOTH[1:], ("n0",))
    model, replaced = jbn.nnx.replace(model)
    assert replaced == jbn.nnx.Found(("n1",), ("n0",))
    assert type(model.n0) is CopiedNNX
    with pytest.raises(ValueError, match=r"norms that are not jbn's and cannot be frozen: 'n0'; .*also= for copies"):
        jbn.nnx.freeze(model)
    assert jbn.nnx.freeze(model, "n1")[1] == ("n1",)
    model.eval()
    close(folded(X), model(X))


class ClipsNNX(CopiedNNX):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.most = 3.0


class RenormsNNX(CopiedNNX):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.steps = nnx.BatchStat(jnp.zeros(()))


class LacksNNX(CopiedNNX):
    def __init__(self, num_features):
        super().__init__(num_features)
        del self.epsilon


class TrainsNNX(CopiedNNX):
    def __call__(self, x, train=False):
        return super().__call__(x, not train)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (ClipsNNX, TypeError, "also has ClipsNNX, whose fields most Flax's"),
        (RenormsNNX, ValueError, "also has RenormsNNX, which holds steps at"),
        (LacksNNX, TypeError, "also has LacksNNX, which has no field epsilon"),
        (TrainsNNX, TypeError, "also has TrainsNNX, whose call takes train"),
    ],
)
def test_what_may_compute_something_else_is_refused_in_nnx(kind, error, words):
    model = nnx.Dict(n0=kind(4), n1=nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    for tool in (partial(jbn.nnx.replace, model), partial(jbn.nnx.recalibrate, model, [jnp.ones((4, 4))])):
        with pytest.raises(error, match=words):
            tool(also=kind)
    assert (type(model.n0), type(model.n1)) == (kind, nnx.BatchNorm)
    with pytest.raises(error, match=words):
        jbn.nnx.foldable(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), kind(4)), jnp.ones((2, 4)), also=kind)
