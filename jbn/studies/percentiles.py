"""What the activations of a layer are given, as percentiles over rows, and how far they move in training."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbn.studies.networks import Dense, keep
from jbn.studies.training import Look, Parts

PERCENTILES = (15, 50, 85)  # as in figure 1 of Ioffe and Szegedy 2015
ROWS = 500  # of the rows for validation: a look that sorts more of them takes longer than the steps between two looks


def inputs_of_last(network: Dense, params: Any, states: Any, x: Array) -> Array:
    """Return what the activations of the last hidden layer are given (n, units), normalized by the statistics of x."""
    norms: list[Any] = [network.norm] * len(states)
    norms[-1] = replace(norms[-1], activation=keep)
    for norm, kernel, of_norm, state in zip(norms, params["kernels"], params["norms"], states, strict=False):
        x, _ = norm(of_norm, state, x @ kernel, True, jnp.int32(0))
    return x


def percentiles(network: Dense) -> Look:
    """Return a look at percentiles (3, units) of what the last activations are given for rows of validation."""

    def look(params: Any, states: Any, data: Parts) -> Array:
        inputs = jnp.sort(inputs_of_last(network, params, states, data.validation.x[:ROWS]), 0)
        return inputs[np.array(PERCENTILES) * len(inputs) // 100]

    return look


def travel(seen: np.ndarray) -> np.ndarray:
    """Return how far the percentiles of a unit move in all, in units of their distance.

    Args:
        seen: percentiles (..., looks, 3, units).

    Returns:
        (...,): the way of the three from look to look, their mean, over the mean distance of the outer two; the median
        of the units.
    """
    ways = np.abs(np.diff(np.asarray(seen, np.float64), axis=-3)).mean(-2).sum(-2)
    distances = np.subtract(seen[..., 2, :], seen[..., 0, :], dtype=np.float64).mean(-2)
    with np.errstate(divide="ignore", invalid="ignore"):  # a unit that is given one value alone
        return np.asarray(np.median(ways / distances, -1))
