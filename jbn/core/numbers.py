"""Numbers that are known when tracing, checked by their value, of whatever type they are: epsilon and momentum."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jbn.core.checks import FLOATS, check_count
from jbn.core.lax import lax

Momentum: TypeAlias = ArrayLike | Callable[[Array], ArrayLike]
"""A weight of the old value, 0 to 1, or a function of the number of updates done that returns it."""

# By how much the result of such a function may miss the range: schedules round.
_ROUNDING = 1e-6


def read_number(value: Any) -> float | None:
    """Return a real number that is known when tracing, of Python, NumPy or JAX; None for anything else."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        real = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)) and hasattr(value, "__float__")
        real = real and not jnp.issubdtype(dtype, np.timedelta64)  # an integer to NumPy
    if not real or np.shape(value) != () or isinstance(value, jax.core.Tracer):
        return None
    try:
        return float(value)
    except OverflowError:  # Python lets integers grow without end.
        return math.inf if value > 0 else -math.inf


def read_epsilon(epsilon: object, dtype: DTypeLike = np.float32, *, by_batch: bool = False) -> float:
    """Return epsilon as a number; refuse one that the arithmetic in ``dtype`` does not bear.

    The variance of a batch may be 0, and its derivative divides by (σ² + ε)^1.5. Running variances are not, so that
    epsilon may be 0 where these normalize.
    """
    known, largest = read_number(epsilon), float(jnp.finfo(dtype).max)
    if known is None:
        raise TypeError(f"epsilon is {epsilon!r}; expected a Python number, known when tracing.")
    least = largest ** (-2 / 3) if by_batch else 0.0
    if not least <= known <= largest:
        why = (
            f"{least:.2g} or more in {jnp.dtype(dtype).name}, up to {largest:.1g}, for the variance of a batch may be 0"
            if by_batch
            else f"0 or more, up to {largest:.1g}"
        )
        raise ValueError(f"epsilon is {epsilon}; expected {why}: for instance 1e-5.")
    return known


def is_schedule(momentum: object) -> bool:
    """Say whether a momentum is a function of the number of updates."""
    return callable(momentum) and not hasattr(momentum, "dtype")


def check_momentum(momentum: object) -> None:
    """Refuse what is no momentum; a function is not called before there is a count."""
    if not is_schedule(momentum):
        read_momentum(momentum)  # type: ignore[arg-type]


def read_momentum(momentum: Momentum, count: Array | None = None) -> ArrayLike:
    """Return 1 - momentum, the weight of the new value; refuse a momentum outside [0, 1] where it is known.

    The count is checked here, where it counts: a state that is an average of others has none, and evaluates.
    """
    check_count(count)
    if is_schedule(momentum):
        return _read_schedule(momentum, count)  # type: ignore[arg-type]
    known = read_number(momentum)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(
            f"momentum is {momentum}; expected 0 to 1, the weight of the old value (PyTorch's is one minus it)."
        )
    if known is not None:
        return 1.0 - known
    if not isinstance(momentum, jax.Array | np.ndarray):
        torch = "; PyTorch's None, the average over all batches, is jbn.cumulative" if momentum is None else ""
        raise TypeError(
            f"momentum is {momentum!r}; expected a number from 0 to 1, the weight of the old value, or a function of "
            f"the number of updates done{torch}."
        )
    if momentum.shape != () or not isinstance(momentum, jax.core.Tracer) or momentum.dtype.name not in FLOATS:
        raise ValueError(
            f"momentum has shape {momentum.shape} and dtype {momentum.dtype.name}; expected one floating-point number "
            "from 0 to 1."
        )
    return lax.sub(lax.full((), 1, momentum.dtype), momentum)


def _read_schedule(momentum: Callable[[Array], ArrayLike], count: Array | None) -> Array:
    """Return 1 - momentum(count)."""
    if count is None:
        raise ValueError(
            f"momentum is the function {momentum!r} of the number of updates done, and the state has no count of them; "
            "expected one: bn_init(..., counted=True). Modules have it where they are initialized with that momentum, "
            "and jbn.nnx.replace(model, momentum=...) adds it."
        )
    try:
        found = momentum(count)
    except Exception as error:
        error.add_note("This came up while momentum was called with the number of updates done, an int32 scalar.")
        raise
    known = read_number(found)
    if known is not None and not -_ROUNDING <= known <= 1 + _ROUNDING:
        done = read_number(count)
        at = "" if done is None else f" for a count of {done:.0f}"
        raise ValueError(f"momentum returns {known:g}{at}; expected 0 to 1, the weight of the old value.")
    dtype = getattr(found, "dtype", None)
    real = dtype is not None and (jnp.issubdtype(dtype, jnp.integer) or dtype.name in FLOATS)
    if known is None and not (real and np.shape(found) == ()):
        what = repr(found) if dtype is None else f"an array of shape {np.shape(found)} and dtype {dtype.name}"
        raise TypeError(f"momentum returns {what}; expected one real number from 0 to 1, the weight of the old value.")
    value = jnp.asarray(found)
    wide = value if value.dtype.name in FLOATS else value.astype(float)
    return lax.sub(lax.full((), 1, wide.dtype), wide)
