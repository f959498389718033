"""Functions for ``momentum``: how much of the old statistics is kept, by how often they have moved before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jbn.arguments import read_real
from jbn.core.numbers import read_number


def cumulative(count: ArrayLike) -> Array:
    r"""Return the momentum of which the running statistics are the plain average over all batches.

    .. math:: \text{momentum}(n) = \frac{n}{n + 1}

    It is passed as it is, ``momentum=jbn.cumulative``, and is what ``momentum=None`` is in PyTorch: each batch weighs
    the same, whatever its size. ``jbn.recalibrate`` weighs each row the same, and adds how far the batches lie apart.

    Args:
        count: n, the number of updates done, an integer scalar ≥ 0.

    Returns:
        A scalar from 0, at the first update, to 1; in float32 it is 1 from 2²⁴ updates on, and the average stays.

    >>> import jax, jax.numpy as jnp, jbn
    >>> batches, state = jnp.array([[1.0, 3.0], [5.0, 9.0]])[..., None], jbn.bn_init(1, counted=True)[1]
    >>> for x in batches:
    ...     _, state = jbn.bn_forward(None, state, x, True, momentum=jbn.cumulative)
    >>> state.mean.item(), state.var.item(), state.count.item()
    (4.5, 2.5, 2)

    Source: PyTorch, ``torch.nn.BatchNorm2d``.
    """
    n = read_real("count", count).astype(float)
    return n / (n + 1)


def debiased(momentum: float) -> Callable[[ArrayLike], Array]:
    r"""Return the function for ``momentum`` of which the running statistics are right from the first update on.

    .. math:: \text{momentum}(n) = 1 - \frac{1 - m}{1 - m^{n+1}} = m\,\frac{1 - m^n}{1 - m^{n+1}}

    The state is then the exponential average of the batches divided by the sum of its weights, :math:`1 - m^n`: nothing
    of the mean 0 and the variance 1, with which it starts, is ever in it. After many updates it is the average of the
    number m. Haiku and Adam keep the biased average and divide where it is read; here nothing else is kept.

    Args:
        momentum: m, a number from 0 to less than 1. At 1 it would be ``jbn.cumulative``.

    Returns:
        A function of the number of updates done; two of the same m are equal.

    Raises:
        ValueError: for an m out of range.

    >>> import jax.numpy as jnp, jbn
    >>> x, state = jnp.array([[1.0], [3.0]]), jbn.bn_init(1, counted=True)[1]
    >>> _, state = jbn.bn_forward(None, state, x, True, momentum=jbn.debiased(0.99))
    >>> state.mean.item(), state.var.item()
    (2.0, 1.0)

    Source: D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, section 3.
    """
    known = read_number(momentum)
    if known is None or not 0 <= known < 1:
        raise ValueError(
            f"momentum is {momentum!r}; expected a number from 0 to less than 1, the weight of the old value."
        )
    return Debiased(known)


@dataclass(frozen=True)
class Debiased:
    """The function; two of the same momentum are equal, so that what was compiled for one serves the other."""

    momentum: float

    def __call__(self, count: ArrayLike) -> Array:
        """Return the weight of the old value after so many updates."""
        n = jnp.asarray(count, float)
        # 1 - mⁿ would have no digits where m is near 1. An m of 0 keeps nothing, which the first factor says.
        log = math.log(self.momentum) if self.momentum else -1.0
        return self.momentum * jnp.expm1(n * log) / jnp.expm1((n + 1) * log)
