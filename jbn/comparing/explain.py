"""What the numbers say about two arrays that differ: an activation, a border, other statistics, another order."""

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import erf, sqrt

import numpy as np

from jbn.comparing.pairs import sample
from jbn.converting.trees import Array
from jbn.paths import count_of

# What is equal to this times the allowed error is called equal: the same rounding went through one more operation.
_SLACK = 4
# Of a sample the error is that of the whole, give or take: one that is so much larger is not worth computing.
_OF_SAMPLE = 10
# Kernels reach so many lines less one beyond the border, but for large ones.
_BORDER = 4
# Images are smooth: one place beside the right one has much of its value.
_FAR = 0.05

_erf = np.vectorize(erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + _erf(x / sqrt(2))) / 2,
    "gelu (approximate)": lambda x: x * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}


def explain(a: Array, b: Array, allowed: float, given: Iterable[Array] = ()) -> str:
    """Say how two arrays of one shape differ.

    Args:
        a: float64; its features are last, or second; or a number.
        b: likewise.
        allowed: the relative error in L2 that is rounding.
        given: arrays that both may have been computed from.

    Returns:
        A clause, or nothing where the numbers show nothing simple.
    """
    allowed *= _SLACK
    a, b, *given = map(np.atleast_1d, (a, b, *given))
    with np.errstate(all="ignore"):
        for look in (_non_finite, _activation, _border, _affine, _order, _windows):
            for axis in dict.fromkeys((a.ndim - 1, min(1, a.ndim - 1))):
                if found := next(look(a, b, allowed, axis), ""):
                    return found
        return next(_two_activations(a, b, allowed, given), "")


def is_activation(a: Array, b: Array, allowed: float) -> bool:
    """Say whether one of two arrays is an activation of the other."""
    with np.errstate(all="ignore"):
        return any(_activation(a, b, _SLACK * allowed, -1))


def relative(a: Array, b: Array) -> float:
    """Return ‖a - b‖ / ‖a‖ in L2; 0 where both are zero."""
    with np.errstate(invalid="ignore"):
        norm, error = np.sqrt((a**2).sum()), np.sqrt(((a - b) ** 2).sum())
        return float(error / norm) if norm else (0.0 if not error else np.inf)


def _equal(a: Array, b: Array, allowed: float) -> bool:
    return bool(relative(a, b) <= allowed)


def _non_finite(a: Array, b: Array, allowed: float, axis: int) -> Iterator[str]:
    bad = [int((~np.isfinite(x)).sum()) for x in (a, b)]
    if any(bad):
        yield f"of {count_of(a.size, 'value')} {bad[0]} in a and {bad[1]} in b are NaN or inf"


def _activation(a: Array, b: Array, allowed: float, axis: int) -> Iterator[str]:
    for name, f in _ACTIVATIONS.items():
        for x, y, here, there in ((a, b, "a", "b"), (b, a, "b", "a")):
            if _equal(sample(x), f(sample(y)), _OF_SAMPLE * allowed) and _equal(x, f(y), allowed):
                yield f"{here} equals {name}({there}): {there} lacks an activation"


def _two_activations(a: Array, b: Array, allowed: float, given: Iterable[Array]) -> Iterator[str]:
    for x in given:
        for pool, over in _pools(x, a):
            functions = {"itself": lambda x: x, **_ACTIVATIONS} if over else _ACTIVATIONS
            found: list[list[str]] = [[], []]
            for name, f in functions.items():
                few = pool(f(x[:1]))
                close = [_equal(y[:1], few, _OF_SAMPLE * allowed) for y in (a, b)]
                z = pool(f(x)) if any(close) else few
                for names, y, is_close in zip(found, (a, b), close, strict=True):
                    names.extend([name] * (is_close and _equal(y, z, allowed)))
            if found[0] and found[1]:
                yield f"of what is the same in both, a is {over}{found[0][0]} and b {over}{found[1][0]}"


def _pools(x: Array, a: Array) -> Iterator[tuple[Callable[[Array], Array], str]]:
    """Yield what makes an array of the shape of a: nothing, or a mean over positions."""
    if x.shape == a.shape:
        yield (lambda x: x), ""
    elif a.ndim == 2 < x.ndim:
        for rows in (tuple(range(1, x.ndim - 1)), tuple(range(2, x.ndim))):
            if x.mean(rows).shape == a.shape:
                yield (lambda x, rows=rows: x.mean(rows)), "the mean over positions of "  # type: ignore[misc]


def _border(a: Array, b: Array, allowed: float, axis: int) -> Iterator[str]:
    """Look for lines at the border that alone differ: as few as can be."""
    spatial = _spatial(a, axis)
    off = (np.abs(a - b) > allowed * np.sqrt((a**2).mean())).any(tuple(i for i in range(a.ndim) if i not in spatial))
    widths = [[(low, high) for low in range(_BORDER) for high in range(_BORDER) if low + high < n] for n in off.shape]
    for border in sorted(product(*widths), key=lambda border: sum(map(sum, border))) if spatial else ():
        inside = tuple(slice(low, n - high) for (low, high), n in zip(border, off.shape, strict=True))
        if not off[inside].any():
            lines = (f"{low} + {high} along axis {i}" for i, (low, high) in zip(spatial, border, strict=True))
            yield f"equal but at the border, in so many lines from both ends: {', '.join(lines)}: other padding"
            return


def _spatial(a: Array, axis: int) -> list[int]:
    """Return the axes that are neither examples nor features."""
    return [i for i in range(1, a.ndim) if i != axis % a.ndim]


def _affine(a: Array, b: Array, allowed: float, axis: int) -> Iterator[str]:
    """Look for b = s a + t with one s and t for each channel."""
    x, y = (np.moveaxis(v, axis, -1).reshape(-1, v.shape[axis]) for v in (a, b))
    if len(x) < 4:
        return
    mean_x, mean_y = x.mean(0), y.mean(0)
    var = ((x - mean_x) ** 2).mean(0)
    s = np.where(var > 0, ((x - mean_x) * (y - mean_y)).mean(0) / np.where(var > 0, var, 1), 1.0)
    t = mean_y - s * mean_x
    if not _equal(y, s * x + t, allowed):
        return
    size = np.sqrt((x**2).mean())
    moved, scaled = bool(np.abs(t).max() > allowed * size), bool(np.abs(s - 1).max() > allowed)
    parts = [f"s is {s.min():.6g} to {s.max():.6g}"] * scaled + [f"t {t.min():.3g} to {t.max():.3g}"] * moved
    if scaled and moved:
        cause = "other statistics (running or of the batch), epsilon, scale or bias"
    else:
        cause = "another epsilon, variance or scale" if scaled else "another bias or mean"
    form = {(True, True): "s·a + t", (True, False): "s·a", (False, True): "a + t"}.get((scaled, moved), "a")
    yield f"b = {form} in each channel, {', '.join(parts)}: {cause}"


def _order(a: Array, b: Array, allowed: float, axis: int) -> Iterator[str]:
    norms = [float(np.sqrt((x**2).sum())) for x in (a, b)]
    if abs(norms[0] - norms[1]) > allowed * norms[0]:
        return  # no order brings them nearer, and to sort them takes long
    if _equal(np.sort(a, axis=axis), np.sort(b, axis=axis), allowed):
        yield "the same values in each place, in another order of the channels: flattened or split otherwise"
    elif _equal(np.sort(a, axis=None), np.sort(b, axis=None), allowed):
        yield "the same values in another order"


def _windows(a: Array, b: Array, allowed: float, axis: int) -> Iterator[str]:
    """Look for values that have little to do with each other but their statistics: the same kernel at other places."""
    spatial = _spatial(a, axis)
    rows = tuple(i for i in range(a.ndim) if i != axis % a.ndim)
    if not spatial or a.size // a.shape[axis] < 32 or a.shape[axis] < 3 or relative(a, b) < _FAR:
        return
    x, y = (np.concatenate([v.mean(rows) / np.sqrt(v.var()), np.log(v.std(rows))]) for v in (a, b))
    gap = np.sqrt(((x - y) ** 2).mean())
    # A mean over n places moves by 1/√n of a deviation from one set of places to another, a deviation by 1/√(2n).
    if gap < 2 / np.sqrt(a.size // a.shape[axis]):
        yield "other values with the same mean and deviation in each channel: windows that begin elsewhere (padding)"
