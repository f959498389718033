"""The NNX module under NNX's transforms, bridged to Linen and back, sharded, abstract, pickled, cloned."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from tests.support import oracle

MINE, THEIRS = jbn.nnx.BatchNorm, nnx.BatchNorm
X = jax.random.normal(jax.random.key(0), (3, 16, 4)) * 2 + 1
ROWS = X[0]


def close(a, b, layers=1):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    bound = oracle.tolerance("float32", X.size // 4, 4 * size * layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), a, b)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), a, b)


def make(norm=MINE, **options):
    return norm(4, rngs=nnx.Rngs(0), use_fast_variance=False, **options)


def doubled(z):
    return 2 * z


def everything(model, *args):
    """Return the output, the gradients of the parameters and the new state."""

    def loss(model):
        y = model(*args)
        return (y**3).sum(), y

    (_, y), grads = nnx.value_and_grad(loss, has_aux=True)(model)
    return y, grads, nnx.state(model)


class Dense(nnx.Module):
    def __init__(self, norm, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = norm(4, use_fast_variance=False, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))


def plain(norm):
    return everything(Dense(norm, nnx.Rngs(0)), ROWS)


def jitted(norm):
    return nnx.jit(everything)(Dense(norm, nnx.Rngs(0)), ROWS)


def rematerialized(norm):
    class Model(Dense):
        @nnx.remat
        def __call__(self, x):
            return super().__call__(x)

    return everything(Model(norm, nnx.Rngs(0)), ROWS)


def ensemble(norm):
    """Members with parameters and statistics of their own."""
    keys = jax.random.split(jax.random.key(0), 3)
    members = nnx.vmap(lambda key: Dense(norm, nnx.Rngs(key)))(keys)
    return nnx.vmap(everything)(members, X)


def shared_batch(norm):
    """One set of statistics over a mapped axis."""
    layer = make(norm, axis_name="batch")
    axes = nnx.StateAxes({...: None})
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="batch")(layer, X)
    return y, nnx.state(layer)


def layers(norm):
    """A stack of layers, scanned."""
    keys = jax.random.split(jax.random.key(0), 3)
    stack = nnx.vmap(lambda key: Dense(norm, nnx.Rngs(key)))(keys)
    scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

    def loss(stack):
        return (scanned(ROWS, stack) ** 2).sum()

    return *nnx.value_and_grad(loss)(stack), nnx.state(stack)


def steps(norm):
    """One layer that is carried through a scan: its statistics move at each step."""
    layer = make(norm, momentum=0.5)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def step(layer, x):
        return layer, layer(x)

    layer, y = step(layer, X)
    return y, nnx.state(layer)


def split_and_merged(norm):
    """The functional way, in which the state is an argument."""
    graph, params, stats = nnx.split(Dense(norm, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            model = nnx.merge(graph, params, stats, copy=True)
            y = model(x)
            return (y**3).sum(), nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    grads, stats = step(params, stats, ROWS)
    return grads, step(params, stats, ROWS)[1]


@pytest.mark.parametrize(
    "run",
    [plain, jitted, rematerialized, ensemble, shared_batch, layers, steps, split_and_merged],
    ids=lambda run: run.__name__,
)
def test_it_does_what_flax_s_layer_does(run):
    close(run(MINE), run(THEIRS), layers=9)


def test_a_shared_module_moves_its_statistics_at_each_use():
    class Twice(nnx.Module):
        def __init__(self):
            self.first = make()
            self.second = self.first

        def __call__(self, x):
            return self.second(2 * self.first(x) + 1)

    model = Twice()
    y = nnx.jit(lambda model, x: model(x))(model, ROWS)
    params, state = jbn.bn_init(4)
    z, state = jbn.bn_forward(params, state, ROWS, True)
    z, state = jbn.bn_forward(params, state, 2 * z + 1, True)
    close(y, z)
    close(model.first.mean[...], state.mean)


def test_evaluation_and_gradients_leave_the_statistics_alone():
    layer = make(use_running_average=True)
    before = nnx.state(layer)
    _, grads, after = nnx.jit(everything)(layer, ROWS)
    same(before, after)
    assert set(grads) == {"scale", "bias"}


def test_the_flag_is_static_in_jit():
    layer = make()
    call = nnx.jit(lambda layer, x: layer(x))
    close(call(layer, ROWS), make()(ROWS))
    moved = layer.mean[...]
    layer.eval()
    call(layer, ROWS)
    np.testing.assert_array_equal(layer.mean[...], moved)


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, nnx.clone],
                         ids=["pickle", "deepcopy", "clone"])  # fmt: skip
@pytest.mark.parametrize("source", ["made", "replaced"])
def test_copies(copied, source):
    layer = make(momentum=0.5) if source == "made" else jbn.nnx.replace(make(THEIRS, momentum=0.5))[0]
    layer.activation = doubled
    layer(ROWS)
    twin = copied(layer)
    assert type(twin) is MINE
    assert (twin.momentum, twin.activation, twin.group_size) == (0.5, doubled, None)
    same(twin(ROWS), layer(ROWS))
    same(nnx.state(twin), nnx.state(layer))
    twin(ROWS + 1)
    assert (twin.mean[...] != layer.mean[...]).all()


def test_shapes_alone():
    shapes = nnx.eval_shape(lambda: make(activation=nnx.relu))
    assert isinstance(shapes, MINE)
    leaf = jax.tree.leaves(nnx.state(shapes, nnx.BatchStat))[0]
    assert (leaf.shape, leaf.dtype) == ((4,), jnp.float32)
    graph, state = nnx.split(shapes)
    layer = nnx.merge(graph, jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), state))
    y = nnx.eval_shape(lambda layer, x: layer(x), layer, jax.ShapeDtypeStruct((8, 4), jnp.bfloat16))
    assert (y.shape, y.dtype) == ((8, 4), jnp.bfloat16)


def test_a_flax_checkpoint_of_arrays_alone():
    theirs, mine = make(THEIRS), make()
    theirs(ROWS)
    arrays = nnx.to_pure_dict(nnx.state(theirs))
    nnx.update(mine, jax.tree.map(jnp.asarray, arrays))
    same(nnx.state(mine), nnx.state(theirs))


def test_in_a_linen_model():
    options = {"activation": nn.relu, "momentum": 0.5}
    bridged = nnx.bridge.ToLinen(MINE, args=(4,), kwargs=nn.FrozenDict(options))
    linen = jbn.linen.BatchNorm(use_running_average=False, **options)
    variables = linen.init(jax.random.key(0), ROWS)
    theirs = bridged.init(jax.random.key(0), ROWS)
    for collection in ("params", "batch_stats"):
        same(nn.unbox(theirs[collection]), variables[collection])
    y, new = jax.jit(lambda v: bridged.apply(v, ROWS, mutable=["batch_stats"]))(theirs)
    z, want = jax.jit(lambda v: linen.apply(v, ROWS, mutable=["batch_stats"]))(variables)
    same(y, z)
    same(nn.unbox(new["batch_stats"]), want["batch_stats"])
    evaluated = bridged.apply({**theirs, **new}, ROWS, use_running_average=True)
    same(evaluated, linen.clone(use_running_average=None).apply({**variables, **want}, ROWS, use_running_average=True))


def test_a_linen_layer_in_an_nnx_model():
    bridged = nnx.bridge.ToNNX(jbn.linen.BatchNorm(momentum=0.5), rngs=nnx.Rngs(0))
    bridged.lazy_init(ROWS, use_running_average=False)
    layer = make(momentum=0.5)
    y = bridged(ROWS, use_running_average=False, mutable=["batch_stats"])
    same(y, layer(ROWS))
    same(bridged.mean[...], layer.mean[...])
    same(bridged(ROWS, use_running_average=True), layer(ROWS, use_running_average=True))


def partitioned():
    return make(
        scale_init=nnx.with_partitioning(nnx.initializers.ones, ("model",)),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros, ("model",)),
    )


def test_metadata_of_sharding():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    @nnx.jit
    def build():
        layer = partitioned()
        state = nnx.state(layer)
        nnx.update(layer, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return layer

    with jax.set_mesh(mesh):
        layer = build()
        x = jax.device_put(X.reshape(-1, 4), NamedSharding(mesh, P("data", "model")))
        y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert layer.scale[...].sharding.spec == P("model")
    whole = make()
    close(y, whole(X.reshape(-1, 4)))
    close(layer.var[...], whole.var[...])


def test_in_shard_map_all_devices_hold_one_state():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    graph, state = nnx.split(make(axis_name="data"))

    def local(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    x = X.reshape(-1, 4)
    y, new = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P())))(state, x)
    whole = make()
    close(y, whole(x))
    close(jax.tree.leaves(new), jax.tree.leaves(nnx.state(whole)))
