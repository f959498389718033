"""What an activation may hold: everything it holds is seen at every call, and differentiated."""

import gc
import weakref
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

pytestmark = pytest.mark.core

X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
PLAIN = jbn.batch_norm(X)[0]


def leaky(z, slope):
    return jnp.where(z > 0, z, slope * z)


class Learned:
    """A slope that somebody changes from outside."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, z):
        return leaky(z, self.slope)

    def method(self, z):
        return leaky(z, self.slope)


@pytest.mark.parametrize("pick", [lambda a: a, lambda a: a.method], ids=["object", "method"])
def test_an_object_is_read_again_at_every_call(pick):
    act = Learned(0.3)
    for slope in (0.3, 5.0):
        act.slope = slope
        np.testing.assert_allclose(jbn.batch_norm(X, activation=pick(act))[0], leaky(PLAIN, slope), atol=1e-6)

    def loss(slope):
        act.slope = slope
        return jbn.batch_norm(X, activation=pick(act))[0].sum()

    np.testing.assert_allclose(jax.grad(loss)(2.0), jnp.where(PLAIN > 0, 0, PLAIN).sum(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Flax 0.12.0's NNX uses old names of jax
def test_an_nnx_module_is_read_again_at_every_call():
    from flax import nnx

    act = nnx.PReLU(0.1)
    np.testing.assert_allclose(jbn.batch_norm(X, activation=act)[0], leaky(PLAIN, 0.1), atol=1e-6)
    nnx.update(act, {"negative_slope": jnp.float32(2.0)})
    np.testing.assert_allclose(jbn.batch_norm(X, activation=act)[0], leaky(PLAIN, 2.0), atol=1e-6)


def test_a_callable_that_cannot_be_hashed():
    class Unhashable(Learned):
        __hash__ = None

    np.testing.assert_allclose(jbn.batch_norm(X, activation=Unhashable(0.3))[0], leaky(PLAIN, 0.3), atol=1e-6)


def _default(slope):
    return lambda z, slope=slope: leaky(z, slope)


def _keyword(slope):
    return lambda z, *, slope=slope: leaky(z, slope)


def _wraps(slope):
    return wraps(jax.nn.relu)(lambda z: leaky(z, slope))


def _global(slope):
    room = {"slope": slope, "leaky": leaky}
    exec("def act(z): return leaky(z, slope)", room)  # a function with globals of its own
    return room["act"]


def _rule(slope):
    @jax.custom_jvp
    def act(z, slope):
        return leaky(z, slope)

    def rule(primals, tangents):
        (z, slope), (dz, dslope) = primals, tangents
        return leaky(z, slope), jnp.where(z > 0, dz, slope * dz + z * dslope)

    act.defjvp(rule)
    return lambda z: act(z, slope)


def _backward(slope):
    act = jax.custom_vjp(leaky)
    act.defvjp(lambda z, s: (leaky(z, s), (z, s)), lambda kept, g: jax.vjp(leaky, *kept)[1](g))
    return lambda z: act(z, slope)


HOLDERS = {
    "closure": lambda slope: lambda z: leaky(z, slope),
    "default": _default,
    "keyword default": _keyword,
    "functools.wraps": _wraps,
    "global": _global,
    "partial": lambda slope: partial(leaky, slope=slope),
    "partial method": lambda slope: partial(Learned.method, Learned(slope)),
    "attribute": Learned,
    "method": lambda slope: Learned(slope).method,
    "inner jit": lambda slope: jax.jit(lambda z: leaky(z, slope)),
    "checkpoint": lambda slope: jax.checkpoint(lambda z: leaky(z, slope)),
    "checkpoint of jit": lambda slope: jax.checkpoint(jax.jit(lambda z: leaky(z, slope))),
    "rule forward": _rule,
    "rule backward": _backward,
    "condition": lambda slope: lambda z: jax.lax.cond(z.sum() < 1e9, lambda: leaky(z, slope), lambda: z),
    "scan": lambda slope: lambda z: jax.lax.scan(lambda c, _: (c, None), leaky(z, slope), None, length=2)[0],
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("train", [True, False])
def test_a_learned_slope_is_differentiated_wherever_it_is_held(holder, train):
    params, state = jbn.Params(jnp.ones(4), jnp.zeros(4)), jbn.State(jnp.ones(4), jnp.ones(4) * 2)

    def loss(slope, x, inside):
        y = jbn.bn_forward(params, state, x, train, activation=holder(slope) if inside else None)[0]
        return ((y if inside else leaky(y, slope)) ** 2).sum()

    want, want_x = jax.grad(loss, (0, 1))(0.3, X, False)
    for f in (jax.grad(loss, (0, 1)), jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)):
        got, got_x = f(0.3, X, True)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(got_x, want_x, atol=1e-4)


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_an_eager_call_sees_the_number_of_now(holder):
    for slope in (0.1, 0.5, jnp.float32(0.7), np.float32(0.9)):
        got = jbn.batch_norm(X, activation=holder(slope))[0]
        np.testing.assert_allclose(got, leaky(PLAIN, slope), atol=1e-6)


def test_a_number_that_changes_in_a_closure():
    slope = 0.1

    def act(z):
        return leaky(z, slope)

    np.testing.assert_allclose(jbn.batch_norm(X, activation=act)[0], leaky(PLAIN, 0.1), atol=1e-6)
    slope = 0.5
    np.testing.assert_allclose(jbn.batch_norm(X, activation=act)[0], leaky(PLAIN, 0.5), atol=1e-6)


def test_what_stands_in_the_place_of_a_function_of_jax_is_read_again(monkeypatch):
    slope = 0.1
    monkeypatch.setattr(jax.nn, "relu", lambda z: leaky(z, slope))
    jax.nn.relu.__name__ = "relu"
    np.testing.assert_allclose(jbn.batch_norm(X, activation=jax.nn.relu)[0], leaky(PLAIN, 0.1), atol=1e-6)
    slope = 0.5
    np.testing.assert_allclose(jbn.batch_norm(X, activation=jax.nn.relu)[0], leaky(PLAIN, 0.5), atol=1e-6)


def test_two_meshes_that_read_alike_are_two():
    for devices in np.split(np.array(jax.devices()[:8]), 2):
        placed = NamedSharding(Mesh(devices, "d"), P("d"))
        y = jbn.batch_norm(
            jax.device_put(X, placed),
            activation=lambda z, placed=placed: jax.lax.with_sharding_constraint(leaky(z, 0.1), placed),
        )[0]
        assert y.devices() == set(devices)
        np.testing.assert_allclose(y, leaky(PLAIN, 0.1), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Flax 0.12.0's NNX uses old names of jax
def test_an_activation_that_changes_what_is_outside_is_named():
    from flax import errors, nnx

    with pytest.raises(errors.TraceContextError) as error:
        jbn.batch_norm(X, activation=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert any("while activation was traced" in note for note in error.value.__notes__)


def gradient_of_bias(act):
    return jax.grad(lambda bias: jbn.batch_norm(X, None, bias, activation=act)[0].sum())(jnp.zeros(4))


def test_a_rule_that_changes_decides_the_derivative():
    """Two functions with one value and two rules are two activations."""
    for slope in (1.0, 3.0):
        act = jax.custom_jvp(lambda z: z)
        act.defjvp(lambda primals, tangents, slope=slope: (primals[0], slope * tangents[0]))
        np.testing.assert_allclose(gradient_of_bias(act), 16 * slope, rtol=1e-6)
    for slope in (1.0, 3.0):
        act = jax.custom_vjp(lambda z: z)
        act.defvjp(lambda z: (z, ()), lambda _, g, slope=slope: (slope * g,))
        np.testing.assert_allclose(gradient_of_bias(act), 16 * slope, rtol=1e-6)


def _in_shard_map(function):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def _in_scan(function):
    return lambda z: jax.lax.scan(lambda c, _: (function(c), None), z, None, length=1)[0]


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, _in_shard_map, _in_scan])
@pytest.mark.parametrize("jitted", [True, False])
def test_what_a_program_holds_inside_decides(wrap, jitted):
    """Numbers, rules and functions of the host, wherever they are, tell activations apart, in one program too."""

    def plain(slope):
        return wrap(lambda z: z * slope)

    def by_rule(slope):
        act = jax.custom_vjp(lambda z: z)
        act.defvjp(lambda z: (z, ()), lambda _, g: (slope * g,))
        return wrap(act)

    def by_host(slope):
        act = jax.custom_vjp(lambda z: z)
        host = lambda g: np.asarray(g) * np.float32(slope)  # noqa: E731
        act.defvjp(lambda z: (z, ()), lambda _, g: (jax.pure_callback(host, jax.typeof(g), g),))
        return wrap(act)

    for make in (plain, by_rule, by_host):

        def gradients(make=make):
            return [gradient_of_bias(make(slope)) for slope in (1.0, 3.0)]

        for slope, found in zip((1.0, 3.0), (jax.jit(gradients) if jitted else gradients)(), strict=True):
            np.testing.assert_allclose(found, np.full(4, 16 * slope), rtol=1e-6)


def test_a_rule_decides_the_derivative_of_what_the_activation_holds_too():
    for slope in (1.0, 3.0):
        act = jax.custom_vjp(lambda w: w)
        act.defvjp(lambda w: (w, ()), lambda _, g, slope=slope: (slope * g,))
        loss = lambda w, act=act: jbn.batch_norm(X, None, jnp.ones(4), activation=lambda z: z * act(w))[0].sum()  # noqa: E731
        np.testing.assert_allclose(jax.grad(loss)(2.0), 64 * slope, rtol=1e-5)


def _rule_over(slope):
    act = jax.custom_jvp(jnp.sign)
    act.defjvp(lambda primals, tangents: (jnp.sign(primals[0]), slope * tangents[0]))
    return act


def test_an_array_that_a_rule_alone_holds_is_seen():
    def gradient(slope):
        return gradient_of_bias(_rule_over(slope))

    for slope in (0.3, 2.0):
        np.testing.assert_allclose(jax.jit(gradient)(slope), 16 * slope, rtol=1e-6)
        np.testing.assert_allclose(gradient(jnp.float32(slope)), 16 * slope, rtol=1e-6)


def _backward_over(slope):
    act = jax.custom_vjp(jnp.sign)
    act.defvjp(lambda z: (jnp.sign(z), ()), lambda _, g: (slope * g,))
    return act


def _value_loops_over(_):
    array = jnp.full((1, 4), 0.3)
    act = jax.custom_jvp(_in_scan(jax.jit(lambda z: z * array)))
    act.defjvp(lambda primals, tangents: (primals[0], tangents[0]))  # a rule that has nothing of the array
    return act


def _rule_loops_over(_):
    array, act = jnp.full((1, 4), 0.3), jax.custom_jvp(lambda z: z)
    scale = jax.jit(lambda t: t * array)
    act.defjvp(lambda primals, tangents: (primals[0], _in_scan(scale)(tangents[0])))
    return act


def _value_over(slope):
    act = jax.custom_jvp(lambda z: slope * z)
    act.defjvp(lambda primals, tangents: (slope * primals[0], slope * tangents[0]))
    return act


def _loop_over(slope):
    scale = jax.jit(lambda z: z * slope)
    return lambda z: jax.lax.fori_loop(0, 2, lambda _, z: scale(z), z)


@pytest.mark.parametrize(
    ("holder", "message"),
    [
        (_value_over, "derivative rule of its own"),
        (lambda slope: jax.checkpoint(_value_over(slope)), "derivative rule of its own"),
        (_value_loops_over, "compiled function inside a loop"),
        (_rule_loops_over, "compiled function inside a loop"),
        (_backward_over, "jax.custom_vjp whose backward pass reads arrays"),
        (
            lambda slope: _in_scan(_backward_over(jnp.full((1, 4), 0.3))),
            "jax.custom_vjp whose backward pass reads arrays",
        ),
    ],
    ids=["value", "checkpoint", "value with a loop", "rule with a loop", "backward", "backward in a loop"],
)
def test_what_cannot_be_followed_is_refused_with_the_way_out(holder, message):
    def loss(slope):
        return jbn.batch_norm(X, activation=holder(slope))[0].sum()

    with pytest.raises(TypeError, match=message):
        jax.grad(loss)(0.3)


def test_a_loop_over_a_compiled_function():
    def loss(slope):
        return (jbn.batch_norm(X, activation=_loop_over(slope))[0] ** 2).sum()

    np.testing.assert_allclose(jax.jvp(loss, (0.3,), (1.0,))[1], 4 * 0.3**3 * (PLAIN**2).sum(), rtol=1e-5)


@pytest.mark.skipif(not hasattr(jax.config, "jax_use_simplified_jaxpr_constants"), reason="not in this version of jax")
def test_arrays_that_a_program_holds_as_literals_are_seen():
    """JAX can write arrays into programs, in whose text they are all "[...]"."""
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    try:
        for slope in (0.1, 0.5):
            for array in (np.full((1, 4), slope, np.float32), jnp.full((1, 4), slope)):
                for act in (lambda z, s=array: leaky(z, s), jax.jit(lambda z, s=array: leaky(z, s))):
                    y = jbn.batch_norm(X, activation=act)[0]
                    np.testing.assert_allclose(y, leaky(PLAIN, slope), atol=1e-6)
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", before)


def test_equal_programs_are_one():
    """A new function that does what one before did compiles nothing, whatever arrays it holds."""
    events: list[str] = []
    one, other = jnp.full((1, 4), 0.2), jnp.full((1, 4), 0.4)
    jbn.batch_norm(X, activation=lambda z: leaky(z, one))
    jax.monitoring.register_event_duration_secs_listener(lambda name, _seconds, **_: events.append(name))
    try:
        y, _ = jbn.batch_norm(X, activation=lambda z: leaky(z, other))
        assert not [name for name in events if "backend_compile" in name]
        jbn.batch_norm(X, activation=lambda z: leaky(z, other) * 2)
        assert [name for name in events if "backend_compile" in name]
    finally:
        jax.monitoring.clear_event_listeners()
    np.testing.assert_allclose(y, leaky(PLAIN, other), atol=1e-6)


def test_arrays_are_not_kept_alive():
    slope = jnp.full((1, 4), 0.3) + 0
    for train in (True, False):
        jbn.bn_forward(None, jbn.bn_init(4)[1], X, train, activation=lambda z, slope=slope: leaky(z, slope))
    kept = weakref.ref(slope)
    del slope
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", [P(), P("d")], ids=["shared slope", "slope of each shard"])
def test_a_learned_slope_in_shard_map(check_vma, spec):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    weight = jnp.full(4, 0.3)

    def local(x, w):
        return jbn.batch_norm(x, activation=lambda z: jnp.where(z > 0, z, w[:1, None] * z), axis_name="d")[0]

    f = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), spec), out_specs=P("d"), check_vma=check_vma)
    np.testing.assert_allclose(jax.jit(f)(X, weight), leaky(PLAIN, 0.3), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda w: f(X, w).sum()))(weight)
    np.testing.assert_allclose(gradient.sum(), jnp.where(PLAIN > 0, 0, PLAIN).sum(), rtol=1e-5)


def test_nothing_traced_is_kept():
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda w: jbn.batch_norm(X, activation=lambda z: leaky(z, w))[0].sum()))(0.3)
