"""What normalization costs on six targets: bars for passes, memory, conditionals and collectives."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jbn
from benchmarks import passes
from benchmarks.compilers import TARGETS, compile, mesh, missing


def target(name, *more):
    marks = [pytest.mark.skipif(missing(name) is not None, reason=str(missing(name)))]
    return pytest.param(name, *more, marks=marks + [pytest.mark.compilers] * (name != "cpu"))


on_accelerators = pytest.mark.parametrize("on", [target(name) for name in TARGETS if name != "cpu"])
# 205 MB on one device: below 128 MB the TPU compiler stages whole arrays in VMEM, and counts mean little.
IMAGES = jax.ShapeDtypeStruct((128, 56, 56, 256), jnp.bfloat16)
CHANNELS = 64


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


# One layer.


@on_accelerators
def test_activation_inside(on):
    forward, forced, free = passes.layer("jbn", passes.IMAGES, on, activation=nn.relu)
    assert forward.passes(passes.IMAGES) <= 3.02
    assert forced.passes(passes.IMAGES) <= 8.03
    assert free.passes(passes.IMAGES) <= (7.03 if on.startswith("tpu") else 8.03)
    assert forced.temporaries <= 0.01 * passes.IMAGES.size
    assert forward.conditionals == forced.conditionals == free.conditionals == 1


@on_accelerators
def test_residual(on):
    """The floor is 4 and 11; the GPU compiler writes the sign of z in the forward pass, half a pass more."""
    forward, forced, _ = passes.layer("jbn", passes.IMAGES, on, activation=nn.relu, residual=True)
    assert forward.passes(passes.IMAGES) <= 4.02
    assert forced.passes(passes.IMAGES) <= (11.03 if on.startswith("tpu") else 11.53)
    assert forward.conditionals == forced.conditionals == 1


@pytest.mark.parametrize(
    ("on", "x", "bar"),
    [
        target("cpu", passes.ON_CPU, 13.1),
        target("gpu-h200", passes.IMAGES, 9.55),
        target("gpu-h200", jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16), 23.5),
        target("tpu-v5e", passes.IMAGES, 8.05),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_scale_and_bias_per_example(on, x, bar):
    """As those of features, but that the GPU compiler writes the sign of z.

    Those of rows are as large as x, in float32, as are their gradients. Summed at once, rows take 31 passes on GPUs.
    """
    if on == "cpu" and jax.__version_info__ < (0, 10):
        pytest.skip("the sums of XLA's CPU loops do not fuse with what they sum")
    vectors = jax.ShapeDtypeStruct((x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1]), jnp.float32)

    def both(state, x, scale, bias, g):
        def f(x, scale, bias):
            return jbn.bn_forward({"scale": scale, "bias": bias}, state, x, True, activation=nn.relu)

        y, pull, state = jax.vjp(f, x, scale, bias, has_aux=True)
        y, g = jax.lax.optimization_barrier((y, g))
        return y, state, pull(g)

    program = compile(both, jax.eval_shape(lambda: jbn.bn_init(x.shape[-1])[1]), x, vectors, vectors, x, on=on)
    assert program.passes(x) <= bar
    assert program.conditionals == 1


@on_accelerators
def test_second_sweep_is_one_pass(on):
    forward, _, _ = passes.layer("jbn", passes.IMAGES, on)
    more = forward.passes(passes.IMAGES, branch=1) - forward.passes(passes.IMAGES)
    assert more == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("on", [target("gpu-h200"), target("gpu-a100")])
@pytest.mark.parametrize("shape", [(4096, 512), (32, 7, 7, 512)], ids=str)
def test_few_rows_on_gpus(on, shape):
    """Summed at once they take 7 and 22 passes: the compilers write what would be summed by a few threads."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    forward, forced, _ = passes.layer("jbn", x, on, activation=nn.relu)
    assert forward.passes(x) <= 3.21
    assert forced.passes(x) <= 10.1
    assert forced.peak <= 4.7 * x.size * x.dtype.itemsize


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the sums of XLA's CPU loops do not fuse with what they sum")
@pytest.mark.parametrize(("activation", "bar"), [(None, 10.1), (nn.relu, 13.1)], ids=["none", "relu"])
def test_cpu(activation, bar):
    _, forced, free = passes.layer("jbn", passes.ON_CPU, "cpu", activation=activation)
    assert max(forced.passes(passes.ON_CPU), free.passes(passes.ON_CPU)) <= bar
    assert forced.conditionals == free.conditionals == 1
    assert forced.temporaries <= 0.05 * forced.outputs


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the sums of XLA's CPU loops do not fuse with what they sum")
def test_cpu_writes_no_float32_copy_of_bfloat16():
    x = jax.ShapeDtypeStruct(passes.ON_CPU.shape, jnp.bfloat16)
    forward, forced, _ = passes.layer("jbn", x, "cpu", activation=None)
    size = x.size * x.dtype.itemsize
    assert forward.temporaries <= 0.05 * size
    assert forced.temporaries <= 2.05 * size  # the cotangent, which three read


# In a network.


def test_cpu_compiles_few_kernels():
    """The guard, with two sums in its branch, is made up for but for a few: each takes milliseconds to compile."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
    flax, ours = (passes.chain(kind, "cpu", x, layers=2) for kind in ("flax", "jbn"))
    kernels, those_of_flax = (len(re.findall(r" = .*? (?:fusion|concatenate)\(", p.text)) for p in (ours, flax))
    assert kernels <= those_of_flax + 2 * 3


@pytest.mark.parametrize("on", [target("gpu-h200"), target("tpu-v5e")])
def test_two_layers(on):
    """On TPU the sums are fused into the convolutions: a norm costs less than its sweeps."""
    flax, ours = (passes.chain(kind, on, IMAGES, layers=2) for kind in ("flax", "jbn"))
    assert ours.passes(IMAGES) <= flax.passes(IMAGES) + 0.1
    assert ours.peak <= 1.01 * flax.peak
    assert ours.conditionals == 2


@pytest.mark.slow
@pytest.mark.parametrize(("on", "bar"), [target("gpu-h200", 2.9), target("tpu-v5e", 1.85)])
def test_two_layers_beside_none(on, bar):
    bare, ours = (passes.chain(kind, on, IMAGES, layers=2) for kind in ("conv", "jbn"))
    assert (ours.passes(IMAGES) - bare.passes(IMAGES)) / 2 <= bar
    if on == "tpu-v5e":
        leaner = passes.chain("jbn", on, IMAGES, layers=2, remat=True)
        assert leaner.passes(IMAGES) <= ours.passes(IMAGES)
        assert leaner.peak <= 0.9 * ours.peak
        assert leaner.conditionals == 2


@pytest.mark.parametrize("on", [target("gpu-h200")])
def test_four_layers_rematerialized(on):
    """Each y is made again: a pass a layer, for a fifth of the memory. On TPU it costs none, see above."""
    ours, leaner = (passes.chain("jbn", on, IMAGES, layers=4, remat=remat) for remat in (False, True))
    assert leaner.passes(IMAGES) <= ours.passes(IMAGES) + 4.1
    assert leaner.peak <= 0.8 * ours.peak
    assert leaner.conditionals == 4


@pytest.mark.slow
@pytest.mark.parametrize(("on", "bar"), [target("gpu-h200", 17.4), target("tpu-v5e", 10.1)])
def test_six_layers(on, bar):
    bare, flax, ours = (passes.chain(kind, on) for kind in passes.KINDS)
    assert ours.passes(passes.IMAGES) - bare.passes(passes.IMAGES) <= bar
    assert ours.passes(passes.IMAGES) <= flax.passes(passes.IMAGES) + 0.1
    assert ours.peak <= 1.005 * flax.peak
    assert ours.conditionals == 6
    leaner = passes.chain("jbn", on, remat=True)
    assert leaner.conditionals == 6
    assert leaner.peak <= 0.91 * ours.peak
    if on == "tpu-v5e":
        assert ours.passes(passes.IMAGES) <= 51.4
        assert ours.peak <= 4130e6
        assert leaner.passes(passes.IMAGES) <= ours.passes(passes.IMAGES)


# Over devices.


@pytest.mark.parametrize("on", [target("gpu-h200"), target("tpu-v5e")])
def test_height_is_sharded_too(on):
    over = mesh(on, data=2, height=2)
    x = jax.ShapeDtypeStruct(
        (64, 56, 56, 256), jnp.bfloat16, sharding=NamedSharding(over, PartitionSpec("data", "height"))
    )

    def f(params, state, x, g):
        def forward(params, x):
            return jbn.bn_forward(params, state, x, True, activation=nn.relu)

        y, pull, state = jax.vjp(forward, params, x, has_aux=True)
        return y, state, pull(g)

    program = compile(f, *jax.eval_shape(lambda: jbn.bn_init(256)), x, x, on=over)
    assert [(c.opcode, c.bytes) for c in program.collectives] == [("all-reduce", 4 * 2 * 256)] * 2


@pytest.mark.parametrize(
    ("on", "devices", "manual", "masked"),
    [
        target(on, devices, manual, masked)
        for on, devices in (("cpu", 8), ("gpu-h200", 4), ("tpu-v5e", 8), ("tpu-v6e", 8))
        for manual in (False, True)
        for masked in (False, True)
        if not on.startswith("tpu") or manual == masked == (on == "tpu-v6e")  # the TPU compilers take long
    ],
)
def test_one_all_reduce_each_way(on, devices, manual, masked):
    """Two layers; the rows that a mask leaves are counted in the same collective."""
    options = {"manual": manual, "masked": masked, "layers": 2, "channels": CHANNELS}
    forward = passes.distributed("jbn", on, devices, backward=False, **options)
    both = passes.distributed("jbn", on, devices, **options)
    statistics, guarded = passes.statistics_in(forward, CHANNELS)
    assert len(statistics) == 2
    assert len(guarded) == forward.conditionals == both.conditionals == 2
    total, _ = passes.statistics_in(both, CHANNELS)
    assert len(total) == 4
    assert max(total) <= 2 * CHANNELS + 2
    assert {c.opcode for c in both.collectives + both.guarded_collectives} == {"all-reduce"}
    # What is left is the loss, and the gradients of the kernels in at most one all-reduce each.
    assert len(both.collectives) <= len(total) + 3


@pytest.mark.parametrize("on", [target("cpu"), target("gpu-h200"), target("tpu-v5e")])
@pytest.mark.parametrize("manual", [False, True], ids=["jit", "shard_map"])
def test_no_collective_in_evaluation(on, manual):
    program = passes.distributed(
        "jbn", on, 4, manual=manual, masked=False, train=False, backward=False, layers=2, channels=CHANNELS
    )
    assert [c.bytes for c in program.collectives] == [4]  # the loss
    assert program.guarded_collectives == []
    assert program.conditionals == 0


@pytest.mark.parametrize(
    ("on", "devices"), [target("cpu", 8), target("gpu-h200", 4), target("tpu-v5e", 8), target("tpu-v6e", 8)]
)
def test_sharded_features(on, devices):
    """Over the axis of the features goes no collective but the guard's one bit."""
    over = mesh(on, data=2, model=devices // 2)

    def sharded(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(over, PartitionSpec(*spec)))

    x = sharded((16, 14, 14, 256), jnp.bfloat16, "data", None, None, "model")
    vector = sharded((256,), jnp.float32, "model")

    def f(params, state, x, g):
        def forward(params, x):
            return jbn.bn_forward(params, state, x, True, activation=jax.nn.relu)

        y, pull, state = jax.vjp(forward, params, x, has_aux=True)
        return (y, state, *pull(g)), jbn.bn_forward(params, state, x, False)[0]

    program = compile(f, jbn.Params(vector, vector), jbn.State(vector, vector), x, x, on=over)
    own = 256 // (devices // 2)
    sizes = sorted(c.bytes for c in program.collectives)
    assert {c.opcode for c in program.collectives} == {"all-reduce"}
    assert [size for size in sizes if size > 4] == [4 * 2 * own] * 2
    assert len([size for size in sizes if size <= 4]) == 1
    assert program.conditionals == 1


@pytest.mark.parametrize("on", [target("cpu"), target("gpu-h200"), target("tpu-v5e"), target("tpu-v6e")])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_groups_of_shards_send_a_table(on, masked):
    """Two groups of two shards: one all-reduce each way, of two rows instead of one."""
    over = mesh(on, data=4)
    shards = NamedSharding(over, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 14, 14, 128), jnp.bfloat16, sharding=shards)
    mask = jax.ShapeDtypeStruct((16, 1, 1, 1), jnp.bool_, sharding=shards) if masked else None

    def f(state, x, g, mask):
        y, pull, new = jax.vjp(
            lambda x: jbn.bn_forward(None, state, x, True, mask=mask, axis_name="data", group_size=8), x, has_aux=True
        )
        return y, new, *pull(g)

    rows, whole = PartitionSpec("data"), PartitionSpec()
    step = jax.shard_map(f, mesh=over, in_specs=(whole, rows, rows, rows), out_specs=(rows, whole, rows))
    program = compile(step, jax.eval_shape(lambda: jbn.bn_init(128)[1]), x, x, mask, on=over)
    forward = 4 * 2 * (2 * 128 + masked)
    assert sorted(c.bytes for c in program.collectives) == sorted([forward, 4 * 2 * 2 * 128])
    assert len(program.guarded_collectives) == 1
