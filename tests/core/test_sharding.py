"""Statistics of shards: the same values, states and gradients as one device with all valid rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests.support import oracle
from tests.support.shards import ROWS, SHARDS, C, Setting, mesh, split

SETTINGS = [
    pytest.param({"mean": mean, "masked": masked, "warm": warm}, id=f"mean={mean:g} masked={masked} warm={warm}")
    for mean in (0.0, 1e4)
    for masked in (False, True)
    for warm in (False, True)
]
settings = pytest.mark.parametrize("setting", SETTINGS)


@settings
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("names", [("data",), ("data", "more")], ids=str)
def test_shard_map_with_the_gradient_outside(setting, check_vma, names):
    s = Setting(**setting)
    m = mesh((4,) if len(names) == 1 else (2, 2), names)
    rows, whole = P(names), P()

    def forward(x, mask, scale, bias):
        params, name = jbn.Params(scale, bias), names if len(names) > 1 else names[0]
        return jbn.bn_forward(params, s.state, x, True, mask=mask, momentum=0.0, axis_name=name)

    f = jax.shard_map(
        forward, mesh=m, in_specs=(rows, rows, whole, whole), out_specs=(rows, whole), check_vma=check_vma
    )

    @jax.jit
    def step(x, scale, bias):
        def loss(x, scale, bias):
            y, new = f(x, s.mask, scale, bias)
            return (y * s.g).sum(), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, new, *grads

    s.check(*step(s.x, s.scale, s.bias))


@settings
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_the_gradient_inside(setting, check_vma):
    s = Setting(**setting)
    rows, whole = P("data"), P()

    def step(x, mask, g, scale, bias, state):
        y, new, (dx, dscale, dbias) = s.step(x, mask, g, scale, bias, state, axis_name="data")
        if not check_vma:  # as everywhere in such a shard_map, gradients of what is shared are summed by hand
            dscale, dbias = jax.lax.psum((dscale, dbias), "data")
        return y, new, dx, dscale, dbias

    f = jax.shard_map(
        step, mesh=mesh(), in_specs=(rows, rows, rows, whole, whole, whole),
        out_specs=(rows, whole, rows, whole, whole), check_vma=check_vma,
    )  # fmt: skip
    s.check(*jax.jit(f)(s.x, s.mask, s.g, s.scale, s.bias, s.state))


@settings
@pytest.mark.parametrize("transform", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_vmap_and_pmap_with_an_axis_name(setting, transform):
    s = Setting(**setting)

    def step(x, mask, g):
        return s.step(x, mask, g, s.scale, s.bias, s.state, axis_name="data")

    y, new, (dx, dscale, dbias) = transform(step, axis_name="data")(split(s.x), split(s.mask), split(s.g))
    for a in jax.tree.leaves(new):
        assert (np.asarray(a) == np.asarray(a)[0]).all()
    s.check(y.reshape(-1, C), jax.tree.map(lambda a: a[0], new), dx.reshape(-1, C), dscale.sum(0), dbias.sum(0))


@pytest.mark.parametrize("check_vma", [True, False])
def test_every_shard_empty(check_vma):
    s = Setting(masked=True)
    none = np.zeros_like(s.mask)

    def forward(x, mask):
        return jbn.bn_forward(None, s.state, x, True, mask=mask, axis_name="data")

    f = jax.shard_map(forward, mesh=mesh(), in_specs=P("data"), out_specs=(P("data"), P()), check_vma=check_vma)
    y, new = jax.jit(f)(s.x, none)
    assert not y.any()
    np.testing.assert_array_equal(new.mean, s.state.mean)
    np.testing.assert_array_equal(new.var, s.state.var)


@pytest.mark.parametrize("check_vma", [True, False])
def test_evaluation_in_shard_map(check_vma):
    s = Setting(warm=True)
    f = jax.shard_map(
        lambda x: jbn.bn_forward(jbn.Params(s.scale, s.bias), s.state, x, False, axis_name="data")[0],
        mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=check_vma,
    )  # fmt: skip
    want = oracle.forward(s.x, s.scale, s.bias, stats=s.state)
    np.testing.assert_allclose(f(s.x), want.y, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_statistics_of_each_shard_alone(check_vma):
    """Without an axis name every shard is a batch of its own."""
    s = Setting(mean=1e4)
    f = jax.shard_map(
        lambda x: jbn.batch_norm(x)[0], mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    want = np.concatenate([oracle.forward(part).y for part in s.x.reshape(SHARDS, ROWS, C)])
    np.testing.assert_allclose(jax.jit(f)(s.x), want, atol=1e-5)
    dx = jax.jit(jax.grad(lambda x: (f(x) * s.g).sum()))(s.x)
    parts = zip(s.g.reshape(SHARDS, ROWS, C), s.x.reshape(SHARDS, ROWS, C), strict=True)
    np.testing.assert_allclose(dx, np.concatenate([oracle.gradients(g, x)["x"] for g, x in parts]), atol=1e-4)


def test_moments_across_shards():
    s = Setting(mean=1e4)
    m = jax.vmap(lambda x: jbn.moments(x, axis_name="data"), axis_name="data")(s.x.reshape(SHARDS, ROWS, C))
    np.testing.assert_allclose(m.var[1], s.want["var"], rtol=1e-5)
    assert m.count[0] == SHARDS * ROWS


def test_states_that_differ_between_shards():
    """A checkpoint of per-replica statistics: what is normalized by does not depend on it."""
    s = Setting()
    means = np.float32([0, 1000, 3, np.nan])

    def forward(x, mean, activation=None):
        state = {"mean": jnp.full(C, mean[0]), "var": jnp.ones(C)}
        params = jbn.Params(s.scale, s.bias)
        return jbn.bn_forward(params, state, x, True, axis_name="data", activation=activation)[0]

    for slope in (None, jnp.full((1, C), 0.5)):
        act = None if slope is None else lambda z, slope=slope: slope * z
        f = jax.shard_map(partial(forward, activation=act), mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
        np.testing.assert_allclose(jax.jit(f)(s.x, means), s.want["y"] * (1 if act is None else 0.5), atol=1e-5)


def test_a_state_of_each_shard_over_a_shared_batch():
    s = Setting()
    f = jax.shard_map(
        jax.grad(lambda m, x: (jbn.bn_forward(None, {"mean": m, "var": m**2 + 1}, x, True)[0] ** 3).sum(), 1),
        mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"),
    )  # fmt: skip
    assert jnp.isfinite(jax.jit(f)(jnp.arange(4.0 * C), s.x)).all()


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_across_shards(masked):
    s = Setting(masked=masked)

    def one(x):
        return jbn.batch_norm(x, mask=s.mask)[0]

    def many(x):
        f = jax.vmap(lambda x, mask: jbn.batch_norm(x, mask=mask, axis_name="data")[0], axis_name="data")
        return f(split(x), split(s.mask)).reshape(-1, C)

    def second(f):
        return jax.grad(lambda x: (jax.grad(lambda x: (f(x) ** 3 * s.g).sum())(x) ** 2).sum())(jnp.nan_to_num(s.x))

    want = second(one)
    np.testing.assert_allclose(second(many), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("check_vma", [True, False])
def test_an_axis_over_which_x_does_not_vary(check_vma):
    """The same rows count once for each shard that has them: mean and variance are what they were."""
    s = Setting(mean=1e4)
    rows, whole = P("data"), P()

    def step(x, g, scale, bias, state):
        y, new, (dx, *dparams) = s.step(x, None, g, scale, bias, state, axis_name=("data", "more"))
        # Each of the two copies of a shard has half of what x, scale and bias do.
        return y, new, dx if check_vma else jax.lax.psum(dx, "more") / 2, *dparams

    f = jax.shard_map(
        step, mesh=mesh((2, 2), ("data", "more")), in_specs=(rows, rows, whole, whole, whole),
        out_specs=(rows, whole, rows, whole, whole), check_vma=check_vma,
    )  # fmt: skip
    y, new, dx, *_ = jax.jit(f)(s.x, s.g, s.scale, s.bias, s.state)
    s.check(y, new, dx, s.grads["scale"], s.grads["bias"])


def test_a_state_that_would_differ_between_shards():
    s = Setting()

    def run(state, x, spec, **options):
        f = jax.shard_map(
            lambda state, x: jbn.bn_forward(None, state, x, True, **options)[1],
            mesh=mesh((2, 2), ("data", "more")), in_specs=(spec, P(("data", "more"))), out_specs=spec,
        )  # fmt: skip
        return jax.jit(f)(state, x)

    both = r"\('data', 'more'\)"
    with pytest.raises(ValueError, match=f"the mesh axis {both}, the state does not.*Pass axis_name={both}"):
        run(s.state, s.x, P())
    with pytest.raises(ValueError, match=f"the mesh axis 'more', the state does not.*Pass axis_name={both}"):
        run(s.state, s.x, P(), axis_name="data")
    assert run(s.state, s.x, P(), axis_name=("data", "more")).mean.shape == (C,)
    with pytest.raises(ValueError, match="the mesh axis 'data', the state does not"):  # by the mask alone
        jax.shard_map(
            lambda mask: jbn.bn_forward(None, s.state, jnp.asarray(s.x[:6]), True, mask=mask)[1],
            mesh=mesh(), in_specs=P("data"), out_specs=P(),
        )(np.ones((24, 1), bool))  # fmt: skip
    own = jax.tree.map(lambda a: jnp.tile(a, 4), s.state)
    new = run(own, s.x, P(("data", "more")), momentum=0.0)
    np.testing.assert_allclose(new.mean.reshape(4, C), split(s.x).mean(1), atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["data", None])
def test_a_scan_over_micro_batches_in_shard_map(check_vma, name):
    """The carry is the state, shared by the shards or of each of them."""
    s = Setting()
    spec = P("data") if name is None else P()
    state = jax.tree.map(lambda a: jnp.tile(a, SHARDS), s.state) if name is None else s.state

    def scan(state, x):
        forward = lambda state, x: jbn.bn_forward(None, state, x, True, axis_name=name)[::-1]  # noqa: E731
        return jax.lax.scan(forward, state, x.reshape(2, -1, C))

    specs = {"in_specs": (spec, P("data")), "out_specs": (spec, P(None, "data")), "check_vma": check_vma}
    new, _ = jax.jit(jax.shard_map(scan, mesh=mesh(), **specs))(state, s.x)
    first, second = (part.reshape(SHARDS, -1, C) for part in np.split(split(s.x), 2, axis=1))
    rows = 1 if name is None else (0, 1)
    want = 0.99 * 0.01 * first.mean(rows) + 0.01 * second.mean(rows)
    np.testing.assert_allclose(np.reshape(new.mean, want.shape), want, atol=1e-6)


def test_names_of_axes_are_different():
    with pytest.raises(ValueError, match="expected one name or several different ones"):
        jax.vmap(lambda x: jbn.batch_norm(x, axis_name=("data", "data")), axis_name="data")(split(Setting().x))


def test_an_axis_of_vmap_in_a_shard_map():
    """Where shard_map checks, JAX has no collectives over it."""
    s = Setting()
    f = jax.vmap(lambda x: jbn.batch_norm(x, axis_name=("batch", "data"))[0], axis_name="batch")

    def run(check_vma):
        g = jax.shard_map(f, mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
        return jax.jit(g)(s.x.reshape(SHARDS * 2, -1, C))

    with pytest.raises(ValueError, match=r"axis_name 'batch' is an axis of jax.vmap.*check_vma=False"):
        run(True)
    want = oracle.forward(s.x).y
    np.testing.assert_allclose(run(False).reshape(want.shape), want, atol=1e-5)
