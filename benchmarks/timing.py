"""Times that can be compared: contenders take turns in one process, and ratios are those of neighbours in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Call = Callable[[], Any]
WARM = 3
"""Rounds that are not counted: they fill caches and page memory in."""


def interleaved(contenders: Mapping[str, Call], repeats: int) -> dict[str, np.ndarray]:
    """Return the seconds of every round, in which each contender has its turn; who begins changes every round."""
    names, seconds = list(contenders), {name: np.zeros(WARM + repeats) for name in contenders}
    for turn in range(WARM + repeats):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            began = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            seconds[name][turn] = time.perf_counter() - began
    return {name: values[WARM:] for name, values in seconds.items()}


def quartiles(values: np.ndarray) -> list[float]:
    """Return the quartiles, the median in the middle, in four digits."""
    return [float(f"{value:.4g}") for value in np.percentile(values, [25, 50, 75])]


def copying(x: jax.ShapeDtypeStruct) -> Call:
    """Return what reads an array of this kind once and writes one, as fast as the device can."""
    array = jnp.ones(x.shape, x.dtype)
    copy = jax.jit(jnp.negative).lower(array).compile()  # XLA would leave out what changes nothing
    return lambda: copy(array)
