"""Every derivative that JAX can take, in float64, against autodiff of a plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jbn

pytestmark = pytest.mark.usefixtures("x64")

SHAPE = (5, 2, 3)


def plain(x, scale, bias, residual, mask=None, activation=jax.nn.silu):
    valid = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
    n = valid.sum((0, 1))
    mean = jnp.where(valid, x, 0).sum((0, 1)) / n
    var = (jnp.where(valid, x - mean[None, None], 0) ** 2).sum((0, 1)) / n
    z = (x - mean[None, None]) / jnp.sqrt(var + 1e-5)[None, None] * scale[None, None] + bias[None, None] + residual
    return jnp.where(valid, activation(z), 0), mean, var


def ours(x, scale, bias, residual, mask=None, activation=jax.nn.silu):
    y, m = jbn.batch_norm(x, scale, bias, residual=residual, mask=mask, activation=activation)
    return y, m.mean, m.var


def forward(x, scale, bias, residual, mask=None, activation=jax.nn.silu):
    """The same through ``bn_forward``, with the old state in the place of the moments, which carry no gradient."""
    state = jbn.State(jnp.full(3, 0.3), jnp.full(3, 1.2))
    y, _ = jbn.bn_forward(
        {"scale": scale, "bias": bias}, state, x, True, residual=residual, mask=mask, activation=activation
    )
    _, mean, var = plain(x, scale, bias, residual, mask)
    return y, mean, var


def arguments(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x, residual = (jax.random.normal(key, SHAPE, jnp.float64) for key in keys[:2])
    scale, bias = (jax.random.normal(key, (3,), jnp.float64) + 1 for key in keys[2:])
    return x + 0.7, scale, bias, residual


MASK = np.random.default_rng(0).random((5, 2, 1)) < 0.7
every = pytest.mark.parametrize(
    ("f", "mask"),
    [(ours, None), (ours, MASK), (forward, None), (forward, MASK)],
    ids=["batch_norm", "batch_norm masked", "bn_forward", "bn_forward masked"],
)


def agree(a, b, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=atol), a, b)


def scalar(f, mask):
    """A loss that weighs every output, and the moments, differently."""

    def loss(*args):
        y, mean, var = f(*args, mask=mask)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return (weights * y).sum() + (y**2).mean() + (jnp.arange(3.0) * mean).sum() + (var**2).sum()

    return loss


@every
def test_gradients(f, mask):
    args = arguments()
    agree(jax.grad(scalar(f, mask), (0, 1, 2, 3))(*args), jax.grad(scalar(plain, mask), (0, 1, 2, 3))(*args))


@every
def test_finite_differences(f, mask):
    check_grads(lambda *a: f(*a, mask=mask)[0], arguments(), order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


@every
def test_forward_mode(f, mask):
    args, tangents = arguments(), arguments(1)
    agree(
        jax.jvp(lambda *a: f(*a, mask=mask), args, tangents), jax.jvp(lambda *a: plain(*a, mask=mask), args, tangents)
    )
    agree(jax.jacfwd(scalar(f, mask), (0, 1, 2, 3))(*args), jax.grad(scalar(plain, mask), (0, 1, 2, 3))(*args))
    _, linear = jax.linearize(lambda *a: f(*a, mask=mask), *args)
    agree(linear(*tangents), jax.jvp(lambda *a: plain(*a, mask=mask), args, tangents)[1])


@every
def test_second_derivatives(f, mask):
    args = arguments()
    agree(
        jax.hessian(scalar(f, mask), (0, 1, 2, 3))(*args), jax.hessian(scalar(plain, mask), (0, 1, 2, 3))(*args), 1e-9
    )

    def twice(loss):
        return jax.grad(lambda *a: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1, 2, 3))(*a)), (0, 1, 2, 3))(*args)

    agree(twice(scalar(f, mask)), twice(scalar(plain, mask)), 1e-9)


@every
@pytest.mark.parametrize("mapped", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_vmap_in_every_argument(f, mask, mapped):
    one, two = arguments(), arguments(1)
    args = [jnp.stack([a, b]) if i in mapped else a for i, (a, b) in enumerate(zip(one, two, strict=True))]
    axes = tuple(0 if i in mapped else None for i in range(4))
    for make in (lambda g: scalar(g, mask), lambda g: jax.grad(scalar(g, mask), (0, 1, 2, 3))):
        agree(jax.vmap(make(f), axes)(*args), jax.vmap(make(plain), axes)(*args))


def test_vmap_of_the_mask():
    x, scale, bias, residual = arguments()
    masks = jnp.stack([MASK, ~MASK])
    found = jax.vmap(lambda m: ours(x, scale, bias, residual, m))(masks)
    for i in range(2):
        agree(jax.tree.map(lambda a, i=i: a[i], found), plain(x, scale, bias, residual, masks[i]))


def test_vmap_of_the_state():
    x, scale, bias, _ = arguments()
    states = jbn.State(jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)))

    def run(state, train):
        return jbn.bn_forward({"scale": scale, "bias": bias}, state, x, train)

    for train in (True, False):
        found = jax.vmap(run, (0, None))(states, train)
        for i in range(2):
            one = jax.tree.map(lambda a, i=i: a[i], states)
            agree(jax.tree.map(lambda a, i=i: a[i], found), run(one, train))


@every
def test_scan_and_remat(f, mask):
    x, scale, bias, residual = arguments()

    def deep(g, wrap):
        def loss(x, scale):
            body = wrap(lambda x, s: (g(x, s, bias, residual, mask=mask)[0], None))
            x, _ = jax.lax.scan(body, x, jnp.stack([scale, 2 * scale, scale]))
            return (x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum()

        return jax.grad(loss, (0, 1))(x, scale)

    want = deep(plain, lambda body: body)
    agree(deep(f, lambda body: body), want)
    agree(deep(f, jax.checkpoint), want)


def test_eval_shape():
    params, state = jbn.bn_init(3)
    y, new = jax.eval_shape(lambda x: jbn.bn_forward(params, state, x, True), jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16))
    assert (y.shape, y.dtype) == (SHAPE, jnp.bfloat16)
    assert (new.mean.shape, new.var.dtype) == ((3,), jnp.float32)


def test_evaluation_is_differentiable_in_the_state():
    x, scale, bias, residual = arguments()

    def loss(mean, var, x, scale):
        y, _ = jbn.bn_forward({"scale": scale, "bias": bias}, {"mean": mean, "var": var}, x, False,
                              activation=jax.nn.silu, residual=residual)  # fmt: skip
        return (y**2).sum()

    def reference(mean, var, x, scale):
        z = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias + residual
        return (jax.nn.silu(z) ** 2).sum()

    args = (jnp.arange(3.0), jnp.arange(1.0, 4.0), x, scale)
    with jax.numpy_rank_promotion("allow"):
        agree(jax.grad(loss, (0, 1, 2, 3))(*args), jax.grad(reference, (0, 1, 2, 3))(*args))
        agree(jax.hessian(loss, (0, 1))(*args), jax.hessian(reference, (0, 1))(*args))


def test_no_gradient_through_the_new_state():
    x, scale, bias, _ = arguments()

    def loss(mean, var, x):
        _, new = jbn.bn_forward({"scale": scale, "bias": bias}, {"mean": mean, "var": var}, x, True)
        return new["mean"].sum() + new["var"].sum()

    for gradient in jax.grad(loss, (0, 1, 2))(jnp.zeros(3), jnp.ones(3), x):
        assert not gradient.any()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("order", ["outside", "inside"])
def test_a_learned_slope_is_differentiated(wrap, order):
    x, scale, bias, residual = arguments()

    def loss(f):
        def of(slope):
            act = lambda z: jnp.where(z > 0, z, slope[None, None] * z)  # noqa: E731
            return (f(x, scale, bias, residual, activation=act)[0] ** 2).sum()

        return of

    slope = jnp.array([0.1, 0.2, 0.3])
    if order == "outside":
        agree(wrap(jax.grad(loss(ours)))(slope), jax.grad(loss(plain))(slope))
    else:
        agree(jax.grad(wrap(loss(ours)))(slope), jax.grad(loss(plain))(slope))
    agree(wrap(jax.hessian(loss(ours)))(slope), jax.hessian(loss(plain))(slope))


def test_an_activation_that_closes_over_integers_of_a_trace():
    x, scale, bias, residual = arguments()

    def f(power, s, g):
        return g(s * x, scale, bias, residual, activation=lambda z: z**power)[0]

    agree(jax.jit(f, static_argnums=2)(3, 1.0, ours), f(3, 1.0, plain))
    agree(jax.jit(jax.jacfwd(f, 1), static_argnums=2)(2, 2.0, ours), jax.jacfwd(f, 1)(2, 2.0, plain))
