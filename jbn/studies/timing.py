"""Times that can be compared: contenders take turns in one process, and ratios are those of neighbours in time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
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
