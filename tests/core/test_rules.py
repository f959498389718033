"""Rules that the text of a program has not: those inside of the rules of derivatives, and those for ``jax.vmap``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
STATE = jbn.bn_init(4)[1]


def jvp_in_jvp(curvature):
    """Return sin, whose slope has a slope of its own: a second derivative of ``curvature``."""
    slope = jax.custom_jvp(jnp.cos)
    slope.defjvp(lambda z, dz: (slope(*z), curvature * dz[0]))
    f = jax.custom_jvp(jnp.sin)
    f.defjvp(lambda z, dz: (f(*z), slope(*z) * dz[0]))
    return f


def vjp_in_vjp(curvature):
    slope = jax.custom_vjp(jnp.cos)
    slope.defvjp(lambda z: (jnp.cos(z), ()), lambda _, g: (curvature * g,))
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda z: (jnp.sin(z), z), lambda z, g: (slope(z) * g,))
    return f


def third_in_jvp(curvature):
    """Return sin, with the rule one order further in."""
    inner = jvp_in_jvp(curvature)
    f = jax.custom_jvp(jnp.sin)
    f.defjvp(lambda z, dz: (f(*z), inner(*z) * dz[0]))
    return f


def jvp_in_a_loop(curvature):
    """Return sin, whose slope, with a rule of its own, is computed in a loop."""
    slope = jax.custom_jvp(jnp.cos)
    slope.defjvp(lambda z, dz: (slope(*z), curvature * dz[0]))
    f = jax.custom_jvp(jnp.sin)
    f.defjvp(lambda z, dz: (f(*z), jax.lax.scan(lambda c, _: (slope(c), None), z[0], None, length=1)[0] * dz[0]))
    return f


def derivative(f, order):
    def loss(bias):
        return jbn.batch_norm(X, None, bias, activation=f)[0].sum()

    for _ in range(order):
        loss = (lambda inner: lambda bias: jax.grad(inner)(bias).sum())(loss)
    return loss(jnp.zeros(4))


@pytest.mark.parametrize("over", [float, jnp.float32])
@pytest.mark.parametrize(
    ("rule", "order"),
    [(jvp_in_jvp, 2), (vjp_in_vjp, 2), (third_in_jvp, 3)],
    ids=["jvp", "vjp", "third"],
)
def test_the_rule_of_a_slope_decides_the_derivative_after_it(rule, order, over):
    for curvature in (2.0, 3.0):
        np.testing.assert_allclose(derivative(rule(over(curvature)), order), X.size * curvature, rtol=1e-6)


@pytest.mark.parametrize("over", [float, jnp.float32])
def test_the_rule_of_a_slope_in_a_loop(over):
    """In forward mode, because the reverse mode of JAX before 0.12 takes no notice of such a rule."""
    for curvature in (2.0, 3.0):
        f = jvp_in_a_loop(over(curvature))
        second = jax.jacfwd(jax.jacfwd(lambda shift: jbn.batch_norm(X, None, shift.repeat(4), activation=f)[0].sum()))  # noqa: B023
        np.testing.assert_allclose(second(jnp.zeros(1)), X.size * curvature, rtol=1e-6)


@pytest.mark.parametrize("over", [float, jnp.float32])
def test_which_function_has_which_rule_decides(over):
    """The same rules, in other places or another number of times, are other functions."""
    for curvatures in [(2.0, 3.0, 2.0), (2.0, 3.0, 3.0), (3.0, 2.0, 2.0)]:
        parts = [jvp_in_jvp(over(curvature)) for curvature in curvatures]
        found = derivative(lambda z: parts[0](z) + parts[1](2 * z) + parts[2](3 * z), 2)  # noqa: B023
        want = sum(c * k**2 for c, k in zip(curvatures, (1, 2, 3), strict=True))
        np.testing.assert_allclose(found, X.size * want, rtol=1e-6)


def test_the_rule_of_a_slope_in_a_choice():
    def choose(curvature):
        f = jvp_in_jvp(curvature)
        return lambda batch, running, epsilon: dataclasses.replace(batch, var=batch.var + 0.1 * f(batch.var))

    def second(curvature):
        def loss(x):
            return (jbn.bn_forward(None, STATE, x, True, normalize_by=choose(curvature))[0] ** 3).sum()

        return jax.jvp(jax.grad(loss), (jnp.asarray(X),), (jnp.cos(X),))[1]

    def plain(curvature):
        f = jvp_in_jvp(curvature)

        def loss(x):
            var = x.var(0, keepdims=True)
            return (((x - x.mean(0, keepdims=True)) * jax.lax.rsqrt(var + 0.1 * f(var) + 1e-5)) ** 3).sum()

        return jax.jvp(jax.grad(loss), (jnp.asarray(X),), (jnp.cos(X),))[1]

    for curvature in (2.0, 30.0):
        want = plain(curvature)
        np.testing.assert_allclose(second(curvature), want, atol=1e-5 * np.abs(want).max())


def mapped(factor):
    """Return sin, which is ``factor`` · sin under ``jax.vmap``."""
    f = jax.custom_batching.custom_vmap(jnp.sin)
    f.def_vmap(lambda size, is_mapped, z: (factor * jnp.sin(z), True))
    return f


def under_vmap(f):
    return jax.vmap(lambda x: jbn.batch_norm(x, activation=f)[0])(jnp.stack([X, 2 * X]))[0]


@pytest.mark.parametrize("over", [float, jnp.float32])
def test_the_rule_for_vmap_decides_what_is_computed_there(over):
    want = np.sin(jbn.batch_norm(X)[0])
    for factor in (2.0, 3.0):
        f = mapped(over(factor))
        np.testing.assert_allclose(jbn.batch_norm(X, activation=f)[0], want, atol=1e-5)
        np.testing.assert_allclose(under_vmap(f), factor * want, atol=1e-5)


def test_a_rule_for_vmap_is_read_again_at_every_call():
    """The function that has it may read an array too."""
    shift, factor = jnp.full((1, 4), 0.5), 2.0
    f = jax.custom_batching.custom_vmap(lambda z: z + shift)
    f.def_vmap(lambda size, is_mapped, z: (factor * z, True))
    alone = jax.custom_jvp(f)  # its derivative has nothing of f
    alone.defjvp(lambda z, dz: (alone(*z), dz[0]))
    want, _ = jbn.batch_norm(X)
    for factor in (2.0, 3.0):
        for function in (f, alone):
            np.testing.assert_allclose(under_vmap(function), factor * want, atol=1e-5)


def test_a_rule_for_vmap_that_is_not_for_all_arguments():
    """Two rules that refuse to be mapped over everything are told apart too, and hinder nobody who maps less."""

    def fixed(factor):
        weight = jnp.full((1, 4), 0.5)
        f = jax.custom_batching.custom_vmap(lambda z, weight: weight * z)

        @f.def_vmap
        def _(size, is_mapped, z, weight):
            if is_mapped[1]:
                raise NotImplementedError
            return factor * weight[None] * z, True

        return lambda z: f(z, weight)

    want = 0.5 * jbn.batch_norm(X)[0]
    for factor in (2.0, 3.0):
        np.testing.assert_allclose(jbn.batch_norm(X, activation=fixed(factor))[0], want, atol=1e-5)
        np.testing.assert_allclose(under_vmap(fixed(factor)), factor * want, atol=1e-5)


@pytest.mark.parametrize("call", [lambda f: derivative(f, 2), lambda f: derivative(f, 1)], ids=["second", "first"])
@pytest.mark.parametrize("rule", [jvp_in_jvp, vjp_in_vjp, mapped], ids=["jvp", "vjp", "vmap"])
def test_a_traced_array_in_such_a_rule_is_refused(rule, call):
    """The calls after it, of other numbers, are not harmed."""
    with pytest.raises(TypeError, match=r"activation has a rule, in another one .* that reads a traced array"):
        jax.jit(lambda number: call(rule(number)))(2.0)
    jbn.batch_norm(X, activation=rule(4.0))


def test_a_traced_array_in_a_rule_whose_inner_rules_are_not_needed():
    """A rule that returns f itself has it inside, where no derivative comes from it."""

    def gradient(number):
        f = jax.custom_jvp(jnp.sin)
        f.defjvp(lambda z, dz: (f(*z), number * dz[0]))
        return derivative(f, 1)

    np.testing.assert_allclose(jax.jit(gradient)(2.0), 2 * X.size, rtol=1e-6)


def test_rules_beside_numbers_that_have_no_tangents():
    """Whole numbers and keys, which an activation and the rule of a slope read."""

    def random(seed):
        slope = jax.custom_jvp(lambda z, order: jnp.cos(z))
        key = jax.random.key(seed)
        slope.defjvp(lambda z, dz: (slope(*z), jax.random.normal(key, dz[0].shape) * dz[0]))
        f = jax.custom_jvp(lambda z, order: jnp.sin(z))
        f.defjvp(lambda z, dz: (f(*z), slope(*z)[:, z[1]] * dz[0]))
        order = jnp.array([1, 0, 3, 2])
        return jax.random.normal(key, X.shape).sum(), lambda z: f(z, order)

    for seed in range(2):
        want, f = random(seed)
        np.testing.assert_allclose(derivative(f, 2), want, rtol=1e-5)


def test_rules_without_an_end():
    def order(n):
        f = jax.custom_jvp(lambda z: jnp.full_like(z, n))
        f.defjvp(lambda z, dz: (f(*z), order(n + 1)(*z) * dz[0]))
        return f

    np.testing.assert_allclose(derivative(order(1.0), 2), 3 * X.size, rtol=1e-6)


def test_equal_rules_are_one():
    """Functions made anew, whose rules do the same, compile nothing."""
    events: list[str] = []
    derivative(jvp_in_jvp(5.0), 1)
    jax.monitoring.register_event_duration_secs_listener(lambda name, _seconds, **_: events.append(name))
    try:
        derivative(jvp_in_jvp(5.0), 1)
        assert not [name for name in events if "backend_compile" in name]
        derivative(jvp_in_jvp(6.0), 1)
        assert [name for name in events if "backend_compile" in name]
    finally:
        jax.monitoring.clear_event_listeners()
