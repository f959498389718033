"""What is told of times: quartiles, beside a copy; they are taken by `jbn.studies.timing`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jbn.studies.timing import Call


def quartiles(values: np.ndarray) -> list[float]:
    """Return the quartiles, the median in the middle, in four digits."""
    return [float(f"{value:.4g}") for value in np.percentile(values, [25, 50, 75])]


def copying(x: jax.ShapeDtypeStruct) -> Call:
    """Return what reads an array of this kind once and writes one, as fast as the device can."""
    array = jnp.ones(x.shape, x.dtype)
    copy = jax.jit(jnp.negative).lower(array).compile()  # XLA would leave out what changes nothing
    return lambda: copy(array)
