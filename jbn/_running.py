"""How running statistics move."""

import jax.numpy as jnp
from jax import Array, lax

from ._moments import Moments


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
    target = batch.var
    if unbiased:
        target = target * (batch.count / jnp.maximum(batch.count - 1, 1))
    # m·old + (1 - m)·new loses ten times more digits at a large mean; and where the pilot is the old mean, the
    # difference is the offset, exact.
    new_mean = mean + weight * ((batch.pilot - mean) + batch.offset)
    new_var = var + weight * (target - var)
    usable = (batch.count > 1) & jnp.isfinite(batch.offset) & jnp.isfinite(batch.var)
    return (
        lax.stop_gradient(jnp.where(usable, new_mean, mean)),
        lax.stop_gradient(jnp.where(usable, new_var, var)),
    )
