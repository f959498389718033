"""The oracle: batch normalization in float64 NumPy, and the tolerance that a dtype and a size allow."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

ACTIVATIONS = {
    None: (lambda z: z, np.ones_like),
    jax.nn.relu: (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    jax.nn.silu: (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
}


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def tolerance(dtype: Any, rows: int = 1, scale: float = 1.0) -> float:
    """Bound the error of values of size ``scale`` in ``dtype`` that were summed over ``rows``.

    Eight roundings of the dtype, and a random walk of half an ulp a term in the dtype of the sums.
    """
    name = np.dtype(dtype).name
    wide = ULP["float64"] if name == "float64" else ULP["float32"]
    return scale * (8 * ULP[name] + 16 * wide + wide * math.sqrt(rows))


class Answer(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray


def wide(value: Any) -> np.ndarray | None:
    return None if value is None else np.asarray(value).astype(np.float64)


def moments(x, *, axis=-1, mask=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return count, mean and var of the valid rows in float64, each of the shape of the features."""
    x = wide(x)
    axes = sorted(i % x.ndim for i in np.atleast_1d(axis))
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask), x.shape)
    rows = tuple(i for i in range(x.ndim) if i not in axes)
    x = np.where(valid, x, 0)
    count = valid.sum(rows)
    n = np.maximum(count, 1)
    mean = x.sum(rows) / n
    var = (np.where(valid, x - np.expand_dims(mean, rows), 0) ** 2).sum(rows) / n
    return count, mean, var


def forward(
    x, scale=None, bias=None, *, axis=-1, epsilon=1e-5, mask=None, activation=None, residual=None, stats=None
) -> Answer:
    """Normalize x by its own moments, or by ``stats`` = (mean, var)."""
    count, mean, var = moments(x, axis=axis, mask=mask)
    if stats is not None:
        mean, var = map(wide, stats)
    x, z, _, _, valid = _affine(x, scale, bias, axis, epsilon, mask, residual, mean, var)
    return Answer(np.where(valid, ACTIVATIONS[activation][0](z), 0), mean, var, count)


def _affine(x, scale, bias, axis, epsilon, mask, residual, mean, var):
    x = wide(x)
    axes = sorted(i % x.ndim for i in np.atleast_1d(axis))
    rows = tuple(i for i in range(x.ndim) if i not in axes)
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask), x.shape)

    def spread(v):
        return v if v.ndim == x.ndim else np.expand_dims(v, rows)

    c = np.where(valid, x - spread(mean), 0)
    a = spread(np.ones_like(var) if scale is None else wide(scale)) / spread(np.sqrt(var + epsilon))
    z = c * a
    z = z if bias is None else z + spread(wide(bias))
    z = z if residual is None else z + np.where(valid, wide(residual), 0)
    return c, z, a, spread, valid


def gradients(
    g, x, scale=None, bias=None, *, axis=-1, epsilon=1e-5, mask=None, activation=None, residual=None, stats=None
) -> dict[str, np.ndarray]:
    """Return the gradients of Σ g·y by the closed form of Ioffe and Szegedy 2015, section 3.

    Scale and bias are per feature, or of the rank of x.
    """
    count, mean, var = moments(x, axis=axis, mask=mask)
    if stats is not None:
        mean, var = map(wide, stats)
    c, z, a, spread, valid = _affine(x, scale, bias, axis, epsilon, mask, residual, mean, var)
    rows = tuple(
        i for i, n in enumerate(spread(mean).shape) if n == 1 and i not in {j % c.ndim for j in np.atleast_1d(axis)}
    )
    dz = np.where(valid, wide(g) * ACTIVATIONS[activation][1](z), 0)
    r = spread(1 / np.sqrt(var + epsilon))
    dx = a * dz
    if stats is None:
        n = spread(np.maximum(count, 1))
        of_mean, of_var = (spread((dx * v).sum(rows)) / n for v in (1, c))
        dx = np.where(valid, dx - of_mean - c * r * r * of_var, 0)

    def total(v, like):
        if like is None or np.ndim(like) < v.ndim:
            return v.sum(rows)
        return v.sum(tuple(i for i, n in enumerate(np.shape(like)) if n == 1), keepdims=True)

    return {"x": dx, "scale": total(r * dz * c, scale), "bias": total(dz, bias), "residual": dz}


def relative_l2(got: Any, want: np.ndarray) -> float:
    """Return ‖got - want‖ / ‖want‖."""
    return float(np.linalg.norm(wide(got) - want) / np.linalg.norm(want))
