"""The prototype of a product that takes a norm in and gives sums out: exact, and worth what PERFORMANCE.md says."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import readme
from benchmarks.compilers import missing
from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments import chain, exactness
from benchmarks.experiments.kernel import Tile, choose_tile, normalized_matmul, sweeps
from tests.support import oracle

both_compilers = pytest.mark.parametrize("on", ["tpu", "gpu"])


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def run(case, dtype, on):
    given = exactness.draw(case, dtype)
    return given, jax.jit(partial(normalized_matmul, on=on, tile=case.tile, interpret=True))(*given)


@both_compilers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", exactness.CASES, ids=lambda case: f"{case.rows}x{case.before}x{case.after}")
def test_the_kernel_is_exact(case, dtype, on):
    (x, norm, weights, pilot), (y, first, second) = run(case, dtype, on)
    pilots, offset, multiplier, bias = map(oracle.wide, norm)
    z = oracle.forward(
        x, multiplier, bias, epsilon=0.0, activation=jax.nn.relu, stats=(pilots + offset, np.ones_like(offset))
    ).y
    want = z @ oracle.wide(weights)
    assert y.dtype == dtype
    assert np.abs(oracle.wide(y) - want).max() <= oracle.tolerance(dtype, case.before, np.abs(want).max())
    # The sums are those of y as it was rounded.
    c = oracle.wide(y) - oracle.wide(pilot)
    for sums, terms in ((first, c), (second, c * c)):
        error = np.abs(oracle.wide(sums) - terms.sum(0)).max() / case.rows
        assert error <= oracle.tolerance("float32", case.rows, np.abs(terms).max())
    d = first / case.rows
    m = pilot + d, second / case.rows - d * d
    after = (y.astype(jnp.float32) - m[0]) * jax.lax.rsqrt(m[1] + 1e-5)
    right = oracle.forward(y).y
    assert np.abs(oracle.wide(after) - right).max() <= oracle.tolerance("float32", case.rows, np.abs(right).max())


@both_compilers
def test_rows_that_are_no_numbers_stay_where_they_are(on):
    case = exactness.Case(40, 32, 32, Tile(32, 32, 32))
    x, norm, weights, pilot = exactness.draw(case, "float32")
    bad = x.at[0].set(jnp.nan)
    y, first, _ = normalized_matmul(bad, norm, weights, pilot, on=on, tile=case.tile, interpret=True)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()
    assert np.isnan(first).all()  # as the sums of the package: a state that would take them keeps what it has


@both_compilers
@pytest.mark.parametrize("mean", [0.0, 100.0], ids=["near", "far"])
def test_a_chain_is_that_of_the_package(on, mean):
    blocks = chain.blocks((32, 64, 32), jax.random.key(0))
    x = mean + jax.random.normal(jax.random.key(1), (300, 32))
    # A bias of 100 takes the mean of y far from 0, the running mean: the guard has to sweep again.
    blocks = [block._replace(params=block.params._replace(bias=block.params.bias + mean)) for block in blocks]
    y, states = jax.jit(partial(chain.fused, on=on, interpret=True))(blocks, x)
    want = oracle.wide(x)
    for block, state in zip(blocks, states, strict=True):
        answer = oracle.forward(want, block.params.scale, block.params.bias, activation=jax.nn.relu)
        bound = oracle.tolerance("float32", 300, np.abs(want).max())
        np.testing.assert_allclose(state.mean, 0.01 * answer.mean, rtol=0, atol=bound)
        np.testing.assert_allclose(state.var, 0.99 + 0.01 * answer.var, rtol=0, atol=bound * np.abs(want).max())
        want = answer.y @ oracle.wide(block.weights)
    # The second norm multiplies what the first has rounded by no more than 1/σ, which is below 1 here.
    np.testing.assert_allclose(y, want, rtol=0, atol=4 * oracle.tolerance("float32", 300, np.abs(want).max()))


def test_columns_in_several_tiles_read_x_again():
    x = jax.ShapeDtypeStruct((1024, 128), jnp.bfloat16)
    assert [sweeps(choose_tile("gpu", x, out), out) for out in (64, 256, 512)] == [1, 1, 2]
    assert [sweeps(choose_tile("tpu", x, out), out) for out in (64, 512, 2048)] == [1, 1, 1]


def test_what_the_tile_does_not_divide_is_refused_on_gpus():
    x, norm, weights, pilot = exactness.draw(exactness.Case(16, 32, 24, Tile(16, 8, 16)), "float32")
    with pytest.raises(ValueError, match=r"weights has shape \(32, 24\), not multiples of the tile's 32 × 16"):
        normalized_matmul(x, norm, weights, pilot, on="gpu", interpret=True)


# If one of these fails in a newer compiler, the verdict in PERFORMANCE.md is due again.
@pytest.mark.compilers
@pytest.mark.parametrize(
    ("on", "plain", "kernel"),
    [
        pytest.param(on, *bounds, marks=pytest.mark.skipif(missing(on) is not None, reason=str(missing(on))))
        for on, bounds in {"gpu-h200": ((19.5, 20.5), (9.0, 9.5)), "tpu-v5e": ((9.0, 9.1), (9.0, 9.1))}.items()
    ],
)
def test_the_kernel_spares_passes_on_gpus_alone(on, plain, kernel):
    row = experiments.count("56×56, 256", on)
    assert row["floor"] == 9
    for (low, high), found in ((plain, row["plain"]), (kernel, row["kernel"])):
        assert low <= found <= high, row


def test_the_page_has_what_was_counted():
    found = json.loads(experiments.RESULTS.read_text(encoding="utf-8"))
    assert readme.between("experiments") == experiments.markdown(found)
