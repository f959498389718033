"""Figures of a diagnosis against float64; masks, shards, scans; refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn import diagnose
from tests.observing.test_diagnose import (
    ALL,
    EPSILON,
    FRESH,
    HEAD,
    PARAMS,
    STATE,
    STEM,
    UPDATED,
    C,
    apply,
    changed,
    dense,
    forward,
    found,
    mixed,
    put,
    rows,
    scaled,
)
from tests.support import oracle
from tests.support.shards import mesh

# What a mean or a deviation may be off by, in deviations: z is up to ten of them.
OFF = oracle.tolerance(np.float32, 64, 10)


def test_figures_are_those_of_float64():
    x, params = rows(64, 3), changed(PARAMS, "stem/norm/scale", lambda scale: np.arange(1, C + 1, dtype=np.float32))
    layer = diagnose(apply, params, STATE, x).layers[0]
    z = x.astype(np.float64) @ params["stem"]["w"].astype(np.float64)
    state, scale = STATE["stem"]["norm"], params["stem"]["norm"]["scale"]
    count, mean, var = oracle.moments(z)
    known = [oracle.wide(state[name]) for name in ("mean", "var")]
    np.testing.assert_array_equal(layer.count, count)
    np.testing.assert_allclose([layer.running_mean, layer.running_var], known, rtol=0)
    np.testing.assert_allclose([layer.batch_mean, layer.batch_var], [mean, var], rtol=OFF)
    np.testing.assert_allclose(layer.ratio, np.abs(mean) / np.sqrt(var), rtol=OFF)
    np.testing.assert_allclose(layer.z_mean, (mean - known[0]) / np.sqrt(var / 64), atol=8 * OFF)
    np.testing.assert_allclose(layer.z_var, np.log(var / known[1]) * np.sqrt(63 / 2), atol=8 * OFF)
    y = [oracle.forward(z, scale, epsilon=EPSILON, stats=stats).y for stats in (None, known)]
    gap = np.sqrt(((y[1] - y[0]) ** 2).mean(0)) / np.sqrt((scale.astype(np.float64) ** 2).mean())
    np.testing.assert_allclose(layer.gap, gap, atol=OFF)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_share_of_the_prior(share):
    x = rows(2048, 9)
    state = STATE | {"stem": mixed(share)}
    layer = diagnose(apply, PARAMS, state, x).layers[0]
    np.testing.assert_allclose(layer.prior, share, atol=OFF)
    np.testing.assert_allclose(layer.gap_beyond_prior, 0, atol=8 * OFF)
    np.testing.assert_allclose(layer.gap_by_prior, layer.gap, atol=8 * OFF)
    told = diagnose(apply, PARAMS, state, x, momentum=0.9, updates=3).layers
    assert [layer.prior for layer in told] == [0.9**3] * 2


def test_nothing_tells_the_share_of_a_prior_that_is_like_the_batch():
    x = np.random.default_rng(0).standard_normal((256, C)).astype(np.float32)
    diagnosis = diagnose(lambda _, state, x: jbn.bn_forward(None, state, x, True)[1], None, jbn.bn_init(C)[1], x)
    assert np.isnan(diagnosis.layers[0].prior)
    assert diagnosis.findings == ()


def test_a_share_that_is_told_is_not_fitted():
    state = STATE | {"stem": mixed(0.9**UPDATED)}
    (finding,) = diagnose(apply, PARAMS, state, rows(64), momentum=0.9, updates=UPDATED).findings
    assert "as if 35% of them were still the initial" in finding.message
    (finding,) = diagnose(apply, PARAMS, state, rows(64), momentum=0.9, updates=10**6).findings
    assert finding.kind == "stale"


@pytest.mark.parametrize("channel", ALL)
def test_what_the_prior_does_not_explain_is_a_finding_beside_it(channel):
    state = changed(STATE | {"stem": mixed(0.5)}, "stem/norm/mean", put(channel, 30.0))
    prior, stale = diagnose(apply, PARAMS, state, rows(2048, 9)).findings
    assert (prior.kind, prior.channels) == ("prior", ALL)
    assert "as if 50% of them were still the initial" in prior.message
    assert (stale.kind, stale.channels) == ("stale", (channel,))


def test_layers_are_in_the_order_of_the_data():
    assert [layer.path for layer in diagnose(apply, PARAMS, STATE, rows(32)).layers] == [STEM, HEAD]


def test_values_of_one_example_are_not_independent():
    def conv(_, state, batch):
        return jbn.bn_forward(None, state, batch["x"], True, mask=batch["mask"])[1]

    x = np.random.default_rng(0).standard_normal((20, 4, 4, C)).astype(np.float32)
    mask = np.arange(4)[:, None, None] < np.arange(20)[:, None, None, None] % 5
    for batch in ({"x": x, "mask": mask, "weights": np.ones(3)}, {"x": x, "mask": mask[1:2], "key": np.ones(2)}):
        (layer,) = diagnose(conv, None, jbn.bn_init(C)[1], batch).layers
        assert set(layer.count) == {np.broadcast_to(batch["mask"], (20, 4, 4, 1)).sum()}
        assert set(layer.independent) == {20}


def test_what_varied_before_is_not_removed():
    params, state = changed(PARAMS, "head/w", scaled([4], 0)), STATE
    (finding,) = (f for f in diagnose(apply, params, state, rows(32)).findings if f.kind == "dead")
    assert finding.message.endswith("by the running variance it varied before.")
    state = jbn.recalibrate(apply, params, STATE, [rows(2048, 9)])
    (finding,) = diagnose(apply, params, state, rows(32)).findings
    assert finding.message.endswith("the channel can be removed.")
    assert repr(diagnose(apply, params, state, rows(32))) == finding.message


@pytest.mark.parametrize("told", [{"momentum": 0.9, "updates": 10}, {}], ids=["told", "fitted"])
def test_what_is_left_of_the_initial_variance_is_no_variation(told):
    params, state = changed(PARAMS, "head/w", scaled([4], 0)), FRESH
    for step in range(10):
        state = apply(params, state, rows(256, step))
    dead = [f.message for f in diagnose(apply, params, state, rows(256), **told).findings if f.kind == "dead"]
    assert [message.endswith("the channel can be removed.") for message in dead] == [True]
    state = changed(state, "head/norm/var", scaled([4], 1.5))
    dead = [f.message for f in diagnose(apply, params, state, rows(256), **told).findings if f.kind == "dead"]
    assert [message.endswith("by the running variance it varied before.") for message in dead] == [True]


def test_a_layer_that_saw_nothing_but_constants_has_not_varied():
    def norm(_, state, x):
        return jbn.bn_forward(None, state, x, True)[1]

    (finding,) = diagnose(norm, None, norm(None, jbn.bn_init(C)[1], np.ones((32, C))), np.ones((32, C))).findings
    assert finding.message.endswith("the channel can be removed.")
    zeros = np.zeros((32, C))  # of which the mean does not tell what is left of the initial 0
    for var, told, end in (
        (1.0, {}, "diagnose with momentum and updates."),
        (5.0, {}, "it varied before."),
        (0.5, {"momentum": 0.5, "updates": 1}, "the channel can be removed."),
        (0.5, {"momentum": 0.5, "updates": 3}, "it varied before."),
    ):
        (finding,) = diagnose(norm, None, jbn.State(np.zeros(C), np.full(C, var)), zeros, **told).findings
        assert finding.message.endswith(end)


def test_epsilon_is_that_of_the_layers():
    params = changed(PARAMS, "head/w", scaled([2], 5e-4))
    state = jbn.recalibrate(apply, params, STATE, [rows(2048, 9)])
    assert found(diagnose(apply, params, state, rows(32), epsilon=1e-12)) == []


def test_a_scale_of_zero_has_no_gap():
    state = changed(STATE, "stem/norm/mean", put(2, 30.0))
    params = changed(PARAMS, "stem/norm/scale", put(2, 0))
    assert found(diagnose(apply, params, state, rows(32))) == []


def test_the_first_layer_that_is_not_finite_names_the_input():
    batch = {"image": rows(32), "label": np.arange(32)}
    batch["image"][4, 1] = np.inf
    (finding,) = diagnose(lambda p, s, batch: apply(p, s, batch["image"]), PARAMS, STATE, batch).findings
    assert "and so in 1 layer beside it" in finding.message
    assert "values of batch/image" in finding.message
    (finding,) = diagnose(apply, changed(PARAMS, "head/w", scaled([1], 1e38)), STATE, rows(32)).findings
    assert "beside it" not in finding.message
    assert "overflowed" in finding.message


def test_layers_that_wait_for_each_other_are_all_named_where_they_are_not_finite():
    def twice(params, state, x):
        for _ in range(2):
            x, state = forward(params, state, x, True)
        return state

    assert found(diagnose(twice, PARAMS, STATE, put(3, np.nan)(rows(32)))) == [
        (HEAD, "non-finite", ALL),
        (STEM, "non-finite", ALL),
    ]


# Few values, masks, shards, scans


def test_few_values():
    diagnosis = diagnose(apply, PARAMS, STATE, rows(15))
    assert found(diagnosis) == [(STEM, "few values", ALL), (HEAD, "few values", ALL)]
    assert "only 15 values per channel" in str(diagnosis)


def test_masked_rows_count_nothing():
    mask = np.random.default_rng(2).random((64, 1)) < 0.6
    x = np.where(mask, rows(64), np.nan).astype(np.float32)
    diagnosis = diagnose(apply, PARAMS, STATE, (x, mask))
    assert found(diagnosis) == []
    assert {int(n) for layer in diagnosis.layers for n in layer.count} == {mask.sum()}


@pytest.mark.parametrize("valid", [0, 1])
def test_hardly_a_valid_row(valid):
    mask = np.arange(32)[:, None] < valid
    assert [kind for _, kind, _ in found(diagnose(apply, PARAMS, STATE, (rows(32), mask)))] == ["few values"] * 2


def test_a_batch_over_devices_under_jit():
    x = jax.device_put(rows(64), NamedSharding(mesh((8,)), P("data")))
    same(diagnose(jax.jit(apply), PARAMS, STATE, x), diagnose(apply, PARAMS, STATE, rows(64)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_batch_over_devices_in_shard_map(check_vma):
    mask = np.random.default_rng(2).random((64, 1)) < 0.6

    def of_shard(params, state, x, mask):
        return forward(params, state, x, True, mask, axis_name="data")[1]

    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P(), "check_vma": check_vma}
    sharded = jax.shard_map(of_shard, mesh=mesh((8,)), **specs)
    got = diagnose(lambda params, state, batch: sharded(params, state, *batch), PARAMS, STATE, (rows(64), mask))
    same(got, diagnose(apply, PARAMS, STATE, (rows(64), mask)))


def same(got, want):
    assert found(got) == found(want) == []
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        assert ours.path == theirs.path
        np.testing.assert_array_equal(ours.count, theirs.count)
        np.testing.assert_allclose(ours.z_mean, theirs.z_mean, atol=8 * OFF)
        np.testing.assert_allclose(ours.batch_var, theirs.batch_var, rtol=OFF)


def test_layers_in_a_scan():
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *(dense(seed) for seed in (1, 2, 3)))
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), FRESH["stem"])

    def stacked(params, state, x):
        def body(h, layer):
            params, state = layer
            z = h @ params["w"]
            return jbn.bn_forward(params["norm"], state["norm"], z, True, activation=jax.nn.relu)

        _, new = jax.lax.scan(body, x, (params, state))
        return {"norm": new}

    state = jbn.recalibrate(stacked, params, state, [rows(2048, 9)])
    assert found(diagnose(stacked, params, state, rows(64))) == []
    given = state["norm"]["mean"]
    state["norm"]["mean"] = given.at[2, 1].add(30)
    assert found(diagnose(stacked, params, state, rows(64))) == [("norm", "stale", ((2, 1),))]
    state["norm"]["mean"] = given.at[2].add(0.8 * jnp.sqrt(state["norm"]["var"][2]))
    every = tuple((2, channel) for channel in ALL)
    assert found(diagnose(stacked, params, state, rows(2048, 9))) == [("norm", "stale", every)]
    params["w"][1, :, 3] = 0
    state = jbn.recalibrate(stacked, params, state, [rows(2048, 9)])
    assert found(diagnose(stacked, params, state, rows(64))) == [("norm", "dead", ((1, 3),))]


def test_one_trace_for_each_shape_of_a_batch():
    traced = []

    def counting(params, state, x):
        traced.append(x.shape)
        return apply(params, state, x)

    for _ in range(2):
        diagnose(counting, PARAMS, STATE, rows(32))
    assert traced == [(32, C)]


def test_nothing_that_was_given_changes():
    given = jax.tree.map(np.array, (PARAMS, STATE))
    diagnose(apply, PARAMS, STATE, rows(32))
    jax.tree.map(np.testing.assert_array_equal, given, (PARAMS, STATE))


# Refusals


def by_flax(params, state, x):
    norm = nn.BatchNorm(use_running_average=False)
    new = {}
    for name in ("stem", "head"):
        given = {"params": params[name]["norm"], "batch_stats": state[name]["norm"]}
        new[name] = {"norm": norm.apply(given, x, mutable=["batch_stats"])[1]["batch_stats"]}
    return new


def frozen(params, state, x):
    return forward(params, state, x, False)[1]


REFUSED = {
    "layers of Flax": (by_flax, {}, ValueError, r"^\w+/norm, \w+/norm gave no moments.*jbn.linen.replace\(\)"),
    "frozen layers": (frozen, {}, ValueError, "^head/norm, stem/norm gave no moments: in this call they evaluate"),
    "y too": (lambda p, s, x: (x, s), {}, ValueError, "expected the new state"),
    "no function": (3, {}, TypeError, "apply is of type int"),
    "an epsilon below 0": (apply, {"epsilon": -1e-5}, ValueError, "epsilon is -1e-05; expected 0 or more"),
    "momentum alone": (apply, {"momentum": 0.9}, ValueError, "momentum is given without updates; expected both"),
    "updates alone": (apply, {"updates": 3}, ValueError, "updates is given without momentum; expected both"),
    "momentum": (apply, {"momentum": 1.5, "updates": 3}, ValueError, "momentum is 1.5; expected 0 to 1"),
    "updates": (apply, {"momentum": 0.9, "updates": -1}, ValueError, "updates is -1; expected how often"),
    "half an update": (apply, {"momentum": 0.9, "updates": 0.5}, TypeError, "updates is 0.5; expected .* whole number"),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refusals(refused):
    function, options, kind, message = refused
    with pytest.raises(kind, match=message), jax.numpy_rank_promotion("allow"):
        diagnose(function, PARAMS, STATE, rows(32), **options)


def test_a_state_without_statistics():
    with pytest.raises(ValueError, match="state holds stem/w; expected statistics"):
        diagnose(apply, PARAMS, {"stem": {"w": np.ones(3)}}, rows(32))
