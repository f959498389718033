"""What an activation may hold: everything it holds is seen at every call, and differentiated."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
from jbn.core.activation import _is_plain

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


def test_partials_and_closures_over_numbers_are_plain():
    slope, weight = 0.2, jnp.float32(0.2)
    assert _is_plain(partial(leaky, slope=0.2))
    assert _is_plain(lambda z: leaky(z, slope))
    assert all(
        map(_is_plain, (jax.nn.relu, jax.nn.silu, jax.nn.gelu, jnp.tanh, partial(jax.nn.gelu, approximate=False)))
    )
    assert not _is_plain(partial(leaky, slope=weight))
    assert not _is_plain(lambda z: leaky(z, weight))
    assert not _is_plain(Learned(0.2))


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
