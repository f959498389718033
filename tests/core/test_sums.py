"""What compilers do badly: it is worked around with the same numbers, and is still done where nothing is done about it.

The tests that are called "still" take a workaround away and expect its symptom. One that fails says that the compiler
that is installed needs the workaround no more: it can go once that holds for every version that the package takes.
"""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jbn
from benchmarks import passes
from benchmarks.compilers import compile, mesh, missing
from jbn.core import normalize, statistics, sums
from jbn.core.checks import read_layout
from jbn.core.sums import split_few_rows
from tests.core.test_groups import ACROSS, ROWS_OF
from tests.support import oracle
from tests.support.shards import Setting

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

    monkeypatch.setattr(sums.lax, "platform_dependent", choose)
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


@pytest.fixture
def without(monkeypatch):
    """Put something in the place of workarounds, wherever they are used, and forget what was traced with them."""

    def replace(**others):
        for name, other in others.items():
            for room in (sums, statistics, normalize):
                if hasattr(room, name):
                    monkeypatch.setattr(room, name, other)
        jax.clear_caches()

    yield replace
    monkeypatch.undo()
    jax.clear_caches()


@no_gpu_compiler
@pytest.mark.compilers
def test_gpus_still_write_what_few_threads_sum(without):
    x = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16)
    without(split_few_rows=lambda layout, x: None)
    forward, both, _ = passes.layer("jbn", x, "gpu-h200", activation=nn.relu)
    assert forward.passes(x) >= 2 * 3.14
    assert both.passes(x) >= 2 * 9.9


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the sums of XLA's CPU loops do not fuse with what they sum")
def test_cpus_still_write_what_two_sums_read(without):
    without(read_apart=lambda times, *arrays: [arrays] * times)
    forward, both, _ = passes.layer("jbn", passes.ON_CPU, "cpu", activation=nn.relu)
    assert forward.passes(passes.ON_CPU) >= 4 + 2
    assert both.passes(passes.ON_CPU) >= 13 + 4


@no_gpu_compiler
@pytest.mark.compilers
def test_gpus_still_run_both_branches(without):
    def without_barrier(far, sweep, pilot, found):
        def again():
            first, second = sweep(pilot)
            return first, second[None]

        first, second = lax.cond(far, again, lambda: (found[0], found[1][None]))
        return first, second[0]

    without(sweep_again_if=without_barrier)
    forward, _, _ = passes.layer("jbn", passes.IMAGES, "gpu-h200", activation=nn.relu)
    assert forward.conditionals == 0
    assert forward.passes(passes.IMAGES) >= 4


@pytest.mark.compilers
@pytest.mark.skipif(missing("tpu-v5e") is not None, reason=str(missing("tpu-v5e")))
def test_the_tpu_compiler_still_crashes_on_two_sums_of_one_shape():
    code = """if True:
        from benchmarks import passes
        from jax import lax
        from jbn.core import statistics
        statistics.sweep_again_if = lambda far, sweep, pilot, found: lax.cond(
            far, lambda: tuple(sweep(lax.optimization_barrier(pilot))), lambda: found
        )
        passes.chain("jbn", "tpu-v5e", passes.IMAGES, layers=2)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0, done.stderr  # killed by a signal of its own


def test_cpus_still_contract_the_quotient_and_the_pilot(without):
    """The pilot of a group is then one number in the sums and another in dx."""
    shape = (64, 7, 7, 96)
    rng = np.random.default_rng(0)
    x, g = ((rng.standard_normal(shape) + mean).astype(np.float32) for mean in (98765.43, 0))
    want = [oracle.gradients(g, x)["x"] for x, g in zip(np.split(x, 4), np.split(g, 4), strict=True)]

    def error():
        loss = lambda x: (jbn.batch_norm(x, group_size=16)[0] * g).sum()  # noqa: E731
        return oracle.relative_l2(jax.jit(jax.grad(loss))(x), np.concatenate(want))

    assert error() <= 16 * oracle.ULP["float32"]
    without(_find_shift=lambda m: m.offset)
    assert error() >= 256 * oracle.ULP["float32"]


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="XLA leaves these sums whole there")
def test_sums_of_a_pilot_and_an_offset_are_still_taken_apart(without):
    """The moments of groups of shards are then merged around numbers that nobody has rounded."""
    setting = Setting(mean=1e4, masked=True, warm=True, groups=ROWS_OF.reshape(-1, 6))
    run = ACROSS["shard_map unchecked"]
    setting.check(*run(setting, group_size=6))
    without(keep_rounding=lambda tree: tree)
    with pytest.raises(AssertionError, match="var"):
        setting.check(*run(setting, group_size=6))
