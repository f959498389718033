"""Layers that evaluate, are not reached or are not jbn's: named once, beside the full report on the others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn import diagnose, recalibrate
from tests.observing.test_recalibrate import FRESH, PARAMS, C, W, check, cut, rows
from tests.support import oracle

NAMES = ("d", "b", "c", "a")  # in the order of the data
KNOWN = jbn.State(np.linspace(1, 2, C, dtype=np.float32), np.linspace(2, 3, C, dtype=np.float32))
STATE = {name: KNOWN for name in NAMES}
UNEVEN = (16, 32, 37)


def chain(idle=(), *, foreign=None, unreached=()):
    """Return an ``apply`` of four layers, some of which evaluate, are another's, or are left out."""

    def apply(params, state, x):
        new = dict(state)
        for name in NAMES:
            if name in unreached:
                continue
            if name == foreign:
                x, new[name] = by_flax(state[name], x)
            else:
                x, new[name] = jbn.bn_forward(None, state[name], x, name not in idle, activation=jax.nn.silu)
            x = x @ params["w"]
        return new

    return apply


def by_flax(state, x):
    norm = nn.BatchNorm(False, use_bias=False, use_scale=False)
    y, new = norm.apply({"batch_stats": state._asdict()}, x, mutable=["batch_stats"])
    return jax.nn.silu(y), jbn.State(**new["batch_stats"])


def wanted(batches, idle=()):
    """Return mean and var of what every layer sees, in float64, from all rows at once."""
    found, parts = {}, batches
    for name in NAMES:
        found[name] = oracle.moments(np.concatenate(parts))[1:]
        stats = tuple(map(oracle.wide, KNOWN)) if name in idle else None
        parts = [oracle.forward(x, activation=jax.nn.silu, stats=stats).y @ W.astype(np.float64) for x in parts]
    return found


def by_path(diagnosis):
    return {layer.path: layer for layer in diagnosis.layers}


def check_seen(diagnosis, want):
    layers = by_path(diagnosis)
    check({path: jbn.State(layers[path].batch_mean, layers[path].batch_var) for path in want}, want)


def test_layers_that_evaluate_are_one_finding_beside_the_figures_of_the_others():
    idle = ("d", "c")
    diagnosis = diagnose(chain(idle), PARAMS, STATE, rows())
    first, *others = diagnosis.findings
    assert (first.path, first.kind, first.channels, first.layers) == ("", "evaluates", (), ("c", "d"))
    assert str(diagnosis).startswith("2 of 4 layers evaluate in a training call, or it does not reach them: ")
    assert "c, d. Is the flag" in first.message
    assert {finding.path for finding in others} == {"a", "b"}
    assert [layer.path for layer in diagnosis.layers] == list(NAMES)
    want = wanted([rows()], idle)
    check_seen(diagnosis, {name: want[name] for name in ("a", "b")})
    for name in idle:
        layer = by_path(diagnosis)[name]
        assert not layer.count.any()
        assert np.isnan([layer.batch_mean, layer.gap, layer.z_var, layer.ratio]).all()
        np.testing.assert_array_equal(layer.running_var, KNOWN.var)


def test_what_a_layer_that_evaluates_remembers_is_judged_and_blamed():
    broken = KNOWN._replace(var=np.where(np.arange(C) == 2, np.nan, KNOWN.var).astype(np.float32))
    findings = diagnose(chain(("b",)), PARAMS, STATE | {"b": broken}, rows()).findings
    assert [(f.path, f.kind) for f in findings[:2]] == [("", "evaluates"), ("c", "non-finite")]
    assert "running statistics that are NaN, inf or negative: b." in findings[1].message
    assert ("b", "non-finite", (2,)) in [(f.path, f.kind, f.channels) for f in findings]


def test_a_layer_that_is_not_reached_does_not_matter_whatever_it_holds():
    lost = jbn.State(*(np.full(C, np.nan, np.float32) for _ in KNOWN))
    state, batches = STATE | {"b": lost}, cut(rows(), *UNEVEN)
    passes = []
    with pytest.warns(UserWarning, match=r"^1 of 4 layers keep their statistics.*: b\. If"):
        got = recalibrate(chain(unreached=("b",)), PARAMS, state, batches)
    with pytest.warns(UserWarning, match="keep their statistics"):
        recalibrate(
            chain(unreached=("b",)), PARAMS, got, batches, upstream="recalibrated",
            progress=lambda number, done: passes.append(number),
        )  # fmt: skip
    assert max(passes) < len(NAMES) + 1  # it ended because statistics had settled
    assert np.isnan([got["b"].mean, got["b"].var]).all()
    assert diagnose(chain(unreached=("b",)), PARAMS, state, rows()).findings[0].layers == ("b",)


@pytest.mark.parametrize("upstream", ["batch", "recalibrated"])
def test_recalibration_keeps_layers_that_evaluate_and_names_them(upstream):
    idle, batches = ("d", "c"), cut(rows(), *UNEVEN)
    with pytest.warns(UserWarning, match=r"^2 of 4 layers keep.*: c, d\. If they are not frozen on purpose") as caught:
        got = recalibrate(chain(idle), PARAMS, STATE, batches, upstream=upstream)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(got[name].mean is KNOWN.mean and got[name].var is KNOWN.var for name in idle)
    want = wanted(batches, idle)
    check(got, {"b": want["b"]})
    if upstream == "batch":
        check(got, {"a": want["a"]})


def test_a_layer_that_evaluates_in_some_batches_is_recalibrated_from_the_others():
    batches = cut(rows(), 16, 32)

    def some(params, state, x):
        return chain(("a",) if len(x) == len(batches[2]) else ())(params, state, x)

    check(recalibrate(some, PARAMS, STATE, batches), {"a": wanted(batches[:2])["a"]})


@pytest.mark.parametrize("idle", [("d", "a"), ("b",), ()])
def test_a_layer_of_foreign_code_is_named_and_the_others_are_seen(idle):
    """It runs on its plain statistics: what comes after it is what it makes of them."""
    with jax.numpy_rank_promotion("allow"):
        diagnosis = diagnose(chain(idle, foreign="c"), PARAMS, STATE, rows())
        with pytest.raises(ValueError, match=r"^c gave no moments.*also=\(Class,\)"):
            recalibrate(chain(idle, foreign="c"), PARAMS, STATE, [rows()])
    kinds = {finding.kind: finding for finding in diagnosis.findings}
    assert kinds["foreign"].layers == ("c",)
    assert kinds["foreign"].message.startswith("1 of 4 layers are not jbn's")
    assert "also=(Class,)" in kinds["foreign"].message
    assert kinds["evaluates"].layers == tuple(sorted(idle)) if idle else "evaluates" not in kinds
    want = wanted([rows()], idle)
    check_seen(diagnosis, {name: want[name] for name in NAMES if name not in ("c", *idle)})
    assert not by_path(diagnosis)["c"].count.any()


def test_foreign_layers_that_raise_and_that_do_not_are_all_found():
    def apply(params, state, x):
        return chain(foreign="b")(params, state, x) | {"a": FRESH["a"]}

    with jax.numpy_rank_promotion("allow"):
        diagnosis = diagnose(apply, PARAMS, STATE, rows())
    assert diagnosis.findings[0].layers == ("a", "b")
    want = wanted([rows()])
    check_seen(diagnosis, {name: want[name] for name in ("d", "c")})


def test_only_a_model_of_which_nothing_is_seen_is_refused():
    with jax.numpy_rank_promotion("allow"):
        for tool, batch in ((diagnose, rows()), (recalibrate, [rows()])):
            with pytest.raises(ValueError, match=r"^a, b, c, d gave no moments: in this call they evaluate"):
                tool(chain(NAMES), PARAMS, STATE, batch)
        with pytest.raises(ValueError, match=r"^a, b, d gave no moments: in this call .* c gave no moments; expected"):
            diagnose(chain(("a", "b", "d"), foreign="c"), PARAMS, STATE, rows())


def test_few_traces_find_a_foreign_layer_among_many():
    traced, names = [], [f"n{i:02}" for i in range(32)]

    def apply(params, state, x):
        traced.append(len(x))
        new = {name: jbn.bn_forward(None, state[name], x, True)[1] for name in names}
        return new | {"n13": by_flax(state["n13"], x)[1]}

    with jax.numpy_rank_promotion("allow"):
        assert diagnose(apply, None, {name: KNOWN for name in names}, rows()).findings[0].layers == ("n13",)
    assert len(traced) <= 2 * 5 + 4  # halves of 32, and the calls themselves


def test_of_a_stack_some_layers_may_evaluate():
    """Of layers that ``scan`` runs, the first is frozen; all have one state."""
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), KNOWN)

    def apply(params, state, x):
        def layer(x, given):
            state, frozen = given

            def run(train):
                return lambda: jbn.bn_forward(None, state, x, train)

            return jax.lax.cond(frozen, run(False), run(True))

        return jax.lax.scan(layer, x, (state, jnp.array([True, False])))[1]

    with pytest.warns(UserWarning, match="^1 of 1 layer keep"):
        got = recalibrate(apply, None, stack, cut(rows(), 16))
    np.testing.assert_array_equal(got.mean[0], KNOWN.mean)
    evaluated = oracle.forward(rows(), stats=tuple(map(oracle.wide, KNOWN))).y
    check({"a": jax.tree.map(lambda leaf: leaf[1], got)}, {"a": oracle.moments(evaluated)[1:]})
