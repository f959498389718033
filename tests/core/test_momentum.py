"""How the state moves: by a number, or by a function of how often it moved before."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests.support import oracle
from tests.support.shards import mesh

pytestmark = pytest.mark.core

STEPS = 12
X = (np.random.default_rng(0).standard_normal((STEPS, 10, 3)) * [1, 2, 3] + [4, 5, 6]).astype(np.float32)
X += np.arange(STEPS, dtype=np.float32)[:, None, None]  # the batches lie apart
STATE = jbn.bn_init(3, counted=True)[1]
LAST = np.iinfo(np.int32).max
M = 0.9


def schedule(count):
    return 0.5 + 0.4 * jnp.minimum(count, 10) / 10


def averages(kind, unbiased=False):
    """Return the mean and the variance after all batches, in float64, by definition of the average."""
    count, *batches = zip(*map(oracle.moments, X), strict=True)
    if unbiased:
        batches[1] = [var * n[0] / (n[0] - 1) for var, n in zip(batches[1], count, strict=True)]
    if kind == "cumulative":
        return [np.mean(values, axis=0) for values in batches]
    first = (np.zeros(3), np.ones(3)) if kind == "schedule" else np.zeros((2, 3))
    found = []
    for values, average in zip(batches, first, strict=True):
        for n, value in enumerate(values):
            m = 0.5 + 0.4 * min(n, 10) / 10 if kind == "schedule" else M
            average = m * average + (1 - m) * value
        found.append(average / (1 - M**STEPS) if kind == "debiased" else average)
    return found


KINDS = {"cumulative": jbn.cumulative, "debiased": jbn.debiased(M), "schedule": schedule}


def near(state, want, steps=STEPS):
    assert int(state["count"] if isinstance(state, dict) else state.count) == steps
    for name, value in zip(("mean", "var"), want, strict=True):
        found = state[name] if isinstance(state, dict) else getattr(state, name)
        bound = oracle.tolerance(found.dtype, X.shape[1], np.abs(value).max())
        assert np.abs(oracle.wide(found) - value).max() <= bound, name


def advance(state, x, **options):
    return jbn.bn_forward(None, state, x, True, **options)[1]


def by_update(state, x, **options):
    return jbn.update(state, jbn.moments(x), **options)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("way", ["eager", "jit", "scan", "update"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_average_that_the_function_says(kind, way, unbiased):
    options = {"momentum": KINDS[kind], "unbiased": unbiased}
    state = STATE
    if way == "scan":
        state, _ = jax.lax.scan(lambda s, x: (advance(s, x, **options), None), state, X)
    else:
        call = by_update if way == "update" else advance
        step = (lambda s, x: call(s, x, **options)) if way == "eager" else jax.jit(lambda s, x: call(s, x, **options))
        for x in X:
            state = step(state, x)
        assert way == "eager" or step._cache_size() == 1
    near(state, averages(kind, unbiased))


def test_float64_has_all_its_digits():
    with jax.enable_x64(True):
        for kind, momentum in KINDS.items():
            state = jbn.bn_init(3, counted=True, dtype=float)[1]
            for x in X:
                state = advance(state, x.astype(float), momentum=momentum)
            assert state.count.dtype == jnp.int32
            near(state, averages(kind))


def test_cumulative_is_the_average_of_pytorch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(3, momentum=None)
    state = STATE
    for x in X:
        theirs(torch.from_numpy(x))
        state = advance(state, x, momentum=jbn.cumulative, unbiased=True)
    near(state, (theirs.running_mean.numpy(), theirs.running_var.numpy()), int(theirs.num_batches_tracked))


@pytest.mark.parametrize("m", [0.0, 1e-300, 0.5, 0.99, 1 - 1e-7])
def test_the_functions_are_precise_for_any_count(m):
    for n in (0, 1, 2, 10, 1000, 2**24, 2**31 - 2, LAST):
        for f, want in ((jbn.cumulative, n / (n + 1)), (jbn.debiased(m), m * -np.expm1(n * np.log(m or 1e-300)))):
            if f is not jbn.cumulative:
                want = want / -np.expm1((n + 1) * np.log(m or 1e-300))
            got = float(jax.jit(f)(np.int32(n)))
            assert abs(got - want) <= 4 * oracle.ULP["float32"], (f, n)
            assert n or got == 0  # the first value is taken as it is


@pytest.mark.parametrize("kind", [dict, types.MappingProxyType, jbn.CountedState._make])
def test_a_count_is_kept_by_any_momentum_and_any_type(kind):
    arrays = STATE._replace(count=np.int32(7))._asdict()
    state = kind(arrays.values()) if kind == jbn.CountedState._make else kind(arrays)
    for momentum in (0.9, jbn.cumulative):
        new = advance(state, X[0], momentum=momentum)
        assert type(new) is type(state)
        values = new._asdict() if isinstance(new, jbn.CountedState) else dict(new)
        assert (int(values["count"]), values["count"].dtype) == (8, np.int32)
    plain = advance(jbn.State(STATE.mean, STATE.var), X[0], momentum=0.9)
    np.testing.assert_array_equal(plain.mean, advance(STATE, X[0], momentum=0.9).mean)


def test_a_count_ends_at_its_largest():
    full = STATE._replace(count=jnp.int32(LAST))
    assert int(advance(full, X[0], momentum=jbn.debiased(M)).count) == LAST
    for call in (jbn.merge_states, jax.jit(jbn.merge_states)):
        assert int(call([full, STATE._replace(count=jnp.int32(3))], [1, 1]).count) == LAST


def test_nothing_is_counted_where_nothing_moves():
    """A first batch of NaN must not let the initial 0 and 1 into an average that starts with the next one."""
    options = {"momentum": jbn.cumulative}
    nan = X[0] * np.nan
    still = [
        jbn.bn_forward(None, STATE, X[0], True, update=False, momentum=None)[1],
        jbn.bn_forward(None, STATE, X[0], False, momentum=None)[1],
        jbn.bn_forward(None, STATE, X[0, :1], False, update=True, **options)[1],
        advance(STATE, X[0], mask=np.zeros((10, 1), bool), **options),
        advance(STATE, nan, **options),
        jbn.update(STATE, jbn.Moments.empty(3), **options),
    ]
    for state in still:
        jax.tree.map(np.testing.assert_array_equal, state, STATE)
    first = oracle.moments(X[0])[1:]
    near(advance(advance(STATE, nan, **options), X[0], **options), first, 1)
    one = X[0] * np.float32([np.nan, 1, 1])
    new = advance(advance(STATE, one, **options), X[0], **options)
    assert int(new.count) == 2  # one count for all features: that of NaN has moved once
    np.testing.assert_allclose(new.mean[1:], first[0][1:], rtol=1e-6)
    np.testing.assert_allclose(new.mean[0], first[0][0] / 2, rtol=1e-6)


@pytest.mark.parametrize("way", ["masked", "vmap", "shards", "features", "groups"])
def test_batches_of_all_kinds_are_counted_once(way):
    f = jbn.debiased(M)
    rows, want, mask = X[:8].reshape(-1, 3), None, None
    over = {"mesh": mesh()}
    if way == "masked":
        mask = np.arange(len(rows))[:, None] % 3 > 0
        new = advance(STATE, rows, momentum=f, mask=mask)
    elif way == "vmap":
        new = jax.vmap(lambda x: advance(STATE, x, momentum=f, axis_name="v"), axis_name="v", out_axes=None)(X[:8])
    elif way == "shards":
        step = jax.shard_map(
            lambda x: advance(STATE, x, momentum=f, axis_name="data"), in_specs=P("data"), out_specs=P(), **over
        )
        new = step(rows)
    elif way == "features":  # of which one shard has nothing to move by
        rows = np.concatenate([rows, rows[:, :1] * np.nan], 1)
        specs = jbn.CountedState(P("data"), P("data"), P())
        step = jax.shard_map(
            lambda s, x: advance(s, x, momentum=f), in_specs=(specs, P(None, "data")), out_specs=specs, **over
        )
        new = step(jbn.bn_init(4, counted=True)[1], rows)
        assert (new.mean[3], new.var[3]) == (0, 1)
        new, rows = new._replace(mean=new.mean[:3], var=new.var[:3]), rows[:, :3]
    else:
        new = advance(STATE, rows, momentum=f, group_size=8)
    want = oracle.moments(rows, mask=mask)[1:]
    near(new, want, 1)


def test_a_donated_state_is_reused():
    step = jax.jit(lambda s, x: advance(s, x, momentum=jbn.debiased(M)), donate_argnums=0)
    state = jax.tree.map(jnp.copy, STATE)
    step(state, X[0])
    assert all(leaf.is_deleted() for leaf in state)


def test_equal_functions_are_equal():
    assert jbn.debiased(0.9) == jbn.debiased(np.float64(0.9)) != jbn.debiased(0.99)
    assert hash(jbn.debiased(0.9)) == hash(jbn.debiased(0.9))


def test_schedules_of_optax():
    optax = pytest.importorskip("optax")
    state = advance(STATE._replace(count=jnp.int32(5)), X[0], momentum=optax.linear_schedule(0.5, 0.9, 10))
    np.testing.assert_allclose(state.mean, 0.3 * oracle.moments(X[0])[1], rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
def test_results_that_are_no_momentum_are_refused(traced):
    def call(momentum, count=0):
        state = STATE._replace(count=jnp.int32(count))
        step = lambda state: advance(state, X[0], momentum=momentum)  # noqa: E731
        return jax.jit(step)(state) if traced else step(state)

    for result, words in (
        (1.5, r"momentum returns 1\.5"), (-0.1, r"momentum returns -0\.1"), (np.nan, "momentum returns nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{words}.*expected 0 to 1, the weight of the old value"):
            call(lambda n, result=result: result)
    for result, words in (
        (lambda n: None, "returns None"), (lambda n: n > 3, "dtype bool"), (lambda n: n * jnp.ones(3), r"\(3,\)"),
        (lambda n: n * 1j, "complex64"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"momentum returns.*{words}|momentum {words}"):
            call(result)
    assert call(lambda n: 1 + 1e-7).count == 1  # schedules round
    assert call(lambda n: n * 0).mean[0] == call(0.0).mean[0]  # whole numbers too


def test_a_known_result_says_where_it_came_from():
    with pytest.raises(ValueError, match=r"momentum returns 2 for a count of 2; expected 0 to 1"):
        advance(STATE._replace(count=jnp.int32(2)), X[0], momentum=lambda n: n)


def test_an_error_inside_says_what_was_called():
    with pytest.raises(TypeError, match="positional argument") as caught:
        advance(STATE, X[0], momentum=lambda: 0.9)
    assert "while momentum was called with the number of updates done" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("state", "momentum", "words"),
    [
        (STATE[:2], jbn.cumulative, r"momentum is the function .*counted=True.*jbn\.nnx\.replace"),
        (STATE, None, r"momentum is None.*PyTorch's None, the average over all batches, is jbn\.cumulative"),
        (STATE._replace(count=jnp.zeros(())), 0.9, r"state\.count has shape \(\) and dtype float32.*jax\.lax\.pmean"),
        (STATE._replace(count=jnp.zeros(2, int)), 0.9, r"state\.count has shape \(2,\).*scalar of int32"),
        (STATE._replace(count=3), 0.9, "count is of type int"),
    ],
)
@pytest.mark.parametrize("call", [advance, by_update])
def test_what_does_not_fit_is_refused(call, state, momentum, words):
    given = state if isinstance(state, jbn.CountedState) else jbn.State(*state)
    with pytest.raises((ValueError, TypeError), match=words):
        call(given, X[0], momentum=momentum)


def test_an_average_of_states_evaluates_and_does_not_move():
    """Of models on average, the count is no whole number, and nothing needs it."""
    states = [advance(STATE, x, momentum=jbn.cumulative) for x in X[:2]]
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, *states)
    y, _ = jbn.bn_forward(None, average, X[0], False)
    np.testing.assert_array_equal(y, jbn.bn_forward(None, jbn.State(*average[:2]), X[0], False)[0])
    for call in (advance, by_update):
        with pytest.raises(ValueError, match=r"dtype float32.*averages a whole state.*leave it out"):
            call(average, X[0])


def test_a_momentum_of_debiased_is_a_number_below_one():
    for m in (1.0, -0.1, np.nan, None, "0.9"):
        with pytest.raises(ValueError, match="expected a number from 0 to less than 1"):
            jbn.debiased(m)


def test_updates_of_clients_are_added_up():
    states = [STATE._replace(count=jnp.int32(n)) for n in (3, 4, 100)]
    for call in (jbn.merge_states, jax.jit(jbn.merge_states)):
        merged = call(states, [10, 5, 0])  # nothing of a state of no rows is taken
        assert (int(merged.count), merged.count.dtype) == (7, np.int32)
    trees = [{"bn": state, "steps": {"count": np.int32(1)}} for state in states]
    assert jbn.merge_states(trees, [1, 1, 1])["bn"].count == 107
    trees[0]["steps"]["count"] = np.int32(2)  # beside no statistics it is none of ours
    with pytest.raises(ValueError, match="steps/count differs"):
        jbn.merge_states(trees, [1, 1, 1])
