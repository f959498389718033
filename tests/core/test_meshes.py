"""Under jit a sharded batch is one batch, on Auto and on Explicit meshes, whatever axes are sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from tests.core.test_sharding import settings
from tests.support import oracle
from tests.support.shards import Setting, mesh

kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
SHAPE = (8, 6, 4)  # features last, over the axis "model"
X, G = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)


def specs(tree):
    """Return the sharding in the type of every array."""
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)


@settings
@kinds
@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_a_sharded_batch(setting, kind, shape):
    s = Setting(**setting)
    m = mesh(shape, ("data", "more"), kind)
    with jax.set_mesh(m):

        def put(a):
            return None if a is None else jax.device_put(a, NamedSharding(m, P(("data", "more"))))

        y, new, (dx, dscale, dbias) = jax.jit(s.step)(put(s.x), put(s.mask), put(s.g), s.scale, s.bias, s.state)
    s.check(y, new, dx, dscale, dbias)


@kinds
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("state_spec", [P(), P("model")], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_sharded_features(kind, mean, state_spec, masked):
    """The state keeps its sharding, and gradients have those of what they belong to."""
    m = mesh((2, 2), ("data", "model"), kind)
    mask = np.arange(48).reshape(8, 6, 1) % 5 > 0 if masked else None
    x = X + np.float32(mean)
    with jax.set_mesh(m):
        put = partial(jax.device_put, device=NamedSharding(m, P("data", None, "model")))
        params, state = jax.device_put(jbn.bn_init(4), NamedSharding(m, state_spec))

        @jax.jit
        def step(params, state, x, g):
            def loss(params, x):
                y, new = jbn.bn_forward(params, state, x, True, mask=mask, momentum=0.0)
                return (y * g).sum(), (y, new)

            grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
            assert specs((new, grads)) == specs((state, (params, x)))
            return y, new, grads

        y, new, (dparams, dx) = step(params, state, put(x), put(G))
    want, grads = oracle.forward(x, mask=mask), oracle.gradients(G, x, mask=mask)
    bound = oracle.tolerance("float32", X[..., 0].size)
    for got, right in ((y, want.y), (new.var, want.var), (dx, grads["x"]), (dparams.scale, grads["scale"])):
        assert np.abs(oracle.wide(got) - right).max() <= bound * max(1, np.abs(right).max())


@kinds
@pytest.mark.parametrize("size", [None, 2])
def test_the_state_keeps_its_sharding_whatever_else_is_sharded(kind, size):
    """A mask that tells features apart, and statistics that lie apart from each other."""
    m = mesh((2, 2), ("data", "model"), kind)
    mask = np.arange(X.size).reshape(SHAPE) % 5 > 0
    with jax.set_mesh(m):
        put = partial(jax.device_put, device=NamedSharding(m, P("data", None, "model")))
        place = lambda value, *spec: jax.device_put(jnp.full(4, value), NamedSharding(m, P(*spec)))  # noqa: E731
        for state in (jbn.State(place(0.0), place(1.0)), jbn.State(place(0.0), place(1.0, "model"))):

            @jax.jit
            def step(state, x, mask):
                new = jbn.bn_forward(None, state, x, True, mask=mask, momentum=0.0, group_size=size)[1]
                assert specs(new) == specs(state)
                return new

            np.testing.assert_allclose(step(state, put(X), put(mask)).var, oracle.moments(X, mask=mask)[2], rtol=1e-6)


@kinds
def test_a_scan_keeps_the_type_of_the_state(kind):
    m = mesh((2, 2), ("data", "model"), kind)
    with jax.set_mesh(m):
        xs = jax.device_put(np.stack([X] * 3), NamedSharding(m, P(None, "data", None, "model")))
        forward = lambda state, x: jbn.bn_forward(None, state, x, True)[::-1]  # noqa: E731
        state, _ = jax.jit(partial(jax.lax.scan, forward))(jbn.bn_init(4)[1], xs)
    np.testing.assert_allclose(state.mean, (1 - 0.99**3) * X.mean((0, 1)), atol=1e-7)


@kinds
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_a_mapped_axis_may_be_the_sharded_one(kind, mean):
    """Under vmap over a sharded axis each member is a batch of its own, with a state of its own or a shared one."""
    m = mesh((4,), ("data",), kind)
    x = X + np.float32(mean)
    want = np.stack([oracle.forward(part).y for part in x])
    with jax.set_mesh(m):
        put = partial(jax.device_put, device=NamedSharding(m, P("data")))
        params, state = jbn.bn_init(4)
        stateless = jax.jit(jax.vmap(lambda x: jbn.batch_norm(x)[0]))(put(x))
        shared, new = jax.jit(jax.vmap(lambda x: jbn.bn_forward(params, state, x, True)))(put(x))
        mapped = put(jax.tree.map(lambda a: jnp.stack([a] * 8), state))
        own, newer = jax.jit(jax.vmap(lambda s, x: jbn.bn_forward(params, s, x, True)))(mapped, put(x))
    for y in (stateless, shared, own):
        np.testing.assert_allclose(y, want, atol=1e-5)
    for a, b in zip(new, newer, strict=True):
        np.testing.assert_array_equal(a, b)
    assert specs(newer) == specs(mapped)


@kinds
@pytest.mark.parametrize(
    "cut", [P("member"), P("member", "data"), P(None, "data"), P("member", None, None, "data")], ids=str
)
def test_members_and_their_rows_may_both_be_sharded(kind, cut):
    """The guard asks all members at once, so that no member selects between arrays that lie differently."""
    x = np.stack([X, X + 100])
    want = np.stack([oracle.forward(part).y for part in x])
    m = mesh((2, 2), ("member", "data"), kind)
    with jax.set_mesh(m):
        states = jax.tree.map(lambda a: jnp.stack([a] * 2), jbn.bn_init(4)[1])
        states = jax.device_put(states, NamedSharding(m, P(cut[0])))
        y, _ = jax.jit(jax.vmap(lambda s, x: jbn.bn_forward(None, s, x, True)))(
            states, jax.device_put(x, NamedSharding(m, cut))
        )
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_an_explicit_mesh_that_is_not_set():
    m = mesh((2, 2), ("data", "model"), AxisType.Explicit)
    params, state = jax.device_put(jbn.bn_init(4), NamedSharding(m, P()))
    x = jax.device_put(X, NamedSharding(m, P("data", None, "model")))
    for call in (jbn.bn_forward, jax.jit(jbn.bn_forward, static_argnums=3)):
        y, new = call(params, state, x, True)
        np.testing.assert_allclose(y, oracle.forward(X).y, atol=1e-5)
        assert specs(new) == specs(state)


@kinds
def test_second_derivatives_with_sharded_features(kind):
    def second(x):
        return jax.grad(lambda x: (jax.grad(lambda x: (jbn.batch_norm(x)[0] ** 3).sum())(x) ** 2).sum())(x)

    m = mesh((2, 2), ("data", "model"), kind)
    with jax.set_mesh(m):
        got = jax.jit(second)(jax.device_put(X, NamedSharding(m, P("data", None, "model"))))
    want = second(X)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("shape", [(8, 1, 1), SHAPE, (1, 6, 4)], ids=str)
def test_each_group_chooses_where_the_mask_lies_otherwise_than_x(shape):
    m = mesh((2, 2), ("data", "model"), AxisType.Explicit)
    mask = np.random.default_rng(1).random(shape) < 0.7
    step = jax.jit(partial(jbn.batch_norm, mask=mask, group_size=2))
    choose = jax.jit(lambda x: jbn.bn_forward(None, state, x, True, mask=mask, group_size=2, normalize_by=same)[0])
    same, state = (lambda batch, running, epsilon: batch), jbn.bn_init(4)[1]
    want, _ = step(X)
    with jax.set_mesh(m):
        got = choose(jax.device_put(X, NamedSharding(m, P("data", None, "model"))))
    np.testing.assert_allclose(got, want, atol=oracle.tolerance("float32", 12, 4))


def test_a_program_is_of_one_mesh():
    """What was traced of a function of JAX on one mesh is not carried out on another, whose axes are of other kinds."""
    want = jax.nn.silu(jbn.batch_norm(X)[0])
    for kinds in [(AxisType.Auto, AxisType.Auto), (AxisType.Explicit, AxisType.Auto)]:
        m = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
        with jax.set_mesh(m):
            got, _ = jbn.batch_norm(jax.device_put(X, NamedSharding(m, P("data"))), activation=jax.nn.silu)
        np.testing.assert_allclose(got, want, atol=oracle.tolerance("float32", 48, 4))


BEHIND = {
    "relu": {"activation": jax.nn.relu},
    "elu": {"activation": jax.nn.elu},
    "select": {"activation": lambda z: jnp.where(z > 0, z, 0.1 * z)},
    "clip": {"activation": lambda z: jnp.clip(z, -1, 1)},
    "residual": {"activation": jax.nn.relu, "residual": G},
    "chosen": {"activation": jax.nn.gelu, "normalize_by": jbn.renorm(1.0, 0.0)},
}


def value_and_gradient(x, **options):
    """Return y and the gradient of Σ y³."""
    state = jbn.bn_init(4)[1]

    def loss(x):
        y, _ = jbn.bn_forward(None, state, x, True, **options)
        return (y**3).sum(), y

    (_, y), dx = jax.value_and_grad(loss, has_aux=True)(x)
    return y, dx


@pytest.mark.parametrize("options", BEHIND)
@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=str)
@pytest.mark.parametrize("data_is_explicit", [True, False])
def test_a_mesh_whose_axes_are_of_both_kinds(options, spec, data_is_explicit):
    types = (AxisType.Explicit, AxisType.Auto)
    m = jax.make_mesh((2, 2), ("data", "model"), axis_types=types if data_is_explicit else types[::-1])
    want = value_and_gradient(X, **BEHIND[options])
    with jax.set_mesh(m):
        x = jax.device_put(X, NamedSharding(m, spec))
        call = partial(value_and_gradient, **BEHIND[options])
        got = [call(x), jax.jit(call)(x)]
    for found in got:
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, atol=oracle.tolerance("float32", 48, 16) * max(1, np.abs(b).max()))


@pytest.mark.parametrize("options", [None, *BEHIND])
@kinds
def test_shards_along_some_axes_of_a_mesh_alone(options, kind):
    """What is one shard along one axis is whole along the other, whose type is another."""
    given = dict(BEHIND[options]) if options else {}
    residual = given.pop("residual", None)
    m = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, kind))

    def step(x, *residual):
        return value_and_gradient(x, axis_name="data", **given, **dict(zip(["residual"], residual, strict=False)))

    rows = (X,) if residual is None else (X, residual)
    with jax.set_mesh(m):
        sharded = jax.shard_map(step, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        y, dx = jax.jit(sharded)(*(jax.device_put(a, NamedSharding(m, P("data"))) for a in rows))
    for a, b in zip((y, dx), value_and_gradient(X, **BEHIND[options] if options else {}), strict=True):
        np.testing.assert_allclose(a, b, atol=oracle.tolerance("float32", 48, 16) * max(1, np.abs(b).max()))
