"""What XLA would sum badly at once is summed in two steps: the same numbers, and batches stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jbn
from benchmarks.compilers import compile, mesh, missing
from jbn.core.checks import read_layout
from jbn.core.sums import split_few_rows
from tests.support import oracle

# Matrices, images of few positions, few rows in all, small examples that are joined: a GPU sums these in two steps ...
STEPPED = [
    (1024, 3),
    (1536, 3),
    (32, 7, 7, 3),
    (500, 8, 8, 2),
    (16, 9, 13, 2),
    (256, 2, 2, 3),
    (1024, 1, 1, 3),
    (4096, 2, 2, 3),
]
# ... and these at once: too few rows a part, too few parts, more rows than it would sum by few threads.
AT_ONCE = [(100, 3), (8, 9, 9, 2), (10112, 1), (40, 13, 13, 2)]
no_gpu_compiler = pytest.mark.skipif(missing("gpu-h200") is not None, reason=str(missing("gpu-h200")))


@pytest.mark.parametrize("shape", STEPPED + AT_ONCE, ids=str)
def test_where_there_are_two_steps(shape):
    parts = split_few_rows(read_layout(np.zeros(shape, np.float32), -1), jnp.zeros(shape))
    assert (parts is not None) == (shape in STEPPED)
    if parts is not None:
        assert parts.row_count == np.prod(shape[:-1])
        assert 16 <= parts.examples <= parts.row_count / 8


@pytest.fixture(params=["cpu", "cuda", "tpu"])
def platform(request, monkeypatch):
    """Run what would be compiled for a platform."""

    def choose(*args, default, **others):
        return others.get(request.param, default)(*args)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    with jax.disable_jit():
        yield request.param


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", STEPPED, ids=str)
def test_same_numbers(platform, shape, masked):
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal(shape).astype(np.float32) + mean for mean in (3, 0))
    scale, bias = (rng.standard_normal(shape[-1]).astype(np.float32) for _ in range(2))
    mask = rng.random((shape[0],) + (1,) * (len(shape) - 1)) < 0.7 if masked else None
    x = x if mask is None else np.where(mask, x, np.nan)
    y, pull, m = jax.vjp(lambda *operands: jbn.batch_norm(*operands, mask=mask), x, scale, bias, has_aux=True)
    want, bound = oracle.forward(x, scale, bias, mask=mask), oracle.tolerance("float32", int(np.prod(shape[:-1])), 4.0)
    np.testing.assert_allclose(y, want.y, atol=bound)
    np.testing.assert_allclose(m.var, want.var, atol=bound)
    slopes = oracle.gradients(g, x, scale, bias, mask=mask)
    for name, got in zip(("x", "scale", "bias"), pull(g), strict=True):
        assert oracle.relative_l2(got, slopes[name]) <= 1e-5, name


@pytest.mark.parametrize("shape", STEPPED, ids=str)
def test_forward_mode(platform, shape):
    rng = np.random.default_rng(1)
    x, dx = (rng.standard_normal(shape) for _ in range(2))
    scale, dscale, bias, dbias = (rng.standard_normal(shape[-1]) for _ in range(4))
    narrow = [tuple(jnp.asarray(a, jnp.float32) for a in arrays) for arrays in ((x, scale, bias), (dx, dscale, dbias))]
    _, dy = jax.jvp(lambda *operands: jbn.batch_norm(*operands)[0], *narrow)
    step = 1e-6
    there, here = (oracle.forward(x + h * dx, scale + h * dscale, bias + h * dbias).y for h in (step, -step))
    assert oracle.relative_l2(dy, (there - here) / (2 * step)) <= 1e-5


@no_gpu_compiler
@pytest.mark.compilers
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize(("devices", "shape"), [(4, (1024, 64)), (3, (1536, 64)), (4, (32, 7, 7, 64))], ids=str)
def test_sharded_rows_stay(devices, shape, explicit):
    over = mesh("gpu-h200", explicit=explicit, data=devices)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(over, PartitionSpec("data")))

    def f(state, x, g):
        y, pull, state = jax.vjp(lambda x: jbn.bn_forward(None, state, x, True), x, has_aux=True)
        return y, state, pull(g)

    program = compile(f, jax.eval_shape(lambda: jbn.bn_init(64)[1]), x, x, on=over)
    assert [(c.opcode, c.bytes) for c in program.collectives] == [("all-reduce", 4 * 2 * 64)] * 2
