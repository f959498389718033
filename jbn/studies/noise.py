"""Batch norm with noise after it (Santurkar et al. 2018, section 2.1 and appendix A).

``Noisy`` is a norm with ``add_noise`` after it.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array

from jbn.studies.networks import Activation, BatchNorm, keep

__all__ = [
    "Noisy",
    "add_noise",
]

# Bounds of the mean and of the scale that a unit draws at a step, and how far its rows lie from these.
CENTRE, SCALE, SPREAD = 0.5, 1.25, 0.1


@dataclass(frozen=True)
class Noisy:
    """Batch norm, and noise after it that is drawn anew at each step, so that the next layer's inputs shift for sure.

    Attributes:
        norm: the batch norm; what it has for an activation is not used.
        activation: what follows the noise.
    """

    norm: BatchNorm
    activation: Activation = jax.nn.relu

    def init(self, features: int, rng: np.random.Generator) -> tuple[Any, Any]:
        """Return the parameters of batch norm, and its state with a key."""
        params, state = self.norm.init(features, rng)
        return params, (state, rng.integers(2**32, size=2, dtype=np.uint32))

    def __call__(self, params: Any, state: Any, x: Array, train: bool, step: Array) -> tuple[Array, Any]:
        """Return y and the new state; there is noise in training alone."""
        of_norm, key = state
        y, of_norm = replace(self.norm, activation=keep)(params, of_norm, x, train, step)
        if train:
            y = add_noise(y, jax.random.fold_in(jax.random.wrap_key_data(key), step))
        return self.activation(y), (of_norm, key)


def add_noise(y: Array, key: Array) -> Array:
    """Return y (n, features) with noise: a unit draws its mean and its scale, and each row draws around these."""
    rows, features = y.shape
    # One draw for all of them: programs that draw once compile in half the time. -1 itself would be an infinite normal.
    drawn = jax.random.uniform(key, (2 + 2 * rows, features), minval=np.nextafter(np.float32(-1), np.float32(0)))
    centre, scale = CENTRE * drawn[:1], 1 + (SCALE - 1) * (1 + drawn[1:2]) / 2
    shifts, normal = SPREAD * drawn[2 : 2 + rows], 2**0.5 * jax.scipy.special.erfinv(drawn[2 + rows :])
    return y * (scale + SPREAD * normal) + centre + shifts


def __dir__() -> list[str]:
    return __all__
