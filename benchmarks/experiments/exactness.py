"""How exact the kernel is against float64, in interpret mode, beside jbn and XLA on the device at hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jbn
from benchmarks.experiments.kernel import Affine, Tile, normalized_matmul


class Case(NamedTuple):
    """A product of (rows, before) with (before, after), and a tile; rows need not be a multiple of its rows."""

    rows: int
    before: int
    after: int
    tile: Tile


CASES = (
    Case(1000, 64, 128, Tile(128, 128, 64)),
    Case(1000, 128, 64, Tile(256, 32, 32)),
    Case(77, 64, 192, Tile(32, 64, 64)),
)
WAYS = ("tpu", "gpu", "plain")
FIGURES = ("y", "mean", "variance", "next norm")
HEAD = ("", "y / max", "mean / σ", "variance, relative", "output of the next norm")


def draw(case: Case, dtype: str) -> tuple[Array, Affine, Array, Array]:
    """Return x, the norm before the product, the weights, and a pilot that is a few percent of σ off the mean of y."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = (3 + 2 * jax.random.normal(keys[0], (case.rows, case.before))).astype(dtype)
    offset, bias = (0.1 * jax.random.normal(key, (case.before,)) for key in keys[1:3])
    norm = Affine(jnp.full(case.before, 3.0), offset, jax.random.uniform(keys[3], (case.before,)), bias)
    weights = jax.random.normal(keys[4], (case.before, case.after)) / case.before**0.5 + 0.1
    weights = weights.astype(dtype)
    mean = jnp.asarray(exact(x, norm, weights).mean(0), jnp.float32)
    return x, norm, weights, mean + 0.05 * jax.random.normal(keys[5], mean.shape)


def wide(value: Any) -> np.ndarray:
    """Return a value in float64."""
    return np.asarray(value).astype(np.float64)


def exact(x: Array, norm: Affine, weights: Array) -> np.ndarray:
    """Return the product in float64."""
    pilot, offset, multiplier, bias = map(wide, norm)
    return np.maximum((wide(x) - pilot - offset) * multiplier + bias, 0) @ wide(weights)


def compute(case: Case, way: str, x: Array, norm: Affine, weights: Array, pilot: Array) -> tuple[Array, Array, Array]:
    """Return y, its mean and its variance, by the kernel for a compiler, or by XLA and `jbn.moments`."""
    if way == "plain":
        z = (((x.astype(jnp.float32) - norm.pilot) - norm.offset) * norm.multiplier + norm.bias).clip(0)
        y = lax.dot(z.astype(x.dtype), weights)
        m = jbn.moments(y, pilot=pilot)
        return y, m.mean, m.var
    y, first, second = normalized_matmul(x, norm, weights, pilot, on=way, tile=case.tile, interpret=True)
    offset = first / case.rows
    return y, pilot + offset, second / case.rows - offset * offset


def errors(case: Case, dtype: str, way: str) -> dict[str, float]:
    """Return the largest error of y, of its statistics, and of what the next norm makes of it, each against float64.

    Statistics and the next norm are held against those of y as it came, rounded: that is what they describe.
    """
    given = draw(case, dtype)
    y, mean, var = jax.jit(lambda *given: compute(case, way, *given))(*given)
    z = (y.astype(jnp.float32) - mean) * lax.rsqrt(var + 1e-5)
    want, came = exact(*given[:3]), wide(y)
    found = {
        "y": (came - want) / np.abs(want).max(),
        "mean": (wide(mean) - came.mean(0)) / came.std(0),
        "variance": wide(var) / came.var(0) - 1,
        "next norm": wide(z) - (came - came.mean(0)) / np.sqrt(came.var(0) + 1e-5),
    }
    return {name: float(np.abs(value).max()) for name, value in found.items()}


def measure(dtype: str) -> dict[str, Any]:
    """Return the largest errors over the cases, of each way."""
    found = {way: [errors(case, dtype, way) for case in CASES] for way in WAYS}
    worst = {way: {name: max(e[name] for e in these) for name in FIGURES} for way, these in found.items()}
    return {"dtype": dtype, "errors": worst}
