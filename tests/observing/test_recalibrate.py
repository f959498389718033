"""Population statistics of whole models: exact over batches, masks and shards, through every door."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.core.state import Observation
from jbn.observing.survey import Layer, Survey
from tests.support import oracle
from tests.support.shards import mesh

ROWS, C = 40, 5
EPSILON = 1e-5
W = np.random.default_rng(1).standard_normal((C, C)).astype(np.float32)
PARAMS = {"w": W, "norm": jbn.bn_init(C)[0]}
FRESH = {"a": jbn.bn_init(C)[1], "b": jbn.bn_init(C)[1]}


def rows(mean=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((ROWS, C)) * rng.uniform(0.5, 2, C) + mean).astype(np.float32)


def two_layers(params, state, x, mask=None, train=True, **options):
    options |= {"mask": mask, "momentum": 0.3, "epsilon": EPSILON}
    h, a = jbn.bn_forward(params["norm"], state["a"], x, train, activation=jax.nn.silu, **options)
    _, b = jbn.bn_forward(params["norm"], state["b"], h @ params["w"], train, **options)
    return {"a": a, "b": b}


def apply(params, state, batch):
    return two_layers(params, state, *batch) if isinstance(batch, tuple) else two_layers(params, state, batch)


def wanted(batches, upstream="batch"):
    """Return mean and var of both layers in float64, from all rows at once."""
    batches = [batch if isinstance(batch, tuple) else (batch, None) for batch in batches]
    masks = None if batches[0][1] is None else np.concatenate([mask for _, mask in batches])
    first = oracle.moments(np.concatenate([x for x, _ in batches]), mask=masks)[1:]
    stats = None if upstream == "batch" else [v.astype(np.float32) for v in first]  # those of the state
    hidden = [
        oracle.forward(x, epsilon=EPSILON, mask=mask, activation=jax.nn.silu, stats=stats).y for x, mask in batches
    ]
    second = oracle.moments(np.concatenate(hidden) @ W.astype(np.float64), mask=masks)[1:]
    return {"a": first, "b": second}


def check(got, want):
    for layer, (mean, var) in want.items():
        state = got[layer]
        found = state if isinstance(state, dict) else {"mean": state.mean, "var": state.var}
        deviation = np.sqrt(var).max()
        bound = 4 * oracle.tolerance(np.float32, ROWS, deviation)
        assert np.abs(oracle.wide(found["mean"]) - mean).max() <= bound + np.abs(mean).max() * oracle.ULP["float32"]
        assert np.abs(oracle.wide(found["var"]) / var - 1).max() <= 8 * oracle.tolerance(np.float32, ROWS)


def cut(x, *at):
    return np.split(x, at)


UNEVEN = (16, 32, 37)


@pytest.mark.parametrize("upstream", ["batch", "recalibrated"])
@pytest.mark.parametrize("mean", [3.0, 1e4])
def test_rows_of_all_batches(mean, upstream):
    batches = cut(rows(mean), *UNEVEN)
    got = jbn.recalibrate(apply, PARAMS, FRESH, batches, upstream=upstream)
    check(got, wanted(batches, upstream))


@pytest.mark.parametrize("upstream", ["batch", "recalibrated"])
def test_masked_rows_and_empty_batches_count_nothing(upstream):
    x, mask = rows(), np.random.default_rng(2).random((ROWS, 1)) < 0.6
    mask[:8] = False
    poisoned = np.where(mask, x, np.nan).astype(np.float32)
    batches = list(zip(cut(poisoned, 8, 24), cut(mask, 8, 24), strict=True))
    check(jbn.recalibrate(apply, PARAMS, FRESH, batches, upstream=upstream), wanted(batches, upstream))


def test_a_batch_of_no_rows_counts_nothing():
    batches = [rows()[:0], *cut(rows(), 16)]
    check(jbn.recalibrate(apply, PARAMS, FRESH, batches), wanted(batches[1:]))


def test_batches_of_one_row_with_recalibrated_statistics():
    batches = cut(rows(), *range(1, ROWS))
    got = jbn.recalibrate(apply, PARAMS, FRESH, batches, upstream="recalibrated")
    check(got, wanted(batches, "recalibrated"))
    with pytest.raises(ValueError, match=r"no more rows than batches, one value per channel.*upstream='recalibrated'"):
        jbn.recalibrate(apply, PARAMS, FRESH, batches)


@pytest.mark.parametrize("place", ["last", "first", "between"])
def test_a_batch_of_one_row_is_normalized_by_the_others(place):
    """Not by the running statistics, which are old; a fresh state's would make of it a number of no model."""
    x = rows(mean=50.0)
    alone, *others = cut(x, 1, 20)
    at = {"first": 0, "between": 1, "last": 2}[place]
    got = jbn.recalibrate(apply, PARAMS, FRESH, [*others[:at], alone, *others[at:]])
    given = dict(epsilon=EPSILON, activation=jax.nn.silu)
    hidden = [oracle.forward(batch, **given).y for batch in others]
    hidden.append(oracle.forward(alone, stats=oracle.moments(np.concatenate(others))[1:], **given).y)
    second = oracle.moments(np.concatenate(hidden) @ W.astype(np.float64))[1:]
    check(got, {"a": oracle.moments(x)[1:], "b": second})


def test_a_last_batch_of_one_row_with_recalibrated_statistics():
    x = rows()
    got = jbn.recalibrate(apply, PARAMS, FRESH, cut(x, ROWS - 1), upstream="recalibrated")
    check(got, wanted(cut(x, ROWS - 1), "recalibrated"))


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float16, 300), (jnp.float16, 1e5)])
def test_statistics_that_the_state_does_not_hold_are_refused(dtype, size):
    x = np.random.default_rng(0).standard_normal((64, C)).astype(np.float32) * size
    state = {"a": jbn.State(jnp.zeros(C, dtype), jnp.ones(C, dtype))}

    def one(params, state, x):
        return {"a": jbn.bn_forward(None, state["a"], x, True)[1]}

    with pytest.raises(
        ValueError, match=r"The var of a is up to .* more than the state holds, which is float16.*float32"
    ):
        jbn.recalibrate(one, None, state, [x])
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), state)
    np.testing.assert_allclose(jbn.recalibrate(one, None, wide, [x])["a"].var, oracle.moments(x)[2], rtol=1e-5)


@pytest.mark.parametrize("kind", ["int32", "bool", "float"])
def test_a_state_of_other_numbers_is_refused(kind):
    mean = 0.0 if kind == "float" else jnp.zeros(C, kind)
    state = {"a": jbn.State(mean, jnp.ones(C))}
    for act in (lambda *it: jbn.recalibrate(*it[:-1], [it[-1]]), jbn.diagnose):
        with pytest.raises(TypeError, match=f"The mean of a is of {kind}; expected an array of float16, bfloat16"):
            act(lambda _, s, x: {"a": jbn.bn_forward(None, s["a"], x, True)[1]}, None, state, jnp.ones((64, C)))


def test_a_narrow_state_is_filled_and_keeps_its_dtype():
    x = np.random.default_rng(0).standard_normal((64, C)).astype(np.float32) + 5
    state = {"a": jbn.State(jnp.zeros(C, jnp.bfloat16), jnp.ones(C, jnp.bfloat16))}
    got = jbn.recalibrate(lambda _, s, x: {"a": jbn.bn_forward(None, s["a"], x, True)[1]}, None, state, [x])
    _, mean, var = oracle.moments(x)
    assert got["a"].mean.dtype == jnp.bfloat16
    np.testing.assert_allclose(oracle.wide(got["a"].mean), mean, rtol=2**-8)
    np.testing.assert_allclose(oracle.wide(got["a"].var), var, rtol=2**-8)


def test_boxed_statistics_stay_boxed():
    """Leaves of ``nn.Partitioned``, as large models have them."""
    nn = pytest.importorskip("flax.linen")
    state = {"a": {name: nn.Partitioned(v, ("features",)) for name, v in FRESH["a"]._asdict().items()}}
    x = rows()

    def one(params, state, x):
        raw = nn.unbox(state)["a"]
        new = jbn.bn_forward(None, raw, x, True)[1]
        return {"a": {name: state["a"][name].replace(value=v) for name, v in new.items()}}

    got = jbn.recalibrate(one, None, state, [x[:4], x[4:]])
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert got["a"]["mean"].names == ("features",)
    np.testing.assert_allclose(got["a"]["mean"].value, oracle.moments(x)[1], rtol=1e-5)


def test_the_start_and_the_momentum_do_not_matter():
    batches = cut(rows(), *UNEVEN)
    start = jax.tree.map(lambda v: v.at[0].set(jnp.nan).at[1].set(7.0), FRESH)
    for upstream in ("batch", "recalibrated"):
        check(jbn.recalibrate(apply, PARAMS, start, batches, upstream=upstream), wanted(batches, upstream))


def test_unbiased():
    batches = cut(rows(), *UNEVEN)
    biased, sample = (jbn.recalibrate(apply, PARAMS, FRESH, batches, unbiased=u) for u in (False, True))
    np.testing.assert_allclose(sample["b"].var, biased["b"].var * ROWS / (ROWS - 1), rtol=1e-6)


def test_features_masked_apart():
    x = rows()
    mask = np.broadcast_to(np.arange(C) != 2, x.shape)
    poisoned = np.where(mask, x, np.nan).astype(np.float32)
    state = {"a": FRESH["a"]._replace(mean=jnp.full(C, 9.0))}

    def one(params, state, batch):
        return {"a": jbn.bn_forward(None, state["a"], batch[0], True, mask=batch[1])[1]}

    got = jbn.recalibrate(one, None, state, [(poisoned[:30], mask[:30]), (poisoned[30:], mask[30:])])["a"]
    want = oracle.moments(x)[1]
    assert got.mean[2] == 9
    np.testing.assert_allclose(np.delete(got.mean, 2), np.delete(want, 2), rtol=1e-6)


def test_a_layer_that_is_called_twice_sees_the_rows_of_both():
    x = rows(1e4)

    def views(params, state, x):
        for view in (x, 3 * x[:5]):
            _, state = jbn.bn_forward(None, state, view, True)
        return state

    batches = cut(x, *UNEVEN[:2])
    _, mean, var = oracle.moments(np.concatenate([np.concatenate([b, 3 * b[:5]]) for b in batches]))
    check({"a": jbn.recalibrate(views, None, FRESH["a"], batches)}, {"a": (mean, var)})


@pytest.mark.parametrize("upstream", ["batch", "recalibrated"])
def test_sharded_batches_under_jit(upstream):
    devices = mesh((8,))
    batches = [jax.device_put(part, NamedSharding(devices, P("data"))) for part in cut(rows(), 16, 32)]
    state = FRESH if upstream == "batch" else jax.device_put(FRESH, NamedSharding(devices, P()))
    got = jbn.recalibrate(jax.jit(apply), PARAMS, state, batches, upstream=upstream)
    check(got, wanted(list(map(np.asarray, batches)), upstream))
    assert got["a"].mean.committed == state["a"].mean.committed
    assert got["b"].var.sharding == state["b"].var.sharding


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_of_unequal_counts_in_shard_map(check_vma):
    x, mask = rows(), np.random.default_rng(3).random((ROWS, 1)) < 0.6
    mask[:3] = False

    def of_shard(params, state, x, mask):
        return two_layers(params, state, x, mask, axis_name="data")

    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P(), "check_vma": check_vma}
    sharded = jax.shard_map(of_shard, mesh=mesh((8,)), **specs)
    batches = list(zip(cut(x, 16, 32), cut(mask, 16, 32), strict=True))
    check(
        jbn.recalibrate(lambda params, state, batch: sharded(params, state, *batch), PARAMS, FRESH, batches),
        wanted(batches),
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_state_with_sharded_features(kind):
    x, m = np.concatenate([rows(1e4)] * 2, 1)[:, :8], mesh((4, 2), ("data", "model"), kind)
    with jax.set_mesh(m):
        state = jax.device_put(jbn.bn_init(8)[1], NamedSharding(m, P("model")))
        batches = [jax.device_put(part, NamedSharding(m, P("data"))) for part in cut(x, 16, 24)]
        got = jbn.recalibrate(lambda _, s, x: jbn.bn_forward(None, s, x, True)[1], None, state, batches)
    assert got.mean.sharding == state.mean.sharding
    check({"a": got}, {"a": oracle.moments(x)[1:]})


def test_groups_are_merged():
    x = rows(1e4)
    got = jbn.recalibrate(
        lambda _, s, x: jbn.bn_forward(None, s, x, True, group_size=4)[1], None, FRESH["a"], cut(x, 16)
    )
    check({"a": got}, {"a": oracle.moments(x)[1:]})


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _=None):
        h = nn.Dense(C, use_bias=False)(h)
        return jbn.linen.BatchNorm(use_running_average=False, epsilon=EPSILON, activation=nn.silu)(h), None


class Deep(nn.Module):
    wrap: str

    @nn.compact
    def __call__(self, x):
        if self.wrap == "scan":
            lifted = nn.scan(
                Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
            )
            return lifted()(x)[0]
        block = {"remat": nn.remat(Block), "jit": nn.jit(Block)}[self.wrap]
        for _ in range(3):
            x, _ = block()(x)
        return x


@pytest.mark.parametrize(
    ("wrap", "upstream"), [("remat", "batch"), ("jit", "recalibrated"), ("scan", "batch"), ("scan", "recalibrated")]
)
def test_linen(wrap, upstream):
    model, batches = Deep(wrap), cut(rows(), *UNEVEN)
    variables = model.init(jax.random.key(0), batches[0])
    params, stats = variables["params"], variables["batch_stats"]

    def run(params, stats, x):
        return model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])[1]["batch_stats"]

    got = jbn.recalibrate(run, params, stats, batches, upstream=upstream)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, stats)
    kernels, found = in_order(params, wrap), in_order(got, wrap)
    deep(batches, [k["Dense_0"]["kernel"] for k in kernels], [s["BatchNorm_0"] for s in found], upstream)


def in_order(tree, wrap):
    if wrap == "scan":
        (block,) = tree.values()
        return [jax.tree.map(lambda leaf, i=i: leaf[i], block) for i in range(3)]
    return [tree[name] for name in sorted(tree)]


def deep(batches, kernels, found, upstream):
    """Check three times dense, norm, silu against float64."""
    parts = list(map(oracle.wide, batches))
    for kernel, state in zip(kernels, found, strict=True):
        parts = [part @ oracle.wide(kernel) for part in parts]
        want = oracle.moments(np.concatenate(parts))[1:]
        check({"a": state}, {"a": want})
        stats = want if upstream == "recalibrated" else None
        parts = [oracle.forward(p, epsilon=EPSILON, activation=jax.nn.silu, stats=stats).y for p in parts]


@pytest.mark.parametrize("upstream", ["batch", "recalibrated"])
def test_nnx(upstream):
    rngs = nnx.Rngs(0)
    model = nnx.List()
    for _ in range(3):
        model.append(nnx.Linear(C, C, use_bias=False, rngs=rngs))
        model.append(jbn.nnx.BatchNorm(C, epsilon=EPSILON, activation=nnx.silu, rngs=rngs))
    network, batches = nnx.Sequential(*model), cut(rows(), *UNEVEN)
    graph, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def run(params, stats, x):
        model = nnx.merge(graph, params, stats)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    got = jbn.recalibrate(run, params, stats, batches, upstream=upstream)
    assert jax.tree.structure(got) == jax.tree.structure(stats)
    nnx.update(network, got)
    norms = [{"mean": norm.mean[...], "var": norm.var[...]} for norm in network.layers[1::2]]
    deep(batches, [dense.kernel[...] for dense in network.layers[::2]], norms, upstream)


def test_what_is_no_statistic_comes_back_and_dtypes_stay():
    state = {"a": FRESH["a"]._replace(var=jnp.ones(C, jnp.bfloat16)), "steps": jnp.int32(3), "mean": jnp.ones(2)}

    def one(params, state, x):
        return state | {"a": jbn.bn_forward(None, state["a"], x, True)[1], "steps": state["steps"] + 1}

    got = jbn.recalibrate(one, None, state, [rows()])
    assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(lambda v: (v.shape, v.dtype), state)
    assert got["steps"] == 3
    np.testing.assert_allclose(got["a"].var.astype(np.float32), rows().var(0), rtol=2**-8)


def test_float64(x64):
    x = rows(1e4).astype(np.float64)
    got = jbn.recalibrate(
        lambda p, s, x: jbn.bn_forward(p, s, x, True)[1], None, jbn.State(np.zeros(C), np.ones(C)), [x]
    )
    assert got.var.dtype == np.float64
    np.testing.assert_allclose(got.var, x.var(0), rtol=1e-11)


def test_apply_traced_before_answers_anew():
    compiled, batches = jax.jit(apply), cut(rows(), 20)
    plain = compiled(PARAMS, FRESH, batches[0])
    check(jbn.recalibrate(compiled, PARAMS, FRESH, batches), wanted(batches))
    np.testing.assert_array_equal(compiled(PARAMS, FRESH, batches[0])["b"].var, plain["b"].var)


def test_one_trace_for_each_shape_of_a_batch():
    traced = []

    def counting(params, state, x):
        traced.append(x.shape)
        return apply(params, state, x)

    batches = cut(rows(), 16, 32)
    for _ in range(2):
        jbn.recalibrate(counting, PARAMS, FRESH, batches)
    assert traced == [(16, C), (8, C)]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda torch: {"x": torch.ones(4, C)}, r"batch/x is of type torch.Tensor; .* tensor.numpy\(\)"),
        (lambda torch: "text", "batch is of type builtins.str; expected an array of NumPy or jax"),
    ],
)
def test_a_batch_that_jax_does_not_take_is_named(batch, message):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=message):
        jbn.recalibrate(apply, PARAMS, FRESH, [batch(torch)])


def test_rows_beyond_the_integers_of_float32_are_observed():
    layer, zero = Layer((), 0, 1), jnp.zeros(1)
    seen = Observation(zero, zero + 2**24, zero, zero, zero, zero, jnp.zeros(1, jnp.int32))
    for _ in range(3):
        seen = seen.add(jbn.moments(jnp.ones((1, 1))))
    assert Survey([layer], [], None).merge([{layer: seen}])[layer].count == 2**24 + 3


def test_progress():
    told = []
    batches = cut(rows(), *UNEVEN)
    jbn.recalibrate(apply, PARAMS, FRESH, iter(batches), progress=lambda *now: told.append(now))
    assert told == [(1, 1), (1, 2), (1, 3), (1, 4)]
    told.clear()
    jbn.recalibrate(apply, PARAMS, FRESH, batches, upstream="recalibrated", progress=lambda *now: told.append(now))
    assert told[-1] == (3, 4)  # two layers, and one pass that sees that nothing moves
