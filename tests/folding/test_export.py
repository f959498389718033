"""What was exported runs where jax alone is installed, for batches of any size."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import linen as nn
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from benchmarks.compilers import compile, missing
from jbn.lab.models import ResNet
from tests.support.oracle import relative_l2, tolerance

PLATFORMS = ("cpu", "tpu", "cuda")
SHAPE = "b, 8, 8, 1"
BATCHES = (1, 6)


def images(number):
    return np.random.default_rng(number).standard_normal((number, 8, 8, 1)).astype(np.float32) + 3


def drawn(*shape):
    """Draw a kernel, or positive numbers by feature."""
    rng = np.random.default_rng(shape)
    values = (
        rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5
    )
    return values.astype(np.float32)


def by_function():
    params, state = {"scale": drawn(6), "bias": drawn(6)}, {"mean": drawn(6), "var": drawn(6)}

    def predict(x):
        x = x * jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
        return jbn.bn_forward(params, state, x, False, activation=jax.nn.silu, residual=x)[0]

    return predict


def by_linen():
    model = ResNet()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False))
    variables = jax.tree.map(lambda leaf: drawn(*leaf.shape), shapes)
    return lambda x: model.apply(variables, x, train=False)


def by_nnx():
    rngs = nnx.Rngs(0)
    norm = jbn.nnx.BatchNorm(4, activation=nnx.relu, rngs=rngs)
    norm.mean[...], norm.var[...] = jnp.asarray(drawn(4)), jnp.asarray(drawn(4))
    model = nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=rngs), norm, lambda x: x.mean((1, 2)))
    model.eval()
    return lambda x: model(x)


MODELS = {"function": by_function, "linen": by_linen, "nnx": by_nnx}

# Where jbn and Flax cannot be imported: run every file of a folder on every batch of it that fits.
LOADED = """
import sys
from pathlib import Path

for name in ("jbn", "flax"):
    sys.modules[name] = None
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is there")

import numpy as np
from jax import export

folder = Path(sys.argv[1])
for file in folder.glob("*.exported"):
    program = export.deserialize(bytearray(file.read_bytes()))
    for batch in folder.glob("batch-*.npy"):
        x, size = np.load(batch), program.in_avals[0].shape[0]
        if export.is_symbolic_dim(size) or size == len(x):
            np.save(folder / f"{file.stem}-{len(x)}.npy", program.call(x))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export the models twice, for everything and for one platform and size; let another process run them.

    Returns the functions, the programs and the outputs of the other process, by name.
    """
    folder = tmp_path_factory.mktemp("exported")
    functions = {name: jax.jit(make()) for name, make in MODELS.items()}
    symbols = export.symbolic_shape(SHAPE)
    programs = {}
    for name, f in functions.items():
        for kind, platforms, shape in (("any", PLATFORMS, symbols), ("one", ("cpu",), images(BATCHES[-1]).shape)):
            program = export.export(f, platforms=platforms)(jax.ShapeDtypeStruct(shape, jnp.float32))
            assert program.platforms == platforms
            programs[f"{name}-{kind}"] = program
            (folder / f"{name}-{kind}.exported").write_bytes(program.serialize())
    for number in BATCHES:
        np.save(folder / f"batch-{number}.npy", images(number))
    # As many devices as here: XLA's CPU convolutions may be split by the threads that each has.
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADED, folder], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return functions, programs, {file.stem: np.load(file) for file in folder.glob("*.npy")}


@pytest.mark.parametrize("name", MODELS)
def test_one_platform_and_size_give_the_bits_of_the_function(exported, name):
    functions, _, outputs = exported
    got, want = outputs[f"{name}-one-{BATCHES[-1]}"], functions[name](images(BATCHES[-1]))
    assert np.ptp(want) > 0.1
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("number", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_any_platform_and_size_give_the_bits_of_the_program(exported, name, number):
    """The function itself is compiled into other fusions: to rounding."""
    functions, programs, outputs = exported
    got, x = outputs[f"{name}-any-{number}"], images(number)
    np.testing.assert_array_equal(got, programs[f"{name}-any"].call(x))
    assert relative_l2(got, np.asarray(functions[name](x))) <= 1e-6


@pytest.mark.parametrize(
    "on",
    [
        pytest.param(
            on, marks=[pytest.mark.compilers, pytest.mark.skipif(missing(on) is not None, reason=str(missing(on)))]
        )
        for on in ("tpu-v5e", "gpu-h200")
    ],
)
def test_what_was_loaded_reads_and_writes_once(on):
    """What an accelerator's compiler makes of the file is what it makes of the function."""
    params, state = jbn.bn_init(256)
    predict = jax.jit(lambda x: jbn.bn_forward(params, state, x, False, activation=jax.nn.relu)[0])
    any_batch = jax.ShapeDtypeStruct(export.symbolic_shape("b, 56, 56, 256"), jnp.bfloat16)
    program = export.deserialize(export.export(predict, platforms=PLATFORMS)(any_batch).serialize())
    x = jax.ShapeDtypeStruct((128, 56, 56, 256), jnp.bfloat16)
    assert compile(program.call, x, on=on).passes(x) <= 2.02


# Training with a batch of unknown size.


def near(got, want):
    """To rounding: an unknown number of rows is counted in integers, and compiled into other fusions."""
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=tolerance(got.dtype, got.size, max(1, np.abs(want).max())), rtol=0)


def train(x, mask=None, **options):
    params, state = jbn.bn_init(3)
    y, new = jbn.bn_forward(params, state, x, True, mask=mask, momentum=0.0, **options)
    return y, new._asdict()


def train_linen(x):
    layer = jbn.linen.BatchNorm(use_running_average=False, activation=nn.relu)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4, 3)))
    return layer.apply(variables, x, mask=x[..., :1] > 2, mutable=["batch_stats"])


def train_nnx(x):
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    return layer(x), layer.mean[...], layer.var[...]


TRAINED = {
    "function": train,
    "masked": lambda x: train(x, x > 2),
    "examples masked": lambda x: train(x, (x > 2).any((1, 2), keepdims=True)),
    "moments": lambda x: jbn.moments(x).mean,
    "update alone": lambda x: jbn.bn_forward(None, {"mean": jnp.ones(3), "var": jnp.ones(3)}, x, False, update=True),
    "gradient": jax.grad(lambda x: jnp.sum(jnp.tanh(train(x, activation=jax.nn.silu)[0]))),
    "linen": train_linen,
    "nnx": train_nnx,
}


@pytest.mark.parametrize("shape", ["b, 4, 3", "b, t, 3"])
@pytest.mark.parametrize("f", TRAINED.values(), ids=TRAINED)
def test_a_batch_of_unknown_size_trains(f, shape):
    any_batch = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    program = export.deserialize(export.export(jax.jit(f))(any_batch).serialize())
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32) + 2
    jax.tree.map(near, program.call(x), jax.jit(f)(x))


def test_what_was_loaded_is_differentiable():
    f = jax.jit(by_function())
    any_batch = jax.ShapeDtypeStruct(export.symbolic_shape(SHAPE), jnp.float32)
    program = export.deserialize(export.export(f)(any_batch).serialize(vjp_order=1))
    got, want = (jax.grad(lambda x, f=f: jnp.sum(jnp.tanh(f(x))))(images(5)) for f in (program.call, f))
    assert relative_l2(got, np.asarray(want)) <= 1e-5


def test_symbols_of_two_exports_do_not_meet():
    """An eager call is remembered by the shape of x, and shapes of different scopes cannot be compared."""
    for _ in range(2):
        x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 3"), jnp.float32)
        export.export(jax.jit(lambda x: train(x, activation=jax.nn.relu)[0]))(x)


def test_one_value_per_channel_keeps_the_state():
    """Whether there is more than one cannot be known when tracing, where otherwise an error says so."""
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 3"), jnp.float32)
    y, new = export.export(jax.jit(train))(x).call(np.full((1, 3), 5.0, np.float32))
    assert not y.any()
    assert not new["mean"].any()
    assert (new["var"] == 1).all()


def test_groups_of_unknown_number_are_refused():
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 4, 3"), jnp.float32)
    with pytest.raises(ValueError, match=r"group_size is 2, .* shape \(b, 4, 3\) .* symbolic number of examples"):
        export.export(jax.jit(lambda x: train(x, group_size=2)))(x)


def test_groups_of_known_number():
    f = jax.jit(lambda x: train(x, x[:, :, :1] > 2, group_size=2))
    any_length = jax.ShapeDtypeStruct(export.symbolic_shape("6, t, 3"), jnp.float32)
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32) + 2
    jax.tree.map(near, export.export(f)(any_length).call(x), f(x))


# Where the trees of jbn are imported, and nothing else of this file: JAX reads what is registered when they are.
STEPPED = """
import sys
from pathlib import Path

import numpy as np
from jax import export
from jbn import Moments, Params, State, bn_init

folder = Path(sys.argv[1])
program = export.deserialize(bytearray((folder / "step").read_bytes()))
x, seen = np.load(folder / "x.npy"), Moments.empty(3)
params, state = bn_init(3)
for _ in range(2):
    params, state, seen = program.call(params, state, seen, x)
assert (type(params), type(state), type(seen)) == (Params, State, Moments)
np.savez(folder / "result.npz", scale=params.scale, mean=state.mean, var=state.var, count=seen.count, pilot=seen.pilot)
"""


@pytest.mark.parametrize("kind", [{}, {"use_bias": False, "counted": True}], ids=["whole", "no bias, counted"])
def test_a_training_step_with_the_trees_of_jbn_is_read_elsewhere(tmp_path, kind):
    def step(params, state, seen, x):
        def loss(params):
            y, new = jbn.bn_forward(params, state, x, True, momentum=0.5)
            return jnp.mean(jnp.tanh(y - 1) ** 2), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new, jbn.merge(seen, jbn.moments(x))

    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32) + 2
    trees = (*jbn.bn_init(3, **kind), jbn.Moments.empty(3))
    program = export.export(jax.jit(step))(*trees, x)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "step").write_bytes(program.serialize())
    if kind:  # the bias of the other process would not fit
        params, state, _ = export.deserialize(program.serialize()).call(*trees, x)
        assert (params.bias, type(state), int(state.count)) == (None, jbn.CountedState, 1)
        return
    done = subprocess.run([sys.executable, "-c", STEPPED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for _ in range(2):
        trees = step(*trees, x)
    got, (params, state, seen) = np.load(tmp_path / "result.npz"), trees
    near(got["scale"], np.asarray(params.scale))
    near(got["mean"], np.asarray(state.mean))
    near(got["var"], np.asarray(state.var))
    near(got["count"], np.asarray(seen.count))
    near(got["pilot"], np.asarray(seen.pilot))
