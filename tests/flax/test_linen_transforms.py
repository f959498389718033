"""The Linen module under Flax's lifted transforms, shared, initialized twice and with partitioned parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn.linen

MINE, THEIRS = jbn.linen.BatchNorm, nn.BatchNorm
X = jax.random.normal(jax.random.key(0), (3, 16, 4)) * 2 + 1


def close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), a, b)


def run(model, x, **options):
    """Return initial variables, output, new statistics and gradients."""
    variables = model.init(jax.random.key(1), x, **options)

    def loss(params):
        y, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"], **options)
        return (y**3).sum(), (y, new)

    grads, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
    return variables, y, new, grads


def ensemble(norm):
    """Members with statistics of their own, as flax.linen documents it."""
    return nn.vmap(
        norm, in_axes=0, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
    )(use_running_average=False)  # fmt: skip


def shared_batch(norm):
    """One set of statistics over a mapped axis."""
    return nn.vmap(
        norm, in_axes=0, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False},
        axis_name="batch",
    )(use_running_average=False, axis_name="batch")  # fmt: skip


def layers(norm):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(norm(use_running_average=False)(nn.Dense(4)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
            )
            return scanned()(x[0], None)[0]

    return Model()


def wrapped(transform):
    def make(norm):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(4)(x[0])
                return transform(norm)(use_running_average=False, name="norm")(x)

        return Model()

    return make


def shared_module(norm):
    class Model(nn.Module):
        def setup(self):
            self.norm = norm(use_running_average=False)

        def __call__(self, x):
            return self.norm(x[0]) + self.norm(2 * x[1])

    return Model()


@pytest.mark.parametrize(
    "make",
    [ensemble, shared_batch, layers, wrapped(nn.remat), wrapped(nn.jit), shared_module],
    ids=["vmap ensemble", "vmap shared", "scan", "remat", "jit", "shared module"],
)
def test_it_does_what_flax_s_layer_does(make):
    close(run(make(MINE), X), run(make(THEIRS), X), atol=2e-4)


def test_initialized_twice():
    layer = MINE(False)
    first = layer.init(jax.random.key(0), X)
    _, again = layer.apply(first, X, mutable=["batch_stats"])
    second = layer.init(jax.random.key(0), X)
    close(first, second)
    assert np.abs(again["batch_stats"]["mean"]).max() > 0


def test_partitioned_initializers():
    layer = MINE(
        use_running_average=False,
        scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
    )
    variables = layer.init(jax.random.key(0), X)
    specs = nn.get_partition_spec(variables)
    assert specs["params"]["scale"] == P("model")
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = nn.get_sharding(variables, mesh)
    placed = jax.device_put(nn.unbox(variables), nn.unbox(shardings))
    x = jax.device_put(X.reshape(-1, 4), jax.NamedSharding(mesh, P("data", "model")))
    y, new = jax.jit(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]))(placed, x)
    want, same = layer.apply(nn.unbox(variables), X.reshape(-1, 4), mutable=["batch_stats"])
    close((y, new), (want, same))


def test_sow_and_intercept_see_it():
    seen = []

    def intercept(call, args, kwargs, context):
        seen.append(type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        MINE(False).init(jax.random.key(0), X)
    assert seen == [MINE]
    _, state = MINE(False).apply(
        MINE(False).init(jax.random.key(0), X), X, capture_intermediates=True, mutable=["batch_stats", "intermediates"]
    )
    assert "__call__" in state["intermediates"]


def test_residual_and_activation():
    layer = MINE(False, activation=nn.relu)
    variables = layer.init(jax.random.key(0), X)
    y, _ = layer.apply(variables, X, residual=X, mutable=["batch_stats"])
    plain, _ = MINE(False).apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, nn.relu(plain + X), atol=1e-5)


@pytest.mark.parametrize("evaluate", [True, False])
def test_eval_shape_and_tabulate(evaluate):
    layer = MINE(evaluate)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.bfloat16))
    assert shapes["batch_stats"]["mean"].shape == (4,)
    assert "batch_stats" in nn.tabulate(layer, jax.random.key(0))(X)
