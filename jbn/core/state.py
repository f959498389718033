"""How the state moves: running statistics, and the moments that ``recalibrate`` gathers."""

from collections.abc import Mapping, MutableMapping
from copy import copy
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn.core.statistics import Moments, merge, quotient

StateT = TypeVar("StateT")


def exponential(mean: Array, var: Array, batch: Moments, weight: Array, unbiased: bool) -> tuple[Array, Array]:
    r"""Move running statistics towards those of a batch, by the weight of the new value, 1 - momentum.

    .. math:: \mu \leftarrow \mu + w (\mu_B - \mu), \quad \sigma^2 \leftarrow \sigma^2 + w (\sigma_B^2 - \sigma^2)

    A channel keeps its statistics where those of the batch are not finite or come from fewer than two rows.

    Args:
        mean: running mean, (features,), in the dtype of the arithmetic.
        var: running variance, (features,).
        batch: the moments of the batch.
        weight: the weight w of the new value, a scalar from 0 to 1.
        unbiased: whether the running variance is that of a sample, n/(n - 1) times the biased one.

    Returns:
        The new mean and variance, without gradients.
    """
    mean, var, batch = jax.tree.map(lax.stop_gradient, (mean, var, batch))
    target = batch.var
    if unbiased:
        target = target * quotient(batch.count, batch.count - 1)
    # m·old + (1 - m)·new loses ten times more digits at a large mean; and where the pilot is the old mean, the
    # difference is the offset, exact.
    new_mean = mean + weight * ((batch.pilot - mean) + batch.offset)
    new_var = var + weight * (target - var)
    usable = (batch.count > 1) & lax.is_finite(batch.offset) & lax.is_finite(batch.var)
    return lax.select(usable, new_mean, mean), lax.select(usable, new_var, var)


# The state that ``recalibrate`` passes has two more axes at the end, and holds the moments of the rows that its layer
# has seen, which may be called more than once, beside the statistics:
#
#     mean[..., 0, :] = mean, pilot, offset             var[..., 0, :] = var, variance of the rows, count
#
# A count of inf says that there were none yet. The size of the last axis is the order: whether a layer normalizes as it
# would, or by the statistics of the state; the fourth number is not used. A shape travels through every transformation
# and is part of every cache key, so that nothing compiled before can answer a question that it was not asked.
ORDERS = {"batch": 3, "recalibrated": 4}


def asked(mean: Array, features: tuple[int, ...]) -> str | None:
    """Return the order of ``recalibrate``, or None where the state is an ordinary one."""
    return {(*features, 1, size): order for order, size in ORDERS.items()}.get(tuple(mean.shape))


def ordered(mean: Array, var: Array, order: str) -> tuple[Array, Array]:
    """Make room in a state for the moments of an order."""
    room = ORDERS[order] - 1
    mean, var = (jnp.stack([v, *[jnp.full_like(v, jnp.inf)] * room], -1)[..., None, :] for v in (mean, var))
    return mean, var


def opened(mean: Array, var: Array) -> tuple[Array, Array]:
    """Return the statistics in the state of an order."""
    return mean[..., 0, 0], var[..., 0, 0]


def gathered(mean: Array, var: Array, batch: Moments) -> tuple[Array, Array]:
    """Merge the moments of a batch into the state of an order."""
    (known, pilot, offset), (old, spread, count) = ([half[..., 0, i] for i in range(3)] for half in (mean, var))
    none = jnp.isinf(count)
    before = Moments(*(jnp.where(none, 0, value) for value in (count, pilot, offset, spread)))
    batch = Moments(*(value.astype(mean.dtype) for value in batch))
    both = merge(before, batch._replace(count=jnp.broadcast_to(batch.count, batch.var.shape)))
    unused = [known] * (mean.shape[-1] - 3)
    new = [known, both.pilot, both.offset, *unused], [old, both.var, both.count, *unused]
    new_mean, new_var = (jnp.stack(half, -1)[..., None, :] for half in new)
    return new_mean, new_var


def replaced(state: StateT, **fields: Array) -> StateT:
    """Return a state of the same type with new arrays."""
    if isinstance(state, MutableMapping):
        new = copy(state)
        new.update(fields)
        return new
    if isinstance(state, Mapping):
        return type(state)({**state, **fields})  # type: ignore[call-arg]
    return state._replace(**fields)  # type: ignore[attr-defined, no-any-return]
