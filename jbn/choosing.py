"""What to normalize by in training, instead of the batch alone: Batch Renormalization, and mixtures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jbn.arguments import read_real, refuse
from jbn.core.choice import Correction, NormalizeBy
from jbn.core.lax import lax
from jbn.core.numbers import read_number
from jbn.core.statistics import Moments


def renorm(r_max: ArrayLike, d_max: ArrayLike) -> NormalizeBy:
    r"""Return what ``normalize_by`` takes for Batch Renormalization: the batch's statistics, tied to the running ones.

    .. math::
        \hat x = \frac{x - \mu_B}{\sigma_B} r + d, \quad
        r = \mathrm{clip}\left(\frac{\sigma_B}{\sigma}, \frac{1}{r_{max}}, r_{max}\right), \quad
        d = \mathrm{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    with :math:`\sigma_B = \sqrt{\sigma_B^2 + \epsilon}` and :math:`\sigma = \sqrt{\sigma^2 + \epsilon}` of the state as
    it was before the batch. r and d are constants to the derivative. Where neither is clipped, training computes what
    evaluation does; small batches and batches of dependent examples then cost less.

    Args:
        r_max: the largest r, a scalar ≥ 1; at 1, with d_max 0, this is batch normalization.
        d_max: the largest \|d\|, a scalar ≥ 0. Both may be traced, as those of ``renorm_schedule`` are.

    Returns:
        A function for ``bn_forward(..., normalize_by=)`` and the modules.

    Raises:
        ValueError: for limits that are known and smaller.

    >>> import jax, jbn
    >>> params, state = jbn.bn_init(3)
    >>> x = jax.random.normal(jax.random.key(0), (4, 3))
    >>> y, new = jbn.bn_forward(params, state, x, True, normalize_by=jbn.renorm(3.0, 5.0))
    >>> evaluated, _ = jbn.bn_forward(params, state, x, False)
    >>> bool(abs(y - evaluated).max() < 1e-5)  # nothing is clipped here
    True

    Source: S. Ioffe, "Batch Renormalization", 2017, algorithm 1. Elsewhere: Keras averages standard deviations in a
    second pair of running statistics for r and d, and has no schedule; the layer that CrossQ and others copy adds ε
    outside of the root, and has a gradient of NaN where a feature is constant.
    """
    return _Renorm(_read_limit("r_max", r_max, 1), _read_limit("d_max", d_max, 0))


@dataclass(frozen=True, eq=False)
class _Renorm:
    """The function; two of the same known limits are equal, so that what was compiled for one serves the other."""

    r_max: ArrayLike
    d_max: ArrayLike

    def __call__(self, batch: Moments, running: Moments, epsilon: float) -> Correction:
        inverse = lax.rsqrt(running.var + epsilon)
        r = lax.sqrt(batch.var + epsilon) * inverse
        # The running mean is the pilot of the batch, so that their difference loses no digits.
        d = ((batch.pilot - running.pilot) + (batch.offset - running.offset)) * inverse
        # A state that is no number ties nothing: it becomes that of this batch.
        known = lax.is_finite(r) & lax.is_finite(d)
        r, d = lax.select(known, r, lax.full_like(r, 1)), lax.select(known, d, lax.full_like(d, 0))
        limit = jnp.asarray(self.d_max, d.dtype)
        return lax.stop_gradient(Correction(jnp.clip(r, 1 / self.r_max, self.r_max), jnp.clip(d, -limit, limit)))

    def _identity(self) -> object:
        limits = (self.r_max, self.d_max)
        return limits if all(isinstance(limit, float) for limit in limits) else id(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Renorm) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def _read_limit(name: str, value: ArrayLike, least: float) -> ArrayLike:
    """Return a limit as a number where it is known, and refuse one that is too small."""
    known = read_number(value)
    if known is None and isinstance(value, Array) and value.shape == ():
        return value
    if known is None or not known >= least:
        raise ValueError(f"{name} is {value!r}; expected a scalar of {least} or more.")
    return known


def renorm_schedule(
    step: ArrayLike, *, steps: int = 40_000, r_max: float = 3.0, d_max: float = 5.0
) -> tuple[Array, Array]:
    r"""Return r_max and d_max of ``renorm`` at a step: batch normalization at first, then more and more freedom.

    For the first eighth of ``steps`` they are 1 and 0; then r_max grows linearly until ``steps``, and d_max until five
    eighths of it. With what is not given this is the published schedule: 5000, 40000 and 25000 steps.

    Args:
        step: the number of steps done, a scalar ≥ 0, usually traced.
        steps: the step from which on both are at their ends; for a short run about half of its steps.
        r_max: the r_max at the end.
        d_max: the d_max at the end.

    Returns:
        r_max and d_max, float32 scalars.

    >>> import jbn
    >>> [round(float(v), 2) for v in jbn.renorm_schedule(5_000)], [float(v) for v in jbn.renorm_schedule(40_000)]
    ([1.0, 0.0], [3.0, 5.0])

    Source: Ioffe 2017, section 4.1.
    """
    if read_number(steps) is None or not steps > 0:
        raise refuse("steps", steps, "a number above 0, the step from which on both are at their ends")
    r_end, d_end = map(jnp.asarray, (_read_limit("r_max", r_max, 1), _read_limit("d_max", d_max, 0)))
    done = read_real("step", step).astype(jnp.float32) / steps - 1 / 8
    return 1 + (r_end - 1) * jnp.clip(done * (8 / 7), 0, 1), d_end * jnp.clip(done * 2, 0, 1)


def mix(a: Moments, b: Moments, weight: ArrayLike) -> Moments:
    r"""Return the moments on the way from a to b.

    .. math:: \mu = \mu_a + w (\mu_b - \mu_a), \qquad \sigma^2 = \sigma_a^2 + w (\sigma_b^2 - \sigma_a^2)

    In ``normalize_by`` this is, with w the weight of the batch, adaptation at test time with a prior of N images
    (w = n/(N + n)), α-BN, and, differentiated through the batch, an average over the last batches. Moments of a mixture
    of both distributions, whose variance the distance of the means adds to, are ``merge``'s, with weights as counts.

    Args:
        a: moments.
        b: moments, with features of the same shape.
        weight: w, the weight of b, a scalar from 0 to 1 or (features,).

    Returns:
        Moments with the count of b, differentiable in all.

    >>> import jax.numpy as jnp, jbn
    >>> a, b = jbn.moments(jnp.array([[0.0], [2.0]])), jbn.moments(jnp.array([[4.0], [4.0]]))
    >>> jbn.mix(a, b, 0.25).mean.item(), jbn.mix(a, b, 0.25).var.item()
    (1.75, 0.75)

    Source: S. Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", 2020,
    eq. 3.
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Moments):
            raise refuse(name, value, "Moments, as jbn.moments(x) returns them")
    weight = read_real("weight", weight)
    delta = (a.pilot - b.pilot) + (a.offset - b.offset)
    return replace(b, offset=b.offset + (1 - weight) * delta, var=a.var + weight * (b.var - a.var))
