"""What a survey asks of layers, and which of them it names where they cannot answer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from tests.observing.test_recalibrate import FRESH, PARAMS, ROWS, C, apply, check, cut, rows, two_layers, wanted
from tests.support import oracle
from tests.support.shards import mesh


def evaluated(params, state, x):
    return two_layers(params, state, x, train=False)


def by_flax(params, state, x):
    norm = nn.BatchNorm(use_running_average=False)
    a = norm.apply(
        {"params": params["norm"]._asdict(), "batch_stats": state["a"]._asdict()}, x, mutable=["batch_stats"]
    )
    return {"a": jbn.State(**a[1]["batch_stats"]), "b": jbn.bn_forward(None, state["b"], x, True)[1]}


def anew(params, state, x):
    return {"a": jbn.bn_init(C)[1], "b": jbn.bn_forward(None, state["b"], x, True)[1]}


def exported(params, state, x):
    fixed = jax.export.export(jax.jit(lambda s, x: jbn.bn_forward(None, s, x, True)[1]))
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (FRESH["a"]._asdict(), rows()))
    new = fixed(*like).call(state["a"]._asdict(), x)
    return {"a": jbn.State(**new), "b": jbn.bn_forward(None, state["b"], x, True)[1]}


def masked(params, state, x):
    a = jbn.bn_forward(None, state["a"], x, True, mask=jnp.zeros((len(x), 1), bool))[1]
    return {"a": a, "b": jbn.bn_forward(None, state["b"], x, True)[1]}


class Foreign:
    """An array of a library that jax does not know."""

    shape, dtype = (4, C), "float32"


X = rows()
REFUSED = {
    "no batches": (apply, FRESH, [], {}, ValueError, "batches is empty"),
    "one array": (apply, FRESH, X, {}, TypeError, r"ndarray; expected an iterable of batches"),
    "one dictionary": (apply, FRESH, {"x": X}, {}, TypeError, "dict; expected an iterable"),
    "no iterable": (apply, FRESH, 3, {}, TypeError, "int; expected an iterable"),
    "a generator": (apply, FRESH, iter([X]), {"upstream": "recalibrated"}, TypeError, "can be read once"),
    "no such way": (apply, FRESH, [X], {"upstream": "both"}, ValueError, "expected 'batch' or 'recalibrated'"),
    "no function": (3, FRESH, [X], {}, TypeError, "apply is of type int"),
    "no statistics": (apply, {"c": {"w": X}}, [X], {}, ValueError, "state holds c/w; expected statistics"),
    "y too": (lambda p, s, x: (x, s), FRESH, [X], {}, ValueError, "expected the new state"),
    "all frozen": (evaluated, FRESH, [X], {}, ValueError, "^a, b gave no moments: in this call they evaluate"),
    "a layer of Flax": (by_flax, FRESH, [X], {}, ValueError, r"^a gave no moments.*jbn.linen.replace\(\)"),
    "a state made anew": (anew, FRESH, [X], {}, ValueError, "^a gave no moments"),
    "an exported layer": (exported, FRESH, [X], {}, ValueError, "^a gave no moments"),
    "a batch of PyTorch": (
        lambda p, s, x: apply(p, s, x["x"]), FRESH, [{"x": Foreign()}], {}, TypeError,
        r"^batch/x is of type .*\.Foreign; expected an array of NumPy or jax\. One of PyTorch is tensor\.numpy\(\)",
    ),
    "no function of progress": (apply, FRESH, [X], {"progress": 3}, TypeError, "progress is of type int; expected a f"),
    "no flag": (apply, FRESH, [X], {"unbiased": "no"}, TypeError, "unbiased is 'no' of type str; expected True or"),
    "keys of several kinds": (apply, {**FRESH, 1: FRESH["a"]}, [X], {}, TypeError, "^state has keys of several kinds"),
    "no features": (apply, jbn.bn_init(0)[1], [X], {}, ValueError, "state holds mean, var; .* of one feature or more"),
    "no valid rows": (masked, FRESH, [X], {}, ValueError, "Fewer than two valid rows reached a;"),
    "NaN": (apply, FRESH, [np.where(X > 2, X, np.nan)], {}, ValueError, "statistics of a, b are not finite"),
    "NaN, recalibrated": (
        apply, FRESH, [np.where(X > 2, X, np.nan)], {"upstream": "recalibrated"}, ValueError, "of a, b are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refusals(refused):
    function, state, batches, options, kind, message = refused
    with pytest.raises(kind, match=message):
        jbn.recalibrate(function, PARAMS, state, batches, **options)


@pytest.mark.parametrize("features", [1, 3, 4, C])
def test_a_layer_of_flax_is_named_whatever_its_size(features):
    state = {"a": jbn.bn_init(features)[1], "b": jbn.bn_init(features)[1]}
    params = {"norm": jbn.bn_init(features)[0]}
    with pytest.raises(ValueError, match="a gave no moments"), jax.numpy_rank_promotion("allow"):
        jbn.recalibrate(by_flax, params, state, [X[:, :features]])


def test_a_layer_of_flax_that_was_replaced():
    model, batches = nn.Sequential([nn.BatchNorm(False), nn.Dense(2)]), cut(rows(), 20)
    variables = model.init(jax.random.key(0), batches[0])

    def run(params, stats, x):
        with jbn.linen.replace():
            _, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return new["batch_stats"]

    got = jbn.recalibrate(run, variables["params"], variables["batch_stats"], batches)
    check({"a": got["layers_0"]}, {"a": oracle.moments(rows())[1:]})


@pytest.mark.parametrize("shape", [(C, 1, n) for n in range(1, 7)], ids=str)
def test_no_shape_of_a_state_means_anything_else(shape):
    """A state is refused, or is the statistics of its features."""
    with pytest.raises(ValueError, match=r"state\.mean has shape"):
        jbn.bn_forward(None, jbn.bn_init(shape)[1], rows(), True)
    x = rows()[:, :, None, None] * np.ones(shape[1:], np.float32)
    y, _ = jbn.bn_forward(None, jbn.bn_init(shape)[1], x, True, axis=(1, 2, 3))
    assert np.abs(oracle.wide(y[..., 0, 0]) - oracle.forward(rows()).y).max() <= 4 * oracle.tolerance("float32", ROWS)


def test_what_apply_asks_of_a_state_has_its_answers():
    def curious(params, state, x):
        for mean in (state["a"].mean, state["b"].mean):
            assert (mean.shape, mean.ndim, mean.dtype) == ((C,), 1, np.float32)
        return apply(params, state, x)

    check(jbn.recalibrate(curious, PARAMS, FRESH, cut(rows(), 20)), wanted(cut(rows(), 20)))


@pytest.mark.parametrize("name", ["value", "query"])
def test_a_layer_of_any_name_is_named(name):
    state = {"attention": {name: FRESH["a"], "other": FRESH["b"]}}

    def one(params, state, x):
        _, other = jbn.bn_forward(None, state["attention"]["other"], x, True)
        return {"attention": state["attention"] | {"other": other}}

    with pytest.warns(UserWarning, match=f"^1 of 2 layers keep their statistics.*: attention/{name}\\."):
        jbn.recalibrate(one, None, state, [X])


def over_shards(synchronized, averaged):
    """Return an ``apply`` of one layer over shards whose means differ, which may average its states itself."""

    def shard(state, x):
        new = jbn.bn_forward(None, state, x, True, axis_name="data" if synchronized else None)[1]
        return jax.lax.pmean(new, "data") if averaged else new

    over = {"mesh": mesh(), "in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
    return lambda params, state, x: jax.shard_map(shard, **over)(state, x)


def test_states_that_apply_averages_are_refused():
    x = rows() + np.repeat(np.arange(4), ROWS // 4)[:, None].astype(np.float32)
    for synchronized in (False, True):
        with pytest.raises(ValueError, match=r"^the layer returned statistics that were averaged.*pmean"):
            jbn.recalibrate(over_shards(synchronized, True), None, FRESH["a"], [x])
    check({"a": jbn.recalibrate(over_shards(True, False), None, FRESH["a"], [x])}, {"a": oracle.moments(x)[1:]})


def test_an_error_of_apply_is_its_own():
    def wrong(params, state, x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        jbn.recalibrate(wrong, PARAMS, FRESH, [X])
    assert "moments" not in str(caught.value)
