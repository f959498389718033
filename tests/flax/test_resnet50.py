"""A ResNet-50 written with plain Flax: its 53 norms replaced, in Linen and in NNX; its errors are those of rounding."""

from contextlib import nullcontext
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.nnx")  # without the warnings that Flax 0.12.0 gives while it is imported

from flax import nnx

import jbn.linen
import jbn.nnx
from benchmarks.resnet50 import NORMS, NNXResNet50, ResNet50, Sizes
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("smooth")
# Compiled without optimization, in a quarter of the time.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
DTYPES = {"float32": jnp.float32, "float64": jnp.float64}


def numbers(name, shape, dtype, rng):
    """Return what a trained network might hold: no scale is 0, and no mean."""
    noise = rng.standard_normal(shape)
    sizes = {"scale": 1 + 0.1 * noise, "var": 1 + 0.5 * np.tanh(noise), "bias": 0.1 * noise, "mean": 0.1 * noise}
    kernel = noise * np.sqrt(2 / max(1, np.prod(shape[:-1])))
    return rounded(sizes.get(name, kernel), dtype)


def rounded(values, dtype):
    """Return values that are the same in every dtype."""
    return jnp.asarray(values.astype(np.float32), dtype)


def filled(tree, dtype):
    """Return a tree of shapes with numbers, the same for every dtype."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = (str(getattr(keys[-1], "key", "")) for keys, _ in leaves)
    return structure.unflatten(
        numbers(name, leaf.shape, dtype, rng) for name, (_, leaf) in zip(names, leaves, strict=True)
    )


def images(dtype):
    return rounded(np.random.default_rng(1).standard_normal((16, 32, 32, 3)), dtype)


def linen(dtype):
    """Flax with accurate variances, all of it in one dtype."""
    norm = partial(nn.BatchNorm, use_fast_variance=False, force_float32_reductions=False)
    return ResNet50(Sizes(width=8, classes=10, dtype=dtype, param_dtype=dtype), norm)


def shapes(model, dtype):
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), images(dtype))


def everything(model, variables, x):
    """Return logits in training and in evaluation, gradients and new statistics."""

    def loss(params, x):
        y, new = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return (y**2).mean(), (y, new["batch_stats"])

    grads, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return {"training": y, "gradients": grads, "statistics": stats, "evaluation": model.apply(variables, x, False)}


def everything_nnx(model, x):
    def loss(model, x):
        y = model(x)
        return (y**2).mean(), y

    model.eval()
    evaluated = model(x)
    model.train()
    grads, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return {"training": y, "gradients": grads, "statistics": nnx.state(model, nnx.BatchStat), "evaluation": evaluated}


def in_numpy(tree):
    return {name: [np.asarray(leaf) for leaf in jax.tree.leaves(part)] for name, part in tree.items()}


@cache
def by_linen(name, ours):
    """Run the network of one dtype in Linen."""
    model, dtype = linen(DTYPES[name]), DTYPES[name]
    variables = filled(shapes(model, dtype), dtype)
    with jbn.linen.replace() if ours else nullcontext():
        run = jax.jit(partial(everything, model), compiler_options=COMPILER)
        return in_numpy(run(variables, images(dtype)))


@cache
def by_nnx(name, ours):
    """Run the network of one dtype in NNX."""
    dtype = DTYPES[name]
    sizes = Sizes(width=8, classes=10, dtype=dtype, param_dtype=dtype)
    model = nnx.eval_shape(
        lambda: NNXResNet50(sizes, partial(nnx.BatchNorm, use_fast_variance=False), rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    rng = np.random.default_rng(0)
    model = nnx.merge(
        graph, nnx.from_flat_state([(p, v.replace(numbers(p[-1], v.shape, dtype, rng))) for p, v in flat])
    )
    if ours:
        jbn.nnx.replace(model)
    graph, state = nnx.split(model)

    @partial(jax.jit, compiler_options=COMPILER)
    def run(state, x):
        return everything_nnx(nnx.merge(graph, state), x)

    return in_numpy(run(state, images(dtype)))


def distance(got, want, part):
    """Return ‖got - want‖ / ‖want‖ over all arrays of a part."""
    flat = [np.concatenate([oracle.wide(leaf).ravel() for leaf in run[part]]) for run in (got, want)]
    return oracle.relative_l2(*flat)


PARTS = pytest.mark.parametrize("part", ["training", "gradients", "statistics", "evaluation"])


@PARTS
def test_in_float32_the_error_is_no_larger_than_flax_s(x64, part):
    exact = by_linen("float64", False)
    error, flax_s = (distance(by_linen("float32", ours), exact, part) for ours in (True, False))
    print(part, error, flax_s)
    assert error <= 2 * flax_s


@PARTS
@pytest.mark.parametrize("run", [by_linen, by_nnx], ids=["linen", "nnx"])
def test_in_float64_it_is_flax_to_rounding(x64, run, part):
    # What the network makes of roundings is measured in float32: Flax's distance from float64 there, in ulps.
    ulps = distance(by_linen("float32", False), by_linen("float64", False), part) / oracle.ULP["float32"]
    got, want = run("float64", True), run("float64", False)
    assert {leaf.dtype for leaf in got[part]} == {np.dtype(np.float64)}
    print(part, run.__name__, distance(got, want, part), 2 * ulps * oracle.ULP["float64"])
    assert distance(got, want, part) <= 2 * ulps * oracle.ULP["float64"]


def test_linen_s_norms_are_found_and_the_variables_stay():
    model = linen(jnp.float32)
    before = shapes(model, jnp.float32)
    with jbn.linen.replace() as replaced:
        after = shapes(model, jnp.float32)
    assert before == after
    assert len(replaced.paths) == len(set(replaced.paths)) == NORMS
    assert replaced.skipped == ()
    stats = jax.tree.leaves_with_path(before["batch_stats"])
    assert {jax.tree_util.keystr(keys[:-1], simple=True, separator="/") for keys, _ in stats} == set(replaced.paths)


def test_nnx_s_norms_are_found_and_the_variables_stay():
    model = nnx.eval_shape(lambda: NNXResNet50(Sizes(width=8), rngs=nnx.Rngs(0)))
    before = nnx.state(model)
    _, replaced = jbn.nnx.replace(model)
    assert nnx.state(model) == before
    assert len(replaced.paths) == len(set(replaced.paths)) == NORMS
    assert replaced.skipped == ()


def test_it_is_the_resnet_50_that_is_known():
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: ResNet50().init(jax.random.key(0), x, True), x)
    model = nnx.eval_shape(lambda: NNXResNet50(rngs=nnx.Rngs(0)))
    for params in (variables["params"], nnx.state(model, nnx.Param)):
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032
