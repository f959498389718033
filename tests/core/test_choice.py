"""What x is normalized by may be chosen: renorm, mixtures, any function of the moments of the batch and the state."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from tests.support import oracle
from tests.support.cases import CASES, DOORS, Case, data
from tests.support.shards import mesh

pytestmark = pytest.mark.core

CLIPS = (1.3, 0.4)  # some channels of the cases are clipped, some are not


def corrected(case, d, clips=CLIPS, rows=slice(None)):
    """Return r, d, and scale and bias with both, as float64."""
    _, mean, var = oracle.moments(d.x[rows], axis=case.axis, mask=None if d.mask is None else d.mask[rows])
    sigma = np.sqrt(oracle.wide(d.var) + case.epsilon)
    r = np.clip(np.sqrt(var + case.epsilon) / sigma, 1 / clips[0], clips[0])
    shift = np.clip((mean - oracle.wide(d.mean)) / sigma, -clips[1], clips[1])
    if case.affine is not None:
        of_rows = tuple(i for i in range(len(case.shape)) if i not in case.axes)
        r, shift = (np.expand_dims(v, of_rows) for v in (r, shift))
    scale = np.ones_like(r) if d.scale is None else oracle.wide(d.scale)
    return r, shift, scale * r, scale * shift + (0 if d.bias is None else oracle.wide(d.bias))


def near(got, want, dtype, rows, size=1.0):
    size = max(size, float(np.abs(want).max(initial=0)))
    np.testing.assert_allclose(oracle.wide(got), want, rtol=0, atol=oracle.tolerance(dtype, rows, size))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_renorm(case, door):
    d = data(case)
    if door == "nnx" and len(case.axes) > 1:
        pytest.skip("the features of an NNX norm are one axis")
    with jax.enable_x64(case.dtype == "float64"):
        y, new = DOORS[door](case, d, True, normalize_by=jbn.renorm(*CLIPS))
        plain = DOORS[door](case, d, True)[1]
    _, _, scale, bias = corrected(case, d)
    options = {"axis": case.axis, "epsilon": case.epsilon, "mask": d.mask, "residual": d.residual}
    want = oracle.forward(d.x, scale, bias, activation=case.activation, **options)
    near(y, want.y, case.dtype, case.rows, 4)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(new[name], plain[name])  # the state moves as ever


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "float64"], ids=str)
def test_the_gradients_of_renorm_take_r_and_d_for_constants(case):
    d = data(case)
    g = np.asarray(jnp.asarray(data(case, seed=1).x, case.dtype))
    r, shift, scale, bias = corrected(case, d)
    options = {"axis": case.axis, "epsilon": case.epsilon, "mask": d.mask}
    want = oracle.gradients(
        g, d.x, scale, bias, activation=case.activation, residual=d.residual, **options
    )  # by scale·r and bias + scale·d

    def y(x, scale, bias):
        state = jbn.State(d.mean, d.var)
        more = {"activation": case.activation, "residual": d.residual, "normalize_by": jbn.renorm(*CLIPS)}
        return jbn.bn_forward(jbn.Params(scale, bias), state, x, True, **options, **more)[0]

    dx, dscale, dbias = jax.vjp(y, d.x, d.scale, d.bias)[1](jnp.asarray(g, case.dtype))
    var = oracle.moments(d.x, axis=case.axis, mask=d.mask)[2]
    a = np.abs(scale).max() / np.sqrt(var + case.epsilon).min()
    size = float(np.abs(oracle.wide(g)).max())
    near(dx, want["x"], case.dtype, case.rows, a * size)
    for got, exact in ((dscale, r * want["scale"] + shift * want["bias"]), (dbias, want["bias"])):
        if got is not None:  # which r and d may have made more than there are
            shared = tuple(i for i, (n, m) in enumerate(zip(got.shape, exact.shape, strict=True)) if n < m)
            exact = exact.sum(shared, keepdims=True)
            near(got, exact, "float32" if case.dtype == "float32" else case.dtype, case.rows, size * case.rows**0.5 * 4)


@pytest.mark.parametrize("door", DOORS)
def test_renorm_that_allows_nothing_is_plain_to_the_bit(door):
    case = Case((16, 6, 4), activation=jax.nn.relu)
    d = data(case)
    for got, want in zip(
        jax.tree.leaves(DOORS[door](case, d, True, normalize_by=jbn.renorm(1.0, 0.0))),
        jax.tree.leaves(DOORS[door](case, d, True)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("door", DOORS)
def test_renorm_that_allows_everything_is_evaluation_with_the_old_state(door):
    case = Case((16, 6, 4), activation=jax.nn.relu)
    d = data(case)
    y, _ = DOORS[door](case, d, True, normalize_by=jbn.renorm(1e6, 1e6))
    evaluated, _ = DOORS[door](case, d, False)
    near(y, oracle.wide(evaluated), "float32", case.rows, 8)


@pytest.mark.parametrize("kind", ["a constant column", "a dead layer", "epsilon far above the variance", "one row"])
def test_where_nothing_varies_values_and_gradients_of_renorm_are_finite_and_right(kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 3)).astype(np.float32)
    x = {"a constant column": x * [1, 0, 1] + [0, 5, 0], "a dead layer": x * 0, "one row": x[:1].repeat(2, 0)}.get(
        kind, x * 1e-4
    )
    x = x.astype(np.float32)
    state = jbn.State(jnp.array([0.0, 5.0, 0.1]), jnp.array([1.0, 0.0, 1e-8]))
    case = Case(x.shape, epsilon=1.0 if kind.startswith("epsilon") else 1e-5)
    d = data(case)._replace(x=x, mean=state.mean, var=state.var)
    g = rng.standard_normal(x.shape).astype(np.float32)
    _, _, scale, bias = corrected(case, d, (3.0, 5.0))

    def y(x):
        params = jbn.Params(d.scale, d.bias)
        return jbn.bn_forward(params, state, x, True, epsilon=case.epsilon, normalize_by=jbn.renorm(3.0, 5.0))[0]

    got, pull = jax.vjp(y, x)
    near(got, oracle.forward(x, scale, bias, epsilon=case.epsilon).y, "float32", 8, 8)
    want = oracle.gradients(g, x, scale, bias, epsilon=case.epsilon)["x"]
    near(pull(g)[0], want, "float32", 8, float(np.abs(scale).max()) * 3e2 * 3)


def test_r_and_d_of_renorm_are_constants_to_the_state_and_to_limits_that_are_learned_too():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)) + 1, jnp.float32)

    def loss(state, limit):
        return jnp.square(jbn.bn_forward(None, state, x, True, normalize_by=jbn.renorm(1 + limit, limit))[0]).sum()

    slopes = jax.grad(loss, (0, 1))(jbn.bn_init(3)[1], jnp.float32(0.5))
    assert not any(map(np.any, jax.tree.leaves(slopes)))


def test_what_a_mask_hides_does_not_matter():
    case = Case((12, 4), mask=(12, 1))
    d = data(case)
    hidden = d._replace(x=np.where(d.mask, d.x, np.nan))
    want, got = (DOORS["function"](case, each, True, normalize_by=jbn.renorm(*CLIPS)) for each in (d, hidden))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dx_of_half_precision_is_rounded_once():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4096, 4)) * 2 + 1, jnp.bfloat16)
    g = jnp.asarray(1 + 0.01 * rng.standard_normal(x.shape), jnp.bfloat16)
    case = Case(x.shape)
    d = data(case)._replace(x=x)
    _, _, scale, bias = corrected(case, d)
    state = jbn.State(d.mean, d.var)
    f = lambda x: jbn.bn_forward({"scale": d.scale}, state, x, True, normalize_by=jbn.renorm(*CLIPS))[0]  # noqa: E731
    (got,) = jax.vjp(f, x)[1](g)
    want = oracle.gradients(g, x, scale, bias)["x"]
    a = scale / np.sqrt(oracle.moments(x)[2] + 1e-5)
    once = oracle.wide(jnp.asarray(want, jnp.bfloat16))
    bound = 1.5 * np.linalg.norm(once - want) + 8 * 2.0**-24 * np.linalg.norm(a * oracle.wide(g))
    assert np.linalg.norm(oracle.wide(got) - want) <= bound


def test_each_group_has_a_choice_of_its_own():
    case = Case((12, 4))
    d = data(case)
    y, new = DOORS["function"](case, d, True, normalize_by=jbn.renorm(*CLIPS), group_size=4)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        _, _, scale, bias = corrected(case, d, rows=rows)
        near(y[rows], oracle.forward(d.x[rows], scale, bias).y, "float32", 4, 4)
    for got, want in zip(new.values(), DOORS["function"](case, d, True)[1].values(), strict=True):
        near(got, oracle.wide(want), "float32", 12, 4)


@pytest.mark.parametrize("how", ["shard_map", "shard_map unchecked", "vmap", "two groups of shards", "jit"])
def test_shards_choose_as_the_whole_batch_does(how):
    case = Case((16, 5))
    d = data(case)
    g = data(case, seed=1).x
    weight = jnp.float32(0.3)

    def step(x, g, weight, **options):
        def loss(x, weight):
            state = jbn.State(jnp.asarray(d.mean), jnp.asarray(d.var))
            y, new = jbn.bn_forward(
                jbn.Params(jnp.asarray(d.scale), jnp.asarray(d.bias)), state, x, True,
                normalize_by=lambda batch, running, _: jbn.mix(running, batch, weight), **options,
            )  # fmt: skip
            return (y * g).sum(), (y, new)

        (dx, dweight), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, weight)
        return y, new, dx, dweight

    want = step(d.x, g, weight, **({"group_size": 8} if how == "two groups of shards" else {}))
    if how == "jit":
        got = jax.jit(step)(d.x, g, weight)
    elif how.startswith("shard_map"):
        checked = how == "shard_map"
        each = lambda x, g, weight: step(x, g, weight, axis_name="data")  # noqa: E731
        sharded = jax.shard_map(
            each, mesh=mesh(), in_specs=(P("data"), P("data"), P()), check_vma=checked,
            out_specs=(P("data"), P(), P("data"), P()),
        )  # fmt: skip
        got = jax.jit(sharded)(d.x, g, weight)
        if not checked:  # the sum over shards of what a shard finds is the caller's
            got, want = got[:3], want[:3]
    else:
        groups = {"axis_index_groups": [[0, 1], [2, 3]]} if how == "two groups of shards" else {}
        each = lambda x, g: step(x, g, weight, axis_name="data", **groups)  # noqa: E731
        y, new, dx, dweight = jax.vmap(each, axis_name="data")(d.x.reshape(4, 4, 5), g.reshape(4, 4, 5))
        got = (y.reshape(16, 5), jax.tree.map(lambda a: a[0], new), dx.reshape(16, 5), dweight.sum())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        near(a, oracle.wide(b), "float32", 16, 8)


def mixed(x, weight, scale, mean, var):
    """Return y of a mixture, in float64."""
    _, m, v = oracle.moments(x)
    return (x - (mean + weight * (m - mean))) / np.sqrt(var + weight * (v - var) + 1e-5) * scale


@pytest.mark.parametrize("place", ["pilot", "offset"])
def test_a_mixture_is_differentiated_through_the_batch_and_through_what_the_function_holds(place):
    rng, case = np.random.default_rng(0), Case((16, 3))
    d = data(case)
    weight, g = np.float32([0.2, 0.5, 0.9]), rng.standard_normal((16, 3)).astype(np.float32)
    state = jbn.State(d.mean, d.var)

    def loss(x, weight, mean):
        def hold(batch, running, _):
            mixed = jbn.mix(running, batch, weight)
            if place == "offset":
                return mixed
            return dataclasses.replace(mixed, pilot=mixed.mean, offset=jnp.zeros(3))

        y, _ = jbn.bn_forward({"scale": d.scale}, state._replace(mean=mean), x, True, normalize_by=hold)
        return (y * g).sum()

    got = jax.grad(loss, (0, 1, 2))(jnp.asarray(d.x), jnp.asarray(weight), jnp.asarray(d.mean))
    exact = lambda x, w, m: (mixed(x, w, oracle.wide(d.scale), m, oracle.wide(d.var)) * oracle.wide(g)).sum()  # noqa: E731
    at = list(map(oracle.wide, (d.x, weight, d.mean)))
    for i, grad in enumerate(got):
        for _ in range(3):
            way, step = rng.standard_normal(at[i].shape), 1e-5
            moved = [[v + s * step * way if j == i else v for j, v in enumerate(at)] for s in (1, -1)]
            want = (exact(*moved[0]) - exact(*moved[1])) / (2 * step)
            near((oracle.wide(grad) * way).sum(), want, "float32", 16, 16)


@pytest.mark.parametrize("kind", ["jvp", "vjp", "jvp over an array"])
@pytest.mark.parametrize("at", ["the moments", "what the function holds"])
def test_what_differs_in_its_derivative_alone_is_another_function(kind, at):
    x, g = np.random.default_rng(0).standard_normal((2, 16, 3)).astype(np.float32)
    params, state = jbn.bn_init(3)

    def passing(k):
        """Return the identity, whose derivative is k."""
        k = jnp.float32(k) if kind == "jvp over an array" else k
        same = (jax.custom_vjp if kind == "vjp" else jax.custom_jvp)(lambda v: v * 1)
        if kind == "vjp":
            same.defvjp(lambda v: (v, None), lambda _, g: (g * k,))
        else:
            same.defjvp(lambda primals, tangents: (primals[0], tangents[0] * k))
        return same

    def slope(k):
        same = passing(k)

        def loss(w, x):
            held = same(w) if at != "the moments" else 1.0
            var = same if at == "the moments" else lambda v: v
            choose = lambda b, *_: dataclasses.replace(b, offset=0 * b.offset, var=var(b.var) * held)  # noqa: E731
            return (jbn.bn_forward(params, state, x, True, normalize_by=choose)[0] * g).sum()

        return jax.grad(loss, int(at == "the moments"))(jnp.float32(1.0), jnp.asarray(x))

    none, one, three = map(slope, (0.0, 1.0, 3.0))
    near(three - none, 3 * oracle.wide(one - none), "float32", 16, 16)
    assert np.abs(one - none).max() > 1e-2


def test_an_eager_call_sees_what_changed_and_compiles_nothing_for_it():
    x, (params, state) = np.float32([[1.0], [4.0]]), jbn.bn_init(1)
    weight = {"now": jnp.float32(1.0)}
    compiled = []

    def call():
        hold = lambda batch, running, _: jbn.mix(running, batch, weight["now"])  # noqa: E731
        return jbn.bn_forward(params, state, x, True, normalize_by=hold)[0]

    first = call()
    weight["now"] = jnp.float32(0.0)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        second = call()
    finally:
        jax.monitoring.clear_event_listeners()
    near(first, oracle.forward(x).y, "float32", 2)
    near(second, oracle.wide(x) / np.sqrt(1 + 1e-5), "float32", 2)
    assert not [name for name in compiled if "backend_compile" in name]


def test_a_schedule_is_one_trace():
    params, state = jbn.bn_init(3)
    traced = []

    @jax.jit
    def step(state, x, n):
        traced.append(n)
        return jbn.bn_forward(params, state, x, True, normalize_by=jbn.renorm(*jbn.renorm_schedule(n, steps=10)))

    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32) + 2
    ys = [step(state, x, n)[0] for n in (0, 3, 10)]
    assert len(traced) == 1
    near(ys[0], oracle.forward(x).y, "float32", 4, 4)
    assert np.abs(ys[2] - ys[0]).max() > 0.5


def test_the_published_schedule():
    steps = (0, 5_000, 15_000, 25_000, 40_000, 10**6)
    found = [tuple(map(float, jbn.renorm_schedule(step))) for step in steps]
    want = [(1, 0), (1, 0), (1 + 2 * 10 / 35, 2.5), (1 + 2 * 20 / 35, 5), (3, 5), (3, 5)]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("x_mean", [0.0, 1e4])
def test_any_function_may_choose(x_mean):
    """A variance of its own, the moments of the batch to the last digit, a scalar for all features."""
    x = (np.random.default_rng(0).standard_normal((64, 3)) + x_mean).astype(np.float32)
    params, state = jbn.bn_init(3)
    state = state._replace(mean=jnp.full(3, x_mean))

    def choose(batch, running, epsilon):
        return dataclasses.replace(batch, var=jnp.float32(4.0) - epsilon)

    y, _ = jbn.bn_forward(params, state, x, True, normalize_by=choose)
    near(y, (oracle.wide(x) - oracle.wide(x).mean(0)) / 2, "float32", 64, 4)


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        (lambda *_: (1, 2), TypeError, "normalize_by returns tuple; expected jbn.Moments, or jbn.Correction"),
        (lambda b, *_: jbn.Correction(b.var[:2], b.var), ValueError, r"scale of shape \(2,\)"),
        (lambda b, *_: dataclasses.replace(b, var=b.var > 0), ValueError, "var of shape .* and dtype bool"),
        (lambda b, *_: jbn.Correction(b.var * 1j, b.var), ValueError, "scale of shape .* and dtype complex64"),
        (lambda b, *_: jbn.Correction(b.var, None), ValueError, "shift of NoneType; expected real numbers"),
    ],
)
def test_what_cannot_be_normalized_by_is_refused(choose, error, message):
    params, state = jbn.bn_init(3)
    with pytest.raises(error, match=message):
        jbn.bn_forward(params, state, jnp.ones((4, 3)), True, normalize_by=choose)


@pytest.mark.parametrize("train", [True, False])
def test_what_is_no_function_is_refused_where_the_state_normalizes_too(train):
    params, state = jbn.bn_init(3)
    with pytest.raises(TypeError, match=r"normalize_by is 3\.0; expected a function of the moments"):
        jbn.bn_forward(params, state, jnp.ones((4, 3)), train, normalize_by=3.0)


@pytest.mark.parametrize("update", [False, True])
def test_nothing_is_chosen_where_the_state_normalizes(update):
    params, state = jbn.bn_init(3)
    fail = lambda *_: pytest.fail("called")  # noqa: E731
    y, _ = jbn.bn_forward(params, state, jnp.ones((4, 3)), False, update=update, normalize_by=fail)
    assert y.shape == (4, 3)


def test_replace_sets_it_for_whole_models():
    net = nn.Sequential([nn.Dense(3), nn.BatchNorm(False)])
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    variables = net.init(jax.random.key(0), x)
    with jbn.linen.replace(normalize_by=jbn.renorm(1e6, 1e6)):
        y, _ = net.apply(variables, x, mutable=["batch_stats"])
    kernel = oracle.wide(variables["params"]["layers_0"]["kernel"])
    near(y, oracle.wide(x) @ kernel / np.sqrt(1 + 1e-5), "float32", 8, 4)
