"""Moments that layers sow: differentiable, of valid positions, and only where they are asked for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from tests.support.oracle import tolerance


def assert_close(got, want, scale=1.0):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(np.float32, 8, scale))


def sow_linen(x, mask=None, *, train=False):
    layer = jbn.linen.BatchNorm(use_running_average=not train, sow_moments=True)
    variables = layer.init(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mask=mask, mutable=["intermediates", "batch_stats"])
    (seen,) = new["intermediates"]["moments"]
    return seen


def sow_nnx(x, mask=None, *, train=False):
    layer = jbn.nnx.BatchNorm(x.shape[-1], use_running_average=not train, sow_moments=True, rngs=nnx.Rngs(0))
    _, sown = nnx.capture(lambda layer: layer(x, mask=mask), nnx.Intermediate)(layer)
    (seen,) = sown["moments"]
    return seen


DOORS = {"linen": sow_linen}
if hasattr(nnx, "capture"):
    DOORS["nnx"] = sow_nnx


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_sown_moments_are_those_of_valid_rows_and_differentiable(door, train):
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32) + 10
    mask = (np.arange(8) < 6)[:, None]
    x[6:] = np.nan

    def loss(x):
        seen = DOORS[door](x, jnp.asarray(mask), train=train)
        return (seen.mean**2).sum() + seen.var.sum(), seen

    slope, seen = jax.grad(loss, has_aux=True)(jnp.asarray(x))
    valid = x[:6].astype(np.float64)
    mean, var = valid.mean(0), valid.var(0)
    assert_close(seen.mean, mean, scale=10)
    assert_close(seen.var, var)
    want = np.zeros((8, 3))
    want[:6] = (2 * mean + 2 * (valid - mean)) / 6
    assert_close(slope, want, scale=10)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))


def test_a_model_of_flax_sows_inside_replace_and_nothing_outside():
    net, x = Net(), jnp.ones((8, 3))
    variables = net.init(jax.random.key(0), x)
    with jbn.linen.replace(sow_moments=True):
        assert "intermediates" not in net.init(jax.random.key(0), x)
        _, sown = net.apply(variables, x, mutable=["intermediates"], capture_intermediates=True)
    layer = sown["intermediates"]["BatchNorm_0"]
    assert len(layer["__call__"]) == len(layer["moments"]) == 1  # of the layer, not of what stands in for it too
    with jbn.linen.replace():
        assert not jax.tree.leaves(net.apply(variables, x, mutable=["intermediates"])[1])


def test_moments_in_training_are_those_of_all_shards():
    layer = jbn.linen.BatchNorm(use_running_average=False, axis_name="shards", sow_moments=True)
    x = jnp.arange(24.0).reshape(4, 2, 3)
    variables = layer.init(jax.random.key(0), x[0])
    mutable = ["intermediates", "batch_stats"]
    _, new = jax.vmap(lambda x: layer.apply(variables, x, mutable=mutable), axis_name="shards")(x)
    (seen,) = new["intermediates"]["moments"]
    assert_close(seen.mean, np.broadcast_to(np.arange(24.0).reshape(8, 3).mean(0), (4, 3)))
    layer = layer.clone(use_running_average=True)  # where the axis need not be bound
    _, new = layer.apply(variables, x[0], mutable=["intermediates"])
    assert_close(new["intermediates"]["moments"][0].mean, np.arange(6.0).reshape(2, 3).mean(0))


@pytest.mark.parametrize("flag", ["unbiased", "sow_moments"])
def test_a_flag_is_true_or_false(flag):
    x = np.ones((4, 3), np.float32) * np.arange(4, dtype=np.float32)[:, None]
    variables = jbn.linen.BatchNorm(False).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match=f"{flag} is 'no' of type str; expected True or False"):
        jbn.linen.BatchNorm(False, **{flag: "no"}).apply(variables, x, mutable=["batch_stats", "intermediates"])
    with pytest.raises(TypeError, match=f"{flag} is 'no' of type str; expected True or False"):
        jbn.nnx.BatchNorm(3, **{flag: "no"}, rngs=nnx.Rngs(0))(x, use_running_average=False)
