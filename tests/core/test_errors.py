"""Every misuse is an error at trace time that names the argument, what arrived, what was expected and the fix."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.linen import BatchNorm

pytestmark = pytest.mark.core

X = np.zeros((8, 4), np.float32)
PARAMS, STATE = jbn.bn_init(4)


def train(x=X, params=PARAMS, state=STATE, flag=True, **options):
    return jbn.bn_forward(params, state, x, flag, **options)


ERRORS = {
    "channel count, params": (
        lambda: train(params=jbn.bn_init(8)[0]),
        ValueError,
        ["scale has shape (8,)", "x of shape (8, 4)", "features of shape (4,) on axis 1", "pass axis=0", "bn_init(4)"],
    ),
    "channel count, bias": (lambda: train(params={"bias": np.zeros(3)}), ValueError, ["bias has shape (3,)", "(4,)"]),
    "channel count, state": (
        lambda: train(state=jbn.bn_init(2)[1]),
        ValueError,
        ["state.mean has shape (2,)", "(4,)", "bn_init(4)"],
    ),
    "channel count, tuple of axes": (
        lambda: train(x=np.zeros((2, 3, 4)), axis=(1, 2)),
        ValueError,
        ["scale has shape (4,)", "features of shape (3, 4) on axis (1, 2)", "bn_init((3, 4))"],
    ),
    "pilot shape": (lambda: jbn.moments(X, pilot=np.zeros(3)), ValueError, ["pilot has shape (3,)", "(4,)"]),
    "pilot kind": (lambda: jbn.moments(X, pilot=[1.0]), TypeError, ["pilot is of type list"]),
    "mask shape": (
        lambda: train(mask=np.ones((7, 1), bool)),
        ValueError,
        ["mask has shape (7, 1)", "x has shape (8, 4)", "1 or that of x"],
    ),
    "mask rank": (
        lambda: train(mask=np.ones(8, bool)),
        ValueError,
        ["mask has shape (8,)", "same rank", "pass mask[..., None]"],
    ),
    "mask dtype": (
        lambda: train(mask=np.ones((8, 1), np.int32)),
        TypeError,
        ["mask has dtype int32", "expected bool", "mask > 0"],
    ),
    "integer x": (
        lambda: train(x=np.zeros((8, 4), np.int32)),
        TypeError,
        ["x has dtype int32", "float32", "x.astype(jnp.float32)"],
    ),
    "boolean x": (lambda: train(x=np.zeros((8, 4), bool)), TypeError, ["x has dtype bool", "mask="]),
    "complex x": (
        lambda: train(x=np.zeros((8, 4), np.complex64)),
        TypeError,
        ["x has dtype complex64", "flax.linen.BatchNorm"],
    ),
    "scalar x": (lambda: train(x=np.float32(1)), ValueError, ["x is a scalar"]),
    "train missing": (lambda: jbn.bn_forward(PARAMS, STATE, X), TypeError, ["bn_forward()", "missing", "'train'"]),
    "train traced": (
        lambda: jax.jit(lambda flag: train(flag=flag))(True),
        TypeError,
        ["train is a traced value", "bool[]", "static_argnums"],
    ),
    "train of another kind": (lambda: train(flag=1), TypeError, ["train is 1 of type int", "True or False"]),
    "unbiased of another kind": (lambda: train(unbiased="no"), TypeError, ["unbiased is 'no'", "True or False"]),
    "train None": (lambda: train(flag=None), TypeError, ["train is None of type NoneType"]),
    "axis out of range": (lambda: train(axis=2), ValueError, ["axis 2", "shape (8, 4)", "-2 to 1"]),
    "axis twice": (lambda: train(axis=(1, -1)), ValueError, ["axis is (1, -1)", "different axes"]),
    "axis empty": (lambda: train(axis=()), ValueError, ["axis is ()"]),
    "axis of another kind": (lambda: train(axis=1.0), TypeError, ["axis is 1.0", "integer"]),
    "one value per channel": (
        lambda: train(x=X[:1]),
        ValueError,
        ["x of shape (1, 4)", "one value per channel", "1 shard)", "larger batch", "train=False", "axis_name="],
    ),
    "one value per channel, rank one": (lambda: train(x=X[0]), ValueError, ["x of shape (4,)", "one value"]),
    "momentum above one": (lambda: train(momentum=1.1), ValueError, ["momentum is 1.1", "0 to 1", "PyTorch"]),
    "momentum below zero": (lambda: train(momentum=-0.1), ValueError, ["momentum is -0.1", "0 to 1"]),
    "momentum not a number": (lambda: train(momentum=float("nan")), ValueError, ["momentum is nan", "0 to 1"]),
    "momentum vector": (lambda: train(momentum=np.ones(4)), ValueError, ["momentum has shape (4,)", "one"]),
    "epsilon zero": (lambda: train(epsilon=0), ValueError, ["epsilon is 0", "or more in float32", "may be 0", "1e-5"]),
    "epsilon below what its derivative bears": (
        lambda: train(epsilon=1e-30),
        ValueError,
        ["epsilon is 1e-30", "2.1e-26 or more in float32"],
    ),
    "epsilon subnormal": (lambda: train(epsilon=np.float64(1e-310)), ValueError, ["epsilon is 1e-310"]),
    "epsilon above the dtype": (lambda: train(epsilon=1e39), ValueError, ["epsilon is 1e+39", "in float32"]),
    "epsilon not a number": (lambda: train(epsilon=float("nan")), ValueError, ["epsilon is nan"]),
    "epsilon infinite, in evaluation": (lambda: train(flag=False, epsilon=np.inf), ValueError, ["epsilon is inf"]),
    "epsilon negative, an array, in evaluation": (
        lambda: train(flag=False, epsilon=np.float32(-1)),
        ValueError,
        ["epsilon is -1.0", "0 or more"],
    ),
    "momentum above one, an array": (
        lambda: train(momentum=jnp.float32(1.5)),
        ValueError,
        ["momentum is 1.5", "0 to 1"],
    ),
    "momentum above one, of NumPy": (lambda: train(momentum=np.array(1.5)), ValueError, ["momentum is 1.5"]),
    "momentum not a number, an array": (lambda: train(momentum=jnp.float32("nan")), ValueError, ["momentum is nan"]),
    "epsilon negative": (lambda: train(epsilon=-1e-5), ValueError, ["epsilon is -1e-05"]),
    "epsilon of another kind": (lambda: train(epsilon=None), TypeError, ["epsilon is None", "Python number"]),
    "axis name unbound": (
        lambda: train(axis_name="data"),
        ValueError,
        ["axis_name 'data' is not bound", "no name is bound here", "jax.shard_map", "jax.jit"],
    ),
    "axis name misspelled": (
        lambda: jax.vmap(lambda x: train(x=x, axis_name="date"), axis_name="data")(np.stack([X, X])),
        ValueError,
        ["axis_name 'date' is not bound", "'data'"],
    ),
    "one of several axis names": (
        lambda: jax.vmap(lambda x: train(x=x, axis_name=("data", "model")), axis_name="data")(np.stack([X, X])),
        ValueError,
        ["axis_name 'model' is not bound"],
    ),
    "groups without a name": (
        lambda: train(axis_index_groups=[[0, 1]]),
        ValueError,
        ["axis_index_groups needs axis_name"],
    ),
    "residual shape": (lambda: train(residual=X[:1]), ValueError, ["residual has shape (1, 4)", "(8, 4)"]),
    "residual dtype": (lambda: train(residual=X.astype(int)), TypeError, ["residual has dtype int"]),
    "activation not a function": (lambda: train(activation="relu"), TypeError, ["activation is 'relu'", "jax.nn.relu"]),
    "activation of another shape": (
        lambda: train(activation=jnp.sum),
        ValueError,
        ["activation returns float32[]", "float32[8, 4]", "same shape"],
    ),
    "activation of another kind": (lambda: train(activation=lambda z: z > 0), ValueError, ["returns bool[8, 4]"]),
    "dtype": (lambda: train(dtype=np.int32), TypeError, ["dtype is int32", "bfloat16"]),
    "state of another kind": (lambda: train(state=(0, 1)), TypeError, ["state is of type tuple", "jbn.State"]),
    "state missing": (lambda: train(state=None), TypeError, ["state is of type NoneType"]),
    "state without var": (
        lambda: train(state={"mean": np.zeros(4)}),
        ValueError,
        ["state has the entries mean;", "expected mean and var"],
    ),
    "params of another library": (
        lambda: train(params={"weight": np.ones(4), "bias": np.ones(4)}),
        ValueError,
        ["params has the entries bias, weight;", "scale and bias"],
    ),
    "params of another kind": (lambda: train(params=[1, 2]), TypeError, ["params is of type list"]),
    "params integer": (lambda: train(params={"scale": np.ones(4, int)}), TypeError, ["scale has dtype int"]),
    "params of a whole model": (
        lambda: train(params={"BatchNorm_0": PARAMS._asdict()}),
        ValueError,
        ["params has the entries BatchNorm_0", "Pass params['BatchNorm_0']"],
    ),
    "params and state swapped": (
        lambda: train(params=STATE, state=PARAMS),
        ValueError,
        ["state has the entries bias, scale", "bn_forward(params, state, x, train)"],
    ),
    "x None": (lambda: train(x=None), TypeError, ["x is None"]),
    "x a list": (lambda: train(x=[[1.0]]), TypeError, ["x is of type list", "array"]),
    "x a masked array": (
        lambda: train(x=np.ma.masked_array(X, X > 1)),
        TypeError,
        ["x is a masked array", "x.filled(0)", "mask=~np.ma.getmaskarray(x)"],
    ),
    "x an array of objects": (lambda: train(x=X.astype(object)), TypeError, ["x is of type ndarray and dtype object"]),
    "mask a masked array, Linen": (
        lambda: BatchNorm(True).init({}, X, mask=np.ma.masked_array(X[:, :1] == 0)),
        TypeError,
        ["mask is a masked array"],
    ),
    "mask of texts, Linen": (
        lambda: BatchNorm(True).init({}, X, mask=np.array([["no"]] * 8)),
        TypeError,
        ["mask is of type ndarray and dtype <U2"],
    ),
    "momentum above one, Linen, where it is written": (
        lambda: BatchNorm(momentum=1.5),
        ValueError,
        ["momentum is 1.5"],
    ),
    "epsilon negative, Linen, where it is written": (lambda: BatchNorm(epsilon=-1), ValueError, ["epsilon is -1"]),
    "params as scale": (lambda: jbn.batch_norm(X, PARAMS), TypeError, ["scale is of type Params"]),
    "momentum None": (lambda: train(momentum=None), TypeError, ["momentum is None", "0 to 1"]),
    "momentum a bool": (lambda: train(momentum=True), TypeError, ["momentum is True"]),
    "epsilon traced": (lambda: jax.jit(lambda e: train(epsilon=e))(1e-5), TypeError, ["epsilon is", "when tracing"]),
    "dtype unknown": (lambda: train(dtype="foo"), TypeError, ["dtype is 'foo'", "bfloat16"]),
    "num_features a float": (lambda: jbn.bn_init(3.0), ValueError, ["num_features is 3.0 of type float", "from 0 on"]),
    "num_features negative": (lambda: jbn.bn_init(-1), ValueError, ["num_features is -1"]),
    "num_features an array": (lambda: jbn.bn_init(X), ValueError, ["num_features is (8, 4) of type ndarray"]),
    "merge of arrays": (lambda: jbn.merge(X, X), TypeError, ["moments[0] is of type ndarray", "jbn.moments(x)"]),
    "merge of different features": (
        lambda: jbn.merge(jbn.moments(X), jbn.moments(X[:, :3])),
        ValueError,
        ["moments[1] has features of shape (3,), moments[0] of shape (4,)"],
    ),
    "merge of a list": (lambda: jbn.merge([jbn.moments(X)] * 2), TypeError, ["moments[0] is of type list", "merge(*"]),
    "merge of nothing": (lambda: jbn.merge(), ValueError, ["merge got no moments"]),
    "update, arguments swapped": (lambda: jbn.update(jbn.moments(X), STATE), TypeError, ["moments is of type State"]),
    "update, other features": (
        lambda: jbn.update(STATE, jbn.moments(X[:, :3])),
        ValueError,
        ["state.mean has shape (4,), but moments are of features of shape (3,)", "bn_init(3)"],
    ),
    "update, 16 bits": (
        lambda: jbn.update(jax.tree.map(jnp.bfloat16, STATE), jbn.moments(X)),
        ValueError,
        ["state.mean has dtype bfloat16", "stall"],
    ),
    "update, momentum": (lambda: jbn.update(STATE, jbn.moments(X), momentum=2), ValueError, ["momentum is 2"]),
    "merge_states of a state": (lambda: jbn.merge_states(STATE, [1, 2]), TypeError, ["states is of type State; expec"]),
    "merge_states of none": (lambda: jbn.merge_states([], []), ValueError, ["states holds none"]),
    "merge_states, two models": (
        lambda: jbn.merge_states([{"a": STATE}, {"b": STATE}], [1, 1]),
        ValueError,
        ["states[1] and states[0] differ in a/mean, a/var, b/mean, b/var"],
    ),
    "merge_states, two sizes": (
        lambda: jbn.merge_states([{"a": STATE}, {"a": jbn.bn_init(3)[1]}], [1, 1]),
        ValueError,
        ["a/mean has shape (3,) in states[1], and (4,) in states[0]"],
    ),
    "merge_states, too few counts": (
        lambda: jbn.merge_states([STATE, STATE], [1]),
        ValueError,
        ["counts holds 1 number for 2 states"],
    ),
    "merge_states, one count": (lambda: jbn.merge_states([STATE], 1), TypeError, ["counts is 1; expected a list"]),
    "merge_states, a count of lists": (lambda: jbn.merge_states([STATE], [[1]]), TypeError, ["counts[0] is [1]"]),
    "merge_states, negative": (lambda: jbn.merge_states([STATE] * 2, [1, -1]), ValueError, ["counts[1] is -1"]),
    "merge_states, no rows": (lambda: jbn.merge_states([STATE] * 2, [0, 0]), ValueError, ["counts are all 0"]),
    "merge_states, other leaves": (
        lambda: jbn.merge_states([{"a": STATE, "b": {"step": np.array(step)}} for step in (1, 2)], [1, 1]),
        ValueError,
        ["b/step differs between states[0] and states[1]", "Pass the statistics alone"],
    ),
    "merge_states, other leaves traced": (
        lambda: jax.jit(lambda step: jbn.merge_states([{"a": STATE, "step": s} for s in (step, 1.0)], [1, 1]))(1.0),
        ValueError,
        ["step is traced, so that nobody can tell"],
    ),
    "moments of integers": (lambda: jbn.moments(np.zeros((8, 4), int)), TypeError, ["x has dtype int"]),
    "bn_init dtype": (lambda: jbn.bn_init(4, dtype=int), TypeError, ["dtype is int"]),
}


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_message(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("train", [True, np.True_, False, np.False_])
def test_train_may_be_a_numpy_bool(train):
    jbn.bn_forward(PARAMS, STATE, X, train)


NUMBERS = [1, 0.5, np.int64(1), np.uint8(1), np.array(1), jnp.array(1), np.float16(0.5), jnp.bfloat16(0.5),
           jnp.bfloat16.dtype.type(0.5), np.array(0.5), np.longdouble(0.5), jnp.float32(0.5)]  # fmt: skip
NO_NUMBERS = [True, np.True_, np.array(True), jnp.array(True), "0.5", np.str_("0.5"), np.array("0.5"), 1 + 0j,
              np.complex64(0.5 + 1j), np.array(0.5 + 1j), jnp.array(0.5 + 1j), None, [0.5], np.array([0.5]), object(),
              np.array(1, "m8[s]"), np.array(0.5, object), jax.random.key(0),
              jax.ShapeDtypeStruct((), "float32")]  # fmt: skip


@pytest.mark.parametrize("name", ["epsilon", "momentum"])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_a_number_is_read_by_value_whatever_its_type(number, name):
    for flag in (True, False):
        got, want = (train(flag=flag, update=True, **{name: n}) for n in (number, float(number)))
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", ["epsilon", "momentum"])
@pytest.mark.parametrize("thing", NO_NUMBERS, ids=lambda thing: type(thing).__name__)
def test_what_is_no_real_number_is_refused_by_name(thing, name):
    with pytest.raises((TypeError, ValueError), match=f"{name} (is|has shape)"):
        train(update=True, **{name: thing})


@pytest.mark.parametrize("name", ["epsilon", "momentum"])
@pytest.mark.parametrize("huge", [10**400, -(10**400)], ids=["positive", "negative"])
def test_an_integer_beyond_all_floats_is_out_of_range(huge, name):
    with pytest.raises(ValueError, match=f"{name} is -?10000.*; expected"):
        train(**{name: huge})


def test_errors_come_when_tracing():
    with pytest.raises(ValueError, match="one value per channel"):
        jax.eval_shape(lambda x: train(x=x), jax.ShapeDtypeStruct((1, 4), jnp.float32))


def test_zero_rows_are_no_error():
    y, state = train(x=X[:0])
    assert y.shape == (0, 4)
    np.testing.assert_array_equal(state.mean, STATE.mean)
    np.testing.assert_array_equal(state.var, STATE.var)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jbn.moments(X[:0])))


def test_one_row_a_shard_is_no_error_where_shards_share():
    y = jax.vmap(lambda x: train(x=x, axis_name="batch")[0], axis_name="batch")(np.eye(4, dtype=np.float32))
    np.testing.assert_allclose(y, train(x=np.eye(4, dtype=np.float32))[0], atol=1e-6)


def test_evaluation_needs_neither_axis_nor_rows():
    train(x=X[:1], flag=False, axis_name="data")


def test_a_traced_momentum_outside_its_range_is_not_looked_at():
    jax.jit(lambda m: train(momentum=m))(1.5)


LINEN = {
    "statistics not passed": (
        lambda: BatchNorm(False).apply({"params": PARAMS._asdict()}, X, mutable=["batch_stats"]),
        ValueError,
        "batch_stats is mutable but holds no statistics.*model.apply",
    ),
    "statistics not passed, inside a model": (
        lambda: nn.Sequential([nn.Dense(4), BatchNorm(False)]).apply(
            {"params": {"layers_0": {"kernel": np.eye(4), "bias": np.zeros(4)}, "layers_1": PARAMS._asdict()}},
            X,
            mutable=["batch_stats"],
        ),
        ValueError,
        "no statistics for layers_1",
    ),
    "statistics not passed, without parameters": (
        lambda: BatchNorm(False, use_scale=False, use_bias=False).apply({}, X, mutable=["batch_stats"]),
        ValueError,
        "holds no statistics",
    ),
    "activation is a module": (
        lambda: BatchNorm(False, activation=nn.PReLU()).init(jax.random.key(0), X),
        TypeError,
        "activation is the module PReLU",
    ),
    "normalize_by is a module": (
        lambda: BatchNorm(False, normalize_by=nn.PReLU()).init(jax.random.key(0), X),
        TypeError,
        "normalize_by is the module PReLU",
    ),
    "one value per channel": (
        lambda: BatchNorm(False).apply(
            {"params": PARAMS._asdict(), "batch_stats": STATE._asdict()}, X[:1], mutable=["batch_stats"]
        ),
        ValueError,
        re.escape("x of shape (1, 4) has one value per channel"),
    ),
    "wrong channel count": (
        lambda: BatchNorm(True).apply({"params": PARAMS._asdict(), "batch_stats": jbn.bn_init(8)[1]._asdict()}, X),
        ValueError,
        re.escape("state.mean has shape (8,)"),
    ),
    "flag is a number of features": (
        lambda: BatchNorm(64),
        TypeError,
        "use_running_average is 64; expected True or False; Flax takes the number of features from x",
    ),
    "flag traced": (
        lambda: jax.jit(lambda f: BatchNorm().init(jax.random.key(0), X, use_running_average=f))(True),
        TypeError,
        "use_running_average is a traced value",
    ),
    "mask of examples": (
        lambda: BatchNorm(True).init(jax.random.key(0), X, mask=np.ones(8, bool)),
        ValueError,
        re.escape("mask has shape (8,), x has shape (8, 4)"),
    ),
    "flag at neither place": (lambda: BatchNorm().init(jax.random.key(0), X), ValueError, "use_running_average"),
    "flag at both places": (
        lambda: BatchNorm(True).init(jax.random.key(0), X, use_running_average=True),
        ValueError,
        "use_running_average",
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), LINEN.values(), ids=LINEN)
def test_linen_message(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_linen_initializes_with_one_value_per_channel_and_without_an_axis():
    layer = BatchNorm(False, axis_name="data")
    y, variables = layer.init_with_output(jax.random.key(0), X[:1] + 3)
    assert not y.any()
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))


def test_linen_may_be_initialized_through_apply():
    _, variables = BatchNorm(False).apply({}, X, mutable=True, rngs={"params": jax.random.key(0)})
    assert set(variables) == {"params", "batch_stats"}
