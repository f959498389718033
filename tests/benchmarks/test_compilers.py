"""The module that reads compiled programs, on programs whose figures follow from arithmetic."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compilers import TARGETS, Collective, Program, _follow, compile, mesh, missing


def target(name):
    marks = [pytest.mark.skipif(missing(name) is not None, reason=str(missing(name)))]
    return pytest.param(name, marks=marks + [pytest.mark.compilers] * (name != "cpu"))


every_target = pytest.mark.parametrize("on", [target(name) for name in TARGETS])
both_kinds = pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])

X = jax.ShapeDtypeStruct((64, 56, 56, 256), jnp.float32)
BOOL = jax.ShapeDtypeStruct((), jnp.bool_)
CHANNELS = 256
ROWS = (0, 1, 2)


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def sharded(over, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(over, P(*axes)))


def refine(x, shift):
    # The barrier keeps the GPU compiler from running both branches and selecting.
    return x.sum(ROWS) - lax.optimization_barrier(shift)


def keep(x, shift):
    return jnp.ones_like(shift)


def relu(x):
    return jnp.maximum(x, 0)


# Passes.


@every_target
@pytest.mark.parametrize(
    ("f", "passes"),
    [
        (lambda x: 2 * x, 2),
        (lambda x: x.sum(ROWS), 1),
        (lambda x: x - x.mean(ROWS), 3),
        (lambda x: (2 * x).astype(jnp.bfloat16), 1.5),
        (lambda x: 2 * x[:16], 0.5),
    ],
    ids=["scale", "sum", "center", "cast", "slice"],
)
def test_passes(f, passes, on):
    assert compile(f, X, on=on).passes(X) == pytest.approx(passes, abs=0.01)


@every_target
def test_passes_are_those_of_one_device(on):
    over = mesh(on, data=2)
    x = sharded(over, (128, 56, 56, 256), "data")
    program = compile(lambda x: 2 * x, x, on=over)
    assert program.passes(x) == pytest.approx(2, abs=0.01)
    assert program.arguments == program.outputs == X.size * 4


@pytest.mark.parametrize("on", [target(name) for name in TARGETS if name.startswith("gpu")])
def test_convolution_by_custom_call(on):
    def f(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    program = compile(f, x, jax.ShapeDtypeStruct((3, 3, CHANNELS, CHANNELS), x.dtype), on=on)
    assert 'custom_call_target="__cudnn$convForward"' in program.text
    assert program.passes(x) == pytest.approx(2, abs=0.1)


# The path taken.


@every_target
def test_untaken_branch_is_left_out(on):
    shift = jax.ShapeDtypeStruct((CHANNELS,), jnp.float32)
    guarded = compile(lambda p, x, s: (2 * x, lax.cond(p, refine, keep, x, s)), BOOL, X, shift, on=on)
    assert guarded.conditionals == 1
    assert guarded.passes(X) == pytest.approx(2, abs=0.01)
    assert guarded.passes(X, branch=1) == pytest.approx(3, abs=0.01)


@every_target
def test_branch_is_numbered_by_the_program(on):
    shift = jax.ShapeDtypeStruct((CHANNELS,), jnp.float32)
    mirrored = compile(lambda p, x, s: (2 * x, lax.cond(p, keep, refine, x, s)), BOOL, X, shift, on=on)
    assert mirrored.passes(X) == pytest.approx(3, abs=0.01)
    assert mirrored.passes(X, branch=1) == pytest.approx(2, abs=0.01)


@every_target
def test_select_is_no_conditional(on):
    batched = jax.vmap(lambda p, x: lax.cond(p, lambda x: 2 * x, jnp.sin, x))
    flags = jax.ShapeDtypeStruct(X.shape[:1], jnp.bool_)
    program = compile(batched, flags, X, on=on)
    assert program.conditionals == 0
    assert program.passes(X) == program.passes(X, branch=1) == pytest.approx(2, abs=0.01)


@every_target
def test_conditional_in_a_loop(on):
    def step(carry, shift):
        x, p = carry
        return (x, p), lax.cond(p, refine, keep, x, shift)

    shifts = jax.ShapeDtypeStruct((5, CHANNELS), jnp.float32)
    program = compile(lambda x, p, shifts: lax.scan(step, (x, p), shifts)[1], X, BOOL, shifts, on=on)
    assert program.conditionals == 1
    assert program.passes(X, branch=1) - program.passes(X) == pytest.approx(1, abs=0.01)


# Collectives.


@every_target
@both_kinds
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_one_psum(devices, explicit, on):
    over = mesh(on, explicit=explicit, data=devices)

    def f(x):
        rows = x.reshape(-1, CHANNELS)
        moments = jnp.concatenate([rows.sum(0), jnp.square(rows).sum(0), jnp.full(1, 7.0)])
        return lax.psum(moments, "data")

    f = jax.shard_map(f, mesh=over, in_specs=P("data"), out_specs=P())
    program = compile(f, sharded(over, (64, 8, 8, CHANNELS), "data"), on=over)
    assert program.collectives == [Collective("all-reduce", 4 * (2 * CHANNELS + 1))]
    assert program.guarded_collectives == []


@every_target
@both_kinds
def test_sharded_batch_is_synchronized(explicit, on):
    over = mesh(on, explicit=explicit, data=4)
    program = compile(lambda x: x - x.mean(ROWS), sharded(over, (64, 8, 8, CHANNELS), "data"), on=over)
    assert program.collectives == [Collective("all-reduce", 4 * CHANNELS)]


@every_target
def test_two_psums(on):
    over = mesh(on, data=4)

    def f(x):
        mean = lax.pmean(x.mean(0), "data")
        return lax.pmean(jnp.square(x - mean).mean(0)[:100], "data")

    f = jax.shard_map(f, mesh=over, in_specs=P("data"), out_specs=P())
    program = compile(f, sharded(over, (512, CHANNELS), "data"), on=over)
    assert program.collectives == [Collective("all-reduce", 4 * CHANNELS), Collective("all-reduce", 4 * 100)]


@every_target
def test_all_gather(on):
    over = mesh(on, data=4)
    f = jax.shard_map(
        lambda x: lax.all_gather(x, "data"), mesh=over, in_specs=P("data"), out_specs=P(), check_vma=False
    )
    program = compile(f, sharded(over, (4 * 1024, CHANNELS), "data"), on=over)
    assert program.collectives == [Collective("all-gather", 4 * 1024 * CHANNELS)]


@every_target
def test_guarded_collective(on):
    over = mesh(on, data=4)

    def f(p, x):
        def again(d):
            return lax.psum(jnp.square(x - lax.optimization_barrier(d)).sum(0), "data")

        d = lax.pmean(x.mean(0)[:1], "data")
        return lax.cond(p, again, lambda d: jnp.zeros(CHANNELS), d)

    f = jax.shard_map(f, mesh=over, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    program = compile(f, BOOL, sharded(over, (4096, CHANNELS), "data"), on=over)
    assert program.conditionals == 1
    assert program.collectives == [Collective("all-reduce", 4)]
    assert program.guarded_collectives == [Collective("all-reduce", 4 * CHANNELS)]


# Memory.


@every_target
def test_temporaries_and_peak(on):
    def f(a, b):
        product = a @ b
        return jnp.square(product - product.mean()).mean()

    a = jax.ShapeDtypeStruct((8192, 8192), jnp.float32)
    program = compile(f, a, a, on=on)
    held = 4 * 8192**2
    assert held <= program.temporaries <= 1.25 * held
    assert 3 * held <= program.peak <= 3.25 * held


@every_target
def test_donated_argument_is_held_once(on):
    kept, given = (
        compile(jax.jit(lambda x: 2 * x, donate_argnums=donated), X, on=on).peak / X.size / 4 for donated in [(), (0,)]
    )
    assert (kept, given) == pytest.approx((2, 1), abs=0.01)


# Reading HLO.

CONDITIONAL = """HloModule handwritten
%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
%sweep (p: (f32[1000])) -> f32[1000] {{
  %p = (f32[1000]) parameter(0)
  %x = f32[1000] get-tuple-element(%p), index=0
  %s = f32[1000] all-reduce(%x), to_apply=%sum
  ROOT %n = f32[1000] negate(%s)
}}
%keep (p.1: f32[1000]) -> f32[1000] {{
  ROOT %p.1 = f32[1000] parameter(0)
}}
%inner (i: {index}, q: f32[1000]) -> f32[1000] {{
  %i = {index} parameter(0)
  %q = f32[1000] parameter(1)
  %t = (f32[1000]) tuple(%q)
  ROOT %c.1 = f32[1000] conditional(%i, {operands}), {branches}
}}
ENTRY %main (j: {index}, y: f32[1000]) -> f32[1000] {{
  %j = {index} parameter(0)
  %y = f32[1000] parameter(1)
  ROOT %r = f32[1000] call(%j, %y), to_apply=%inner
}}
"""


@pytest.mark.parametrize(
    ("index", "operands", "branches"),
    [
        ("s32[]", "%q, %t", "branch_computations={%keep, %sweep}"),
        ("pred[]", "%t, %q", "true_computation=%sweep, false_computation=%keep"),
    ],
    ids=["index", "boolean"],
)
def test_conditional_in_a_called_computation(index, operands, branches):
    program = Program(CONDITIONAL.format(index=index, operands=operands, branches=branches))
    assert program.conditionals == 1
    # The all-reduce and the negation read and write 4000 bytes each; the tuple is a pointer.
    assert program.bytes() == pytest.approx(0, abs=8)
    assert program.bytes(branch=1) == pytest.approx(16000, abs=8)
    assert "call(%q), to_apply=%keep" in _follow(program.text, 0)
    assert "call(%t), to_apply=%sweep" in _follow(program.text, 1)
    assert program.collectives == []
    assert program.guarded_collectives == [Collective("all-reduce", 4000)]


def test_pairs_and_tuples_are_one_collective():
    program = Program("""HloModule handwritten
%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}
%scatter (p: bf16[64]) -> bf16[16] {
  %p = bf16[64] parameter(0)
  ROOT %s = bf16[16] reduce-scatter(%p), dimensions={0}, to_apply=%sum
}
ENTRY %main (x: bf16[64], y: bf16[8,16]) -> (bf16[64], bf16[16], bf16[256]) {
  %x = bf16[64]{0:T(128)S(1)} parameter(0)
  %y = bf16[8,16]{1,0} parameter(1)
  %both = (bf16[64], /*index=1*/bf16[8,16]) all-reduce(%x, %y), to_apply=%sum
  %first = bf16[64] get-tuple-element(%both), index=0
  %start = bf16[64] all-reduce-start(%first), to_apply=%sum
  %done = bf16[64] all-reduce-done(%start)
  %gather-start = (bf16[64], bf16[256]) all-gather-start(%done), dimensions={0}
  %gather-done = bf16[256] all-gather-done(%gather-start)
  %begin = ((bf16[64]), bf16[16], s32[]) async-start(%done), calls=%scatter
  %end = bf16[16] async-done(%begin), calls=%scatter
  ROOT %r = (bf16[64], bf16[16], bf16[256]) tuple(%done, %end, %gather-done)
}
""")
    assert program.collectives == [
        Collective("all-reduce", 2 * (64 + 8 * 16)),
        Collective("all-reduce", 2 * 64),
        Collective("all-gather", 2 * 64),
        Collective("reduce-scatter", 2 * 64),
    ]


def test_custom_calls_read_and_write():
    program = Program("""HloModule handwritten
ENTRY %main (x: f32[10,10], k: bf16[10]) -> f32[100] {
  %x = f32[10,10] parameter(0)
  %k = bf16[10] parameter(1)
  %buffer = f32[100] custom-call(), custom_call_target="AllocateBuffer"
  %conv = (f32[100], u8[7]) custom-call(%x, %k), custom_call_target="__cudnn$convForward"
  ROOT %y = f32[100] get-tuple-element(%conv), index=0
}
""")
    # XLA's own analysis says -1 byte for each: unknown.
    assert program.bytes() == pytest.approx(400 + 20 + 400 + 7, abs=2)


# The environment.


def test_unknown_target():
    with pytest.raises(ValueError, match=r"no target 'gpu-b200'; there are cpu, tpu-v5e"):
        compile(relu, X, on="gpu-b200")


def test_mesh():
    over = mesh("cpu", data=4, model=2, explicit=True)
    assert (dict(over.shape), over.axis_types) == ({"data": 4, "model": 2}, (AxisType.Explicit,) * 2)
    assert mesh("cpu", data=4).axis_types == (AxisType.Auto,)


def test_argument_of_another_mesh():
    with pytest.raises(ValueError, match="not over Mesh"):
        compile(relu, sharded(mesh("cpu", data=2), (8, 8), "data"), on=mesh("cpu", data=4))


def test_a_closed_over_array_lives_elsewhere():
    weight = jnp.arange(8.0)
    over = mesh("cpu", data=4)
    program = compile(lambda x: x * weight, sharded(over, (16, 8), "data"), on=over)
    assert program.arguments == 4 * 4 * 8


@pytest.mark.parametrize("on", [target("cpu"), target("tpu-v5e"), target("gpu-h200")])
def test_beside_another_process(on):
    """A second process with one CPU device and nothing set compiles for four while this one compiles."""
    mesh(on, data=1)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "ALLOW_"))}
    code = (
        "import jax; from benchmarks.compilers import compile, mesh;"
        "x = jax.ShapeDtypeStruct((4, 4), 'float32');"
        f"print(compile(lambda x: 2 * x, x, on=mesh({on!r}, data=4)).bytes(), jax.default_backend())"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["128.0", "cpu"], done.stderr


# What others make of it.


@pytest.mark.parametrize("on", [target("tpu-v5e"), target("gpu-h200")])
def test_flax_forward_is_three_passes(on):
    linen = pytest.importorskip("flax.linen", reason="flax is not installed")
    norm = linen.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((256, 56, 56, 256), jnp.bfloat16)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)

    def forward(variables, x):
        y, state = norm.apply(variables, x, mutable=["batch_stats"])
        return relu(y), state

    program = compile(forward, variables, x, on=on)
    assert program.passes(x) == pytest.approx(3, abs=0.02)
    assert np.isclose(program.peak, 2 * x.size * 2, rtol=0.01)
