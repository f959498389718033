"""What mypy accepts is what people pass, and what it refuses is refused: mypy reads this file, and it runs too."""

from typing import Any, NamedTuple, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax import Array

import jbn
import jbn.linen
import jbn.nnx
from jbn.typing import ArrayTree, Batch, ParamsLike, StateLike

X = jnp.arange(12.0).reshape(4, 3)


class Gain(NamedTuple):
    """A tuple of somebody else, with a field of the right name."""

    scale: Array


def same(y: Array, other: Array) -> bool:
    return bool(jnp.array_equal(y, other))


def test_parameters_of_a_layer_may_be_of_any_kind() -> None:
    params, state = jbn.bn_init(3)
    want, new = jbn.bn_forward(params, state, X, True)
    assert_type(want, Array)
    assert_type(new, jbn.State)
    linen = nn.BatchNorm(True).init(jax.random.key(0), X)
    module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ones = jnp.ones(3)
    accepted: list[ParamsLike] = [
        params,
        {"scale": ones, "bias": jnp.zeros(3)},
        {"scale": np.ones(3, np.float32), "bias": None},
        FrozenDict({"scale": ones}),
        linen["params"],
        nnx.state(module, nnx.Param),
        Gain(ones),
        None,
    ]
    for each in accepted:
        assert same(jbn.bn_forward(each, state, X, True)[0], want)
        assert jbn.affine(each, state)._fields == ("scale", "bias")
    assert same(jbn.bn_forward(nnx.state(module, nnx.Param), state, X, True)[0], want)
    assert same(jbn.bn_forward(linen["params"], state, X, True)[0], want)


def test_a_state_comes_back_as_what_it_was() -> None:
    params, state = jbn.bn_init(3)
    counted = jbn.bn_init(3, counted=True)[1]
    plain = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    assert_type(jbn.bn_forward(params, counted, X, True)[1], jbn.CountedState)
    assert_type(jbn.bn_forward(params, plain, X, True)[1], dict[str, Array])
    assert_type(jbn.update(state, jbn.moments(X)), jbn.State)
    assert_type(jbn.update(plain, jbn.moments(X)), dict[str, Array])
    assert_type(jbn.merge_states([{"bn": plain}, {"bn": plain}], [1, 2]), dict[str, dict[str, Array]])
    frozen: FrozenDict[str, Array] = FrozenDict({"mean": jnp.zeros(3), "var": jnp.ones(3)})
    accepted: list[StateLike] = [
        state,
        counted,
        plain,
        frozen,
        nn.BatchNorm(True).init(jax.random.key(0), X)["batch_stats"],
    ]
    for each in accepted:
        assert type(jbn.bn_forward(params, each, X, True)[1]) is type(each)


def test_an_array_alone_is_no_layer() -> None:
    params, state = jbn.bn_init(3)
    with pytest.raises(TypeError, match="params is of type"):
        jbn.bn_forward(jnp.ones(3), state, X, True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state is of type"):
        jbn.bn_forward(params, jnp.ones(3), X, True)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="state is of type"):
        jbn.affine(params, [jnp.ones(3)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kernel has a leaf of type"):
        jbn.fold(params, state, "a kernel", layout="IO")  # type: ignore[arg-type]


def test_models_are_taken_as_flax_makes_them() -> None:
    model = nn.Sequential([nn.Dense(3), jbn.linen.BatchNorm(False)])
    variables = model.init(jax.random.key(0), X)
    assert jbn.linen.diagnose(model, variables, X, mutable=["batch_stats"]).layers
    jbn.linen.recalibrate(model, variables, [X], rngs={"dropout": jax.random.key(0)})
    evaluated = nn.Sequential([nn.Dense(3), jbn.linen.BatchNorm(True)])
    apply, folded, folds = jbn.linen.fold(evaluated, variables, X)
    assert jbn.linen.record(apply, folded, X)
    assert folds == jbn.linen.foldable(evaluated, variables, X)
    network = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert_type(jbn.nnx.replace(network)[0], nnx.Sequential)
    assert_type(jbn.nnx.recalibrate(network, [X]), nnx.Sequential)


def test_a_tool_takes_any_tree() -> None:
    params, state = jbn.bn_init(3)
    model = {"bn": params, "kernel": jnp.ones((3, 3))}

    def apply(params: dict[str, Any], state: dict[str, jbn.State], batch: Array) -> dict[str, jbn.State]:
        return {"bn": jbn.bn_forward(params["bn"], state["bn"], batch, True)[1]}

    states = {"bn": state}
    assert_type(jbn.recalibrate(apply, model, states, [X]), dict[str, jbn.State])
    assert jbn.diagnose(apply, model, states, X).layers
    assert_type(jbn.keep_statistics(states, {"bn": state}), dict[str, jbn.State])
    assert sum(jax.tree.leaves(jbn.norm_mask({"bn": params._asdict()}, states))) == 2
    trees: tuple[ArrayTree, Batch] = (model, X)
    assert len(trees) == 2
