"""Groups: each a batch of its own, wherever its examples lie; running statistics are those of the whole batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from benchmarks.compilers import compile
from benchmarks.compilers import mesh as mesh_of
from tests.support import oracle
from tests.support.shards import ROWS, SHARDS, C, Setting, mesh, split

ROWS_OF = np.arange(SHARDS * ROWS)
SIZES = [2, 3, ROWS, 2 * ROWS, SHARDS * ROWS]
# Of unequal sizes, too, and not in order.
GROUPS = [[[0, 2], [1, 3]], [[3, 1, 0], [2]], [[2], [0], [3], [1]]]
SETTINGS = [
    {"mean": mean, "masked": masked, "warm": warm}
    for mean, masked, warm in [(0.0, False, False), (1e4, True, False), (1e4, True, True)]
]


def in_turns(name, values, doors):
    """Drive every value through every door, each time in the next one of the settings."""
    return pytest.mark.parametrize(
        (name, "door", "setting"),
        [
            pytest.param(value, door, setting, id=f"{value}-{door}-{setting}")
            for i, value in enumerate(values)
            for j, door in enumerate(doors)
            for setting in [SETTINGS[(i + j) % 3]]
        ],
    )


def under_shard_map(check_vma):
    def run(s, **options):
        rows, whole = P("data"), P()

        def step(x, mask, g):
            y, new, (dx, *dparams) = s.step(x, mask, g, s.scale, s.bias, s.state, axis_name="data", **options)
            # Where JAX does not check, gradients of what is shared are summed by hand.
            return y, new, dx, *(dparams if check_vma else jax.lax.psum(dparams, "data"))

        if check_vma:  # parameters that a function closes over are not shared but copied
            inner = step

            def step(x, mask, g):
                return inner(x, mask, g)

        f = jax.shard_map(
            step, mesh=mesh(), in_specs=(rows, rows, rows), out_specs=(rows, whole, rows, whole, whole),
            check_vma=check_vma,
        )  # fmt: skip
        return jax.jit(f)(s.x, s.mask, s.g)

    return run


def under(transform):
    def run(s, **options):
        def step(x, mask, g):
            return s.step(x, mask, g, s.scale, s.bias, s.state, axis_name="data", **options)

        y, new, (dx, dscale, dbias) = transform(step, axis_name="data")(split(s.x), split(s.mask), split(s.g))
        for a in jax.tree.leaves(new):
            assert (np.asarray(a) == np.asarray(a)[0]).all()
        new = jax.tree.map(lambda a: a[0], new)
        return y.reshape(-1, C), new, dx.reshape(-1, C), dscale.sum(0), dbias.sum(0)

    return run


def under_jit(kind):
    def run(s, **options):
        m = mesh(kind=kind)
        with jax.set_mesh(m):
            put = lambda a: None if a is None else jax.device_put(a, NamedSharding(m, P("data")))  # noqa: E731
            step = jax.jit(lambda *args: s.step(*args, **options))
            y, new, grads = step(put(s.x), put(s.mask), put(s.g), s.scale, s.bias, s.state)
        return y, new, *grads

    return run


ACROSS = {
    "shard_map": under_shard_map(True),
    "shard_map unchecked": under_shard_map(False),
    "pmap": under(jax.pmap),
    "vmap": under(jax.vmap),
}
HERE = {"jit, Auto": under_jit(AxisType.Auto), "jit, Explicit": under_jit(AxisType.Explicit)}


@in_turns("size", SIZES, [*HERE, *ACROSS])
def test_group_size(setting, size, door):
    s = Setting(**setting, groups=ROWS_OF.reshape(-1, size))
    if door == "jit, Explicit" and ROWS % size and size < len(s.x):
        with pytest.raises(
            ValueError, match=f"group_size is {size}, but the 24 examples lie on 4 devices .* divisor of 6"
        ):
            HERE[door](s, group_size=size)
        return
    s.check(*{**HERE, **ACROSS}[door](s, group_size=size))


@in_turns("groups", GROUPS, ACROSS)
def test_axis_index_groups(setting, groups, door):
    shards = ROWS_OF.reshape(SHARDS, ROWS)
    s = Setting(**setting, groups=[np.concatenate(shards[group]) for group in groups])
    s.check(*ACROSS[door](s, axis_index_groups=groups))


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (1, 3)], ids=str)
def test_examples_are_on_the_first_axis_without_features(axis):
    rng = np.random.default_rng(0)
    shape = (4, 6, 2, 4)
    x, residual, g = rng.standard_normal((3, *shape)).astype(np.float32)
    mask = rng.random(shape) < 0.7
    axes = {a % 4 for a in np.atleast_1d(axis)}
    batch = min(set(range(4)) - axes)
    features = tuple(shape[a] for a in sorted(axes))
    scale, bias = rng.standard_normal((2, *features)).astype(np.float32)

    def f(x, residual, scale, bias):
        options = {"axis": axis, "mask": mask, "residual": residual, "activation": jax.nn.silu}
        return jbn.bn_forward(jbn.Params(scale, bias), jbn.bn_init(features)[1], x, True, group_size=2, **options)[0]

    y, pull = jax.vjp(f, x, residual, scale, bias)
    found = dict(zip(("x", "residual", "scale", "bias"), pull(g), strict=True))
    total = {"scale": 0, "bias": 0}
    for rows in np.arange(shape[batch]).reshape(-1, 2):
        take = lambda a, rows=rows: np.take(np.asarray(a), rows, batch)  # noqa: E731
        args = (take(x), scale, bias)
        options = {"axis": axis, "mask": take(mask), "residual": take(residual), "activation": jax.nn.silu}
        np.testing.assert_allclose(take(y), oracle.forward(*args, **options).y, atol=1e-5)
        grads = oracle.gradients(take(g), *args, **options)
        for name in ("x", "residual"):
            np.testing.assert_allclose(take(found[name]), grads[name], atol=1e-4)
        total = {name: total[name] + grads[name] for name in total}
    for name, want in total.items():
        np.testing.assert_allclose(found[name], want, atol=1e-4)


@pytest.mark.parametrize("mask", [None, (24, 1, 1, 1), (24, 3, 1, 1), (24, 1, 2, 5), (24, 3, 2, 5)], ids=str)
@pytest.mark.parametrize(("size", "unbiased"), [(4, True), (6, False), (12, True)])
def test_several_feature_axes_across_shards(mask, size, unbiased):
    """Counts are of examples, of positions, or of each feature; there are as many features as groups."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((24, 3, 2, 5)) + np.arange(24)[:, None, None, None]).astype(np.float32)
    mask = None if mask is None else rng.random(mask) < 0.8
    want = oracle.forward(x, axis=(2, 3), mask=mask)
    grown = want.var * (want.count / (want.count - 1) if unbiased else 1)

    def step(x, mask, name=None):
        state = jbn.bn_init((2, 5))[1]
        options = {"axis": (2, 3), "mask": mask, "momentum": 0.0, "unbiased": unbiased}
        return jbn.bn_forward(None, state, x, True, axis_name=name, group_size=size, **options)

    runs = [step(x, mask)]
    if size != 4:
        y, new = jax.vmap(lambda x, mask: step(x, mask, "data"), axis_name="data")(split(x), split(mask))
        runs.append((y.reshape(x.shape), jax.tree.map(lambda a: a[1], new)))
    for y, new in runs:
        for rows in np.arange(24).reshape(-1, size):
            part = oracle.forward(x[rows], axis=(2, 3), mask=None if mask is None else mask[rows])
            np.testing.assert_allclose(y[rows], part.y, atol=1e-5)
        np.testing.assert_allclose(new.mean, want.mean, rtol=1e-5)
        np.testing.assert_allclose(new.var, grown, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 2, 3)], ids=str)
def test_nothing_at_all(shape):
    state = jbn.bn_init(3)[1] if shape[-1] else jbn.State(jnp.zeros(0), jnp.ones(0))
    y, new = jbn.bn_forward(None, state, jnp.zeros(shape), True, group_size=2)
    assert y.shape == shape
    np.testing.assert_array_equal(new.var, state.var)


@pytest.mark.parametrize("size", [3, 12])
def test_states_that_differ_between_shards(size):
    """Where JAX tells them apart, the groups are normalized by the same numbers as with one state."""
    s = Setting(groups=ROWS_OF.reshape(-1, size))
    means = np.float32([[0], [1000], [3], [-5]]) + np.zeros(C, np.float32)

    def forward(x, mean):
        state = {"mean": mean[0], "var": jnp.ones(C)}
        params = jbn.Params(s.scale, s.bias)
        return jbn.bn_forward(params, state, x, True, axis_name="data", group_size=size, momentum=0.0)

    specs = {"in_specs": P("data"), "out_specs": (P("data"), P("data"))}
    y, new = jax.jit(jax.shard_map(forward, mesh=mesh(), **specs))(s.x, means)
    np.testing.assert_allclose(y, s.want["y"], atol=1e-5)
    np.testing.assert_allclose(new["var"].reshape(4, C), np.tile(s.want["var"], (4, 1)), rtol=1e-5)


@pytest.mark.parametrize("door", ["jit, Auto", *ACROSS])
@pytest.mark.parametrize("size", [2, ROWS, 2 * ROWS])
def test_a_value_that_is_not_finite_stays_in_its_group(size, door):
    s = Setting()
    s.x[1, 2] = np.nan
    y, new, dx, *_ = {**HERE, **ACROSS}[door](s, group_size=size)
    assert np.isnan(y[:size, 2]).all()
    for a in (y, dx):
        assert np.isfinite(np.delete(a, 2, 1)).all()
        assert np.isfinite(a[size:]).all()
    assert new.mean[2] == 0
    assert (np.delete(new.mean, 2) != 0).all()


def test_an_empty_group_has_no_weight():
    s = Setting(masked=True, mean=1e4)
    s.mask[:4] = False
    y, new = jbn.bn_forward(None, s.state, s.x, True, mask=s.mask, momentum=0.0, group_size=4)
    want = oracle.forward(s.x, mask=s.mask)
    assert (y[:4] == 0).all()
    np.testing.assert_allclose(new.var, want.var, rtol=1e-5)
    none, same = jbn.bn_forward(None, s.state, s.x, True, mask=np.zeros_like(s.mask), group_size=4)
    assert not none.any()
    np.testing.assert_array_equal(same.var, s.state.var)


def test_moments_of_batch_norm_are_those_of_the_whole_batch():
    s = Setting(mean=1e4)
    m = jbn.batch_norm(s.x, group_size=4)[1]
    count, mean, var = oracle.moments(s.x)
    assert (np.asarray(m.count) == count).all()
    np.testing.assert_allclose(oracle.wide(m.pilot) + oracle.wide(m.offset), mean, rtol=1e-7)
    np.testing.assert_allclose(m.var, var, rtol=1e-6)


def test_unbiased_running_variance_counts_the_whole_batch():
    s = Setting()
    _, new = jbn.bn_forward(None, s.state, s.x, True, momentum=0.0, group_size=4, unbiased=True)
    np.testing.assert_allclose(new.var, oracle.moments(s.x)[2] * 24 / 23, rtol=1e-6)


@pytest.mark.parametrize("options", [{"group_size": 4}, {"axis_index_groups": [[0, 2], [1, 3]]}], ids=str)
def test_linen(options):
    s = Setting(groups=ROWS_OF.reshape(-1, 4) if "group_size" in options else ROWS_OF.reshape(4, 6)[[[0, 2], [1, 3]]])
    name = None if "group_size" in options else "data"
    layer = jbn.linen.BatchNorm(False, momentum=0.0, axis_name=name, **options)
    variables = {"params": {"scale": s.scale, "bias": s.bias}, "batch_stats": s.state._asdict()}

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    if name is None:
        y, new = apply(s.x)
    else:
        y, new = jax.pmap(apply, axis_name=name)(split(s.x))
        new = jax.tree.map(lambda a: a[3], new)
    np.testing.assert_allclose(np.reshape(y, s.x.shape), s.want["y"], atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], s.want["var"], rtol=1e-5)


def test_an_activation_sees_x_as_it_was():
    """A slope of the shape of x, and a per-feature module such as PReLU."""
    slope = jnp.linspace(0.1, 0.9, 24 * C).reshape(24, C)
    s = Setting(groups=ROWS_OF.reshape(-1, 4))
    y = jbn.batch_norm(s.x, s.scale, s.bias, group_size=4, activation=lambda z: nn.leaky_relu(z) * slope)[0]
    want = np.where(s.want["y"] > 0, s.want["y"], 0.01 * s.want["y"]) * np.asarray(slope)
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("door", ["vmap", "group_size"])
def test_second_derivatives(door):
    s = Setting()

    def parts(x):
        return jnp.concatenate([jbn.batch_norm(part)[0] for part in x.reshape(2, 12, C)])

    def groups(x):
        if door == "group_size":
            return jbn.batch_norm(x, group_size=12)[0]
        f = jax.vmap(lambda x: jbn.batch_norm(x, axis_name="data", group_size=12)[0], axis_name="data")
        return f(x.reshape(SHARDS, ROWS, C)).reshape(-1, C)

    def second(f):
        return jax.grad(lambda x: (jax.grad(lambda x: (f(x) ** 3 * s.g).sum())(x) ** 2).sum())(s.x)

    want = second(parts)
    np.testing.assert_allclose(second(groups), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_inside_a_device_need_no_collective(size, masked):
    """Neither y nor dx do; the running statistics need one, and one more where its guard fires."""
    over = mesh_of("cpu", data=8)
    kind = NamedSharding(over, P("data"))
    x = jax.ShapeDtypeStruct((32, 7, 7, 16), jnp.float32, sharding=kind)
    mask = jax.ShapeDtypeStruct((32, 7, 1, 1), jnp.bool_, sharding=kind) if masked else None

    def whole(x, g, mask, state):
        def forward(x):
            return jbn.bn_forward(None, state, x, True, mask=mask, group_size=size, activation=jax.nn.relu)

        y, pull, new = jax.vjp(forward, x, has_aux=True)
        return (y, *pull(g)), new

    state = jax.eval_shape(lambda: jbn.bn_init(16)[1])
    without = compile(lambda *args: whole(*args)[0], x, x, mask, state, on=over)
    assert without.collectives == without.guarded_collectives == []
    both = compile(whole, x, x, mask, state, on=over)
    assert sum(c.bytes for c in both.collectives) <= 4 * (3 * 16 + 1)
    assert len(both.guarded_collectives) <= 2


ERRORS = {
    "not a divisor": ({"group_size": 5}, ValueError, "group_size is 5; expected a divisor of the 24 examples"),
    "zero": ({"group_size": 0}, ValueError, "group_size is 0"),
    "too large": ({"group_size": 48}, ValueError, "group_size is 48; expected a divisor of the 24 examples"),
    "one value": ({"group_size": 1}, ValueError, "one value per channel in training .* group_size 1"),
    "a float": ({"group_size": 4.0}, TypeError, "group_size is 4.0; expected an integer"),
}
ERRORS_ACROSS = {
    "neither": ({"group_size": 4}, "group_size is 4; expected a divisor or a multiple .* 6 on each of 4"),
    "uncovered": ({"axis_index_groups": [[0, 1], [2]]}, r"\[\[0, 1\], \[2\]\]; expected .* 0 to 3 of axis 'data'"),
    "empty": ({"axis_index_groups": [[0, 1, 2, 3], []]}, "in exactly one group, none empty"),
    "alone": ({"axis_index_groups": [[0], [1, 2, 3]], "x": jnp.ones((SHARDS, C))}, "one value per channel in training"),
    "twice": ({"axis_index_groups": [[0, 1], [1, 2, 3]]}, "in exactly one group"),
    "both": ({"axis_index_groups": [[0, 1], [2, 3]], "group_size": 6}, "are both given"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        jbn.bn_forward(None, jbn.bn_init(C)[1], Setting().x, True, **options)


@pytest.mark.parametrize("case", ERRORS_ACROSS)
def test_errors_across_shards(case):
    options, message = ERRORS_ACROSS[case]
    options = dict(options)
    x = split(options.pop("x", Setting().x))
    with pytest.raises(ValueError, match=message):
        jax.vmap(
            lambda x: jbn.bn_forward(None, jbn.bn_init(C)[1], x, True, axis_name="data", **options), axis_name="data"
        )(x)


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], 2, [[0, 1], [2, 3.5]], "0123"], ids=str)
def test_groups_of_the_wrong_kind(groups):
    with pytest.raises(TypeError, match=r"axis_index_groups is .*; expected lists of integers"):
        ACROSS["vmap"](Setting(), axis_index_groups=groups)
