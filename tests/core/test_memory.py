"""What is kept for the backward pass: x in its own dtype, the residual if there is one, and vectors."""

import jax
import jax.numpy as jnp
import pytest

import jbn
import jbn.linen

pytestmark = pytest.mark.core

X = jax.ShapeDtypeStruct((32, 16, 16, 64), jnp.bfloat16)
MASK = jax.ShapeDtypeStruct((32, 16, 16, 1), jnp.bool_)


def kept(f, *shapes) -> float:
    """Return the bytes of the arrays that ``jax.vjp`` keeps, in bytes of x."""
    leaves = jax.eval_shape(lambda *args: jax.tree.leaves(jax.vjp(f, *args)[1]), *shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / (X.size * X.dtype.itemsize)


def forward(x, *, train=True, **options):
    params, state = jbn.bn_init(64)
    return jbn.bn_forward(params, state, x, train, **options)[0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "activation", [None, jax.nn.relu, jax.nn.silu, jax.nn.gelu], ids=["none", "relu", "silu", "gelu"]
)
def test_x_alone(wrap, train, activation):
    assert kept(wrap(lambda x: forward(x, train=train, activation=activation)), X) <= 1.02


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_x_and_the_residual(wrap):
    assert kept(wrap(lambda x, r: forward(x, residual=r, activation=jax.nn.relu)), X, X) <= 2.02
    assert kept(wrap(lambda x, r: forward(x, residual=r)), X, X) <= 1.02


def test_x_and_the_mask():
    assert kept(lambda x, m: forward(x, mask=m, activation=jax.nn.relu), X, MASK) <= 1.03


def test_a_learned_slope_is_kept_and_nothing_more():
    slope = jnp.full((1, 1, 1, 64), 0.1)

    def f(x, slope):
        return forward(x, activation=lambda z: jnp.where(z > 0, z, slope * z))

    assert kept(f, X, slope) <= 1.02


def test_linen_and_the_parameters():
    layer = jbn.linen.BatchNorm(False, activation=jax.nn.relu)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)

    def f(params, x):
        return layer.apply({**variables_of(variables), "params": params}, x, mutable=["batch_stats"])[0]

    assert kept(f, variables["params"], X) <= 1.02


def variables_of(shapes):
    return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)


def test_the_peer_keeps_more():
    """The measure itself is tested: Flax is known to keep two float32 arrays, 4 times x."""
    import flax.linen as nn

    layer = nn.BatchNorm(False, dtype=jnp.bfloat16)
    variables = variables_of(jax.eval_shape(layer.init, jax.random.key(0), X))
    assert kept(lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0], X) >= 3.9
    assert kept(lambda x: x + x, X) == 0


def network(kernels, x):
    """Return the loss and the states of three times product, normalization and ReLU."""
    states = []
    for kernel in kernels:
        x, state = jbn.bn_forward(*jbn.bn_init(64), x @ kernel, True, activation=jax.nn.relu)
        states.append(state)
    return jnp.square(x).mean(), states


def test_a_rematerialized_network_keeps_what_normalizations_read():
    """Without the policy the input of each product is kept beside that of each normalization."""
    kernels = (jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),) * 3

    def loss(kernels, x):
        return network(kernels, x)[0]

    assert kept(loss, kernels, X) >= 5.9
    assert 4.0 <= kept(jax.checkpoint(loss, policy=jbn.remat_policy()), kernels, X) <= 4.05


@pytest.mark.parametrize("train", [True, False])
def test_nothing_is_taken_twice_in_a_rematerialized_network(train):
    """Neither products nor statistics: what runs again is element by element."""
    kernel, x = jnp.eye(64), jnp.ones((32, 64))

    def loss(kernel, x):
        y, new = jbn.bn_forward(*jbn.bn_init(64), x @ kernel, train, activation=jax.nn.relu)
        return jnp.square(y @ kernel).mean(), new

    def counts(loss):
        lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(kernel, x)
        return lowered.as_text().count("dot_general"), lowered.compile().as_text().count(" conditional(")

    leaner = jax.checkpoint(loss, policy=jbn.remat_policy())
    dots, conditionals = counts(loss)
    assert counts(leaner) == (dots, conditionals)
    assert conditionals == train
