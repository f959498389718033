"""Batch statistics: ``Moments``, their ``merge``, and the moments of the rows of x, on one device and across shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim, register_pytree_node_serialization
from jax.numpy import asarray, broadcast_to, where, zeros, zeros_like
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike, DTypeLike

from jbn.core.axes import Sync, place_as, vary_as
from jbn.core.lax import lax
from jbn.core.layout import Layout
from jbn.core.saved import MOMENTS, name_arrays
from jbn.core.sums import count_rows, divide, keep_rounding, read_apart, sum_rows, sweep_again_if


@register_dataclass
@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of some rows, per feature; ``merge`` joins those of two sets of rows.

    The mean is the unevaluated sum ``pilot + offset``: ``pilot`` is a number near it and ``offset`` what is missing.
    A mean rounded to float32 would cost digits of the variance where small batches with a large mean are merged.

    The count is such a sum too, ``count + rest``: a float32 alone would count no row more from 2²⁴ on.

    Attributes:
        count: the number of rows, () or, where a mask tells features apart, (features,); float32 or float64, ≥ 0.
        pilot: a number near the mean, (features,), of the same dtype; carries no gradient.
        offset: mean - pilot, (features,), of the same dtype.
        var: the variance, divided by the number of rows, (features,), of the same dtype, ≥ 0.
        rest: the number of rows - count, of the shape and dtype of count.

    >>> import jbn
    >>> jbn.Moments.empty(3).mean.shape
    (3,)
    """

    count: Array
    pilot: Array
    offset: Array
    var: Array
    rest: Array

    def __iter__(self) -> Iterator[Array]:
        """Unpack as ``count, pilot, offset, var``."""
        return iter((self.count, self.pilot, self.offset, self.var))

    @property
    def mean(self) -> Array:
        """The mean, rounded to its dtype; shape (features,)."""
        return self.pilot + self.offset

    @classmethod
    def empty(cls, features: int | tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Moments:
        """Return the moments of no rows, the neutral element of ``merge``."""
        none, number = zeros(features, dtype), zeros((), dtype)
        return cls(number, none, none, none, number)


# An exported program that takes or returns it is read by whoever has imported jbn, under this name.
register_pytree_node_serialization(
    Moments,
    serialized_name="jbn.Moments",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
    from_children=lambda _, children: Moments(*children),
)


def merge(*moments: Moments) -> Moments:
    r"""Return the moments of the union of disjoint sets of rows: of two, and so one after the other of any number.

    .. math::
        n = n_a + n_b,\quad \delta = \mu_b - \mu_a,\quad \mu = \mu_a + \tfrac{n_b}{n}\delta,\quad
        \sigma^2 = \tfrac{n_a}{n}\sigma_a^2 + \tfrac{n_b}{n}\sigma_b^2 + \tfrac{n_a n_b}{n^2}\delta^2

    Args:
        moments: those of each set, with features of the same shape.

    Returns:
        The moments of all: commutative and associative up to rounding, with ``Moments.empty`` as neutral element.

    Raises:
        TypeError: for what is not ``Moments``.
        ValueError: for features of different shapes, for stacked moments of several layers, and for no set at all.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> whole = jbn.merge(jbn.moments(x[:1]), jbn.moments(x[1:3]), jbn.moments(x[3:]))
    >>> bool(jnp.allclose(whole.var, x.var(0)))
    True

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, eq. 2.1. Other libraries average the means of shards with equal weights.
    """
    if not moments:
        raise ValueError("merge got no moments; expected those of one set of rows or more, or Moments.empty(features).")
    for i, m in enumerate(moments):
        check_moments(f"moments[{i}]", m)
        if jnp.shape(m.var) != jnp.shape(moments[0].var):
            raise ValueError(
                f"moments[{i}] has features of shape {jnp.shape(m.var)}, moments[0] of shape "
                f"{jnp.shape(moments[0].var)}; expected the same."
            )
    return _merge(*moments)


def check_moments(name: str, value: object) -> None:
    """Refuse what is not ``Moments`` of one layer."""
    if not isinstance(value, Moments):
        several = f": several are passed one by one, merge(*{name})" if isinstance(value, list | tuple) else ""
        raise TypeError(
            f"{name} is of type {type(value).__name__}; expected Moments, as jbn.moments(x) returns them{several}."
        )
    features = jnp.shape(value.var)
    if jnp.shape(value.count) not in ((), features):
        raise ValueError(
            f"{name} has a count of shape {jnp.shape(value.count)} and features of shape {features}; expected one "
            "count, or one for each feature. Moments of several layers, stacked, are taken one by one: "
            "jax.vmap(jbn.merge), jax.vmap(jbn.update)."
        )


@jax.jit
def _merge(*moments: Moments) -> Moments:
    return reduce(_merge_two, moments)


def _merge_two(a: Moments, b: Moments) -> Moments:
    larger = a.count >= b.count
    more, less = where(larger, a.count, b.count), where(larger, b.count, a.count)
    count, lost = _add(more, less)
    # What sums have lost is kept, and becomes a part of the count once it is large enough.
    count, rest = _add(count, a.rest + b.rest + lost)
    share_a, share_b = (divide(part, count) for part in (a.count, b.count))
    # The difference of the pilots is exact where they are close, which is where it matters.
    delta = (b.pilot - a.pilot) + (b.offset - a.offset)
    return Moments(
        count,
        where(larger, a.pilot, b.pilot),
        where(larger, a.offset + share_b * delta, b.offset - share_a * delta),
        show_overflow(share_a * a.var + share_b * b.var + share_a * share_b * delta * delta),
        rest,
    )


def _add(large: Array, small: Array) -> tuple[Array, Array]:
    """Return the sum of two numbers, rounded, and what was rounded off."""
    total = keep_rounding(large + small)
    return total, small - (total - large)


# A sweep sums x - k and (x - k)² around a guess k of the mean, the pilot; d is the mean minus k. Where d is far from 0,
# the guard sweeps again, around the mean that was found.
# A pilot costs digits where d² is more than this many times σ²: the error of E[(x-k)²] - d² is a few ulps of σ² + d².
# At 2 it is at most three times that of a two-pass variance; at 4 outputs come near the bound of test_accuracy.py.
_FAR = 2.0
# A pilot that agrees with the mean to this many ulps is as good as any: the running average of a constant channel comes
# no closer at momentum 0.99, and must not be swept twice for ever.
_CLOSE = 2.0**7
# A mean of no more than this many ulps of the pilot around which it was found may be the rounding of x - k alone.
_NOTHING = 2.0**4
# The largest running mean that serves as a pilot. Beside a larger one, such as one batch of huge values leaves behind,
# x - k has few digits of x; where x is so large itself, a sweep around 0 finds its mean, and a second one the rest.
_LARGEST = 2.0**24


@dataclass(frozen=True)
class SharedRows:
    """Which rows share statistics: those of x, and those of the shards that ``sync`` names."""

    layout: Layout
    sync: Sync
    epsilon: float  # what will be added to the variance: digits far below it need no second sweep

    @property
    def sums_over(self) -> Sync:
        """The shards over which statistics are summed: none where the groups lie inside them."""
        return self.sync if self.layout.group is None else Sync()

    @property
    def groups(self) -> int | None:
        """The number of groups whose statistics this shard knows, or None."""
        if self.layout.group is not None:
            return self.layout.examples // self.layout.group
        return None if self.sync.groups is None else len(self.sync.groups)

    def count(self, mask: Array | None, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
        """Return the number of rows that share statistics; None where it is not known when tracing."""
        if mask is not None or is_symbolic_dim(self.layout.group_row_count):
            return None
        count = np.asarray(self.layout.group_row_count * self.sums_over.shards(), dtype)
        return count.reshape(count.shape + (1,) * (len(self.layout.features) if count.ndim else 0))


def choose_pilot(mean: Array, dtype: np.dtype[Any]) -> Array:
    """Return the number k, per feature, that one sweep subtracts from x: the running mean, or zero.

    Any finite vector would do, if it is the same on every shard. This one is known before x is, so that XLA can fuse
    the sums into whatever produces x, and it needs no collective of its own. Once the running mean is warm it is the
    best guess there is; until then ``statistics`` notices, and sweeps again.
    """
    mean = lax.stop_gradient(mean).astype(dtype)
    usable = lax.abs(mean) <= _LARGEST  # as NaN is not
    return lax.select(usable, mean, zeros_like(mean))


# The function is jitted only so that it is traced once, for its value and in the rules of derivatives, and inlined.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0, inline=True)
def statistics(rows: SharedRows, x: Array, mask: Array | None, pilot: Array) -> Moments:
    """Return the moments of the valid rows, found around a pilot; with groups, a table of those of all groups."""
    sync, layout = rows.sums_over, rows.layout
    pilot = sync.agree(pilot)
    if rows.groups is not None:
        pilot = broadcast_to(pilot, (rows.groups, *pilot.shape))
    known = rows.count(mask, pilot.dtype)
    count = count_rows(layout, mask, pilot.dtype) if known is None else known

    def sums(pilot: Array) -> tuple[Array, Array]:
        return _sum_around(layout, x, mask, sync.pick(pilot))

    # Groups inside a shard have no guard: under ``jax.jit`` it would ask all devices whether any group is far, and
    # they need not talk otherwise.
    return _find_moments(pilot, sums, count, sync, rows.epsilon, guarded=layout.group is None)


def merge_groups(rows: SharedRows, m: Moments, pilot: Array) -> Moments:
    """Return the moments of all groups together, found around a pilot; without groups, those given."""
    if rows.groups is None:
        return m
    m = keep_rounding(jax.tree.map(lax.stop_gradient, m))
    count = broadcast_to(m.count, m.var.shape)

    def sums(pilot: Array) -> tuple[Array, Array]:
        d = (m.pilot - pilot[None]) + m.offset
        return (count * d).sum(0), (count * (m.var + d * d)).sum(0)

    # Every shard already has the table of all groups of shards; groups inside a shard are still to be summed over them.
    sync = rows.sync if rows.sync.groups is None else Sync()
    return _find_moments(sync.agree(pilot), sums, count.sum(0), sync, rows.epsilon, guarded=True)


def _sum_around(layout: Layout, x: Array, mask: Array | None, pilot: Array) -> tuple[Array, Array]:
    """Return Σ(x-k) and Σ(x-k)² over the valid rows of this shard."""

    def centre(x: Array, pilot: Array) -> Array:
        c = x.astype(pilot.dtype) - layout.spread(pilot)
        return c if mask is None else where(mask, c, 0)

    first, second = read_apart(2, x, pilot)
    return sum_rows(layout, centre(*first)), sum_rows(layout, lax.square(centre(*second)))


def _find_moments(
    pilot: Array,
    sums: Callable[[Array], tuple[Array, Array]],
    count: Array | np.ndarray[Any, Any],
    sync: Sync,
    epsilon: float,
    *,
    guarded: bool,
) -> Moments:
    """Return the moments of what ``sums`` sums, over the shards: around the pilot and, if it was far, once more.

    Without the guard the second sweep is always taken.
    """
    total: ArrayLike = count
    if isinstance(count, Array):
        first, second, total = sync.total(*sums(pilot), count.astype(pilot.dtype))
        if sync.groups is not None:  # one for each group, or one for each of its features
            total = total.reshape(total.shape + (1,) * (pilot.ndim - total.ndim))
        total = place_as(total, first) if total.ndim else total  # a mask may lie otherwise than x
    else:
        first, second = sync.total(*sums(pilot))
    once = _moments_of_sums(total, pilot, first, second)
    shift = _find_shift(once)
    if not guarded:
        pilot = pilot + shift
        return _moments_of_sums(total, pilot, *sync.total(*sums(lax.optimization_barrier(pilot))))
    far = _is_far(once, epsilon)
    pilot = pilot + lax.select(far, shift, zeros_like(shift))
    found = sweep_again_if(far.any(), lambda pilot: sync.total(*sums(pilot)), pilot, (first, second))
    return _moments_of_sums(total, pilot, *found)


def _find_shift(m: Moments) -> Array:
    """Return what takes the pilot to the mean that a sweep has found, or to 0 where it has found nothing.

    Beside a pilot that is huge, as a running mean is after one batch of huge values, x - k has no digit of x.

    The choice has a second use. XLA:CPU, in jax 0.10.2, may compute the pilot anew at each of its uses and contract
    k + Σ·(1/n) into one operation with one rounding. Then k in x - k and k in the moments are different numbers, and dx
    is off by 1e-4 of its size at a mean of 10⁵ (``test_cpus_still_contract_the_quotient_and_the_pilot``).
    """
    moved = m.pilot + m.offset
    nothing = lax.abs(moved) <= _NOTHING * jnp.finfo(moved.dtype).eps * lax.abs(m.pilot)
    return lax.select(nothing, m.offset - moved, m.offset)  # the first is -k, in the sharding of the second


def _is_far(m: Moments, epsilon: float) -> Array:
    """Tell of which features the pilot was too far from the mean."""
    near = lax.is_finite(m.var) & (lax.square(m.offset) <= _FAR * (m.var + epsilon))
    same = lax.abs(m.offset) <= _CLOSE * jnp.finfo(m.var.dtype).eps * lax.abs(m.pilot)
    return lax.is_finite(m.offset) & ~(near | same)


def _moments_of_sums(count: ArrayLike, pilot: Array, first: Array, second: Array) -> Moments:
    share = divide(1, count)
    offset = first * share
    var = lax.max(second * share - offset * offset, lax.full_like(second, 0))
    total = asarray(count)
    return Moments(total, pilot, offset, show_overflow(var), zeros_like(total))


def show_overflow(var: Array) -> Array:
    """Return a variance with NaN in the place of what has overflowed: it is seen, where y = 0 would not be."""
    return lax.select(var == jnp.inf, lax.full_like(var, jnp.nan), var)


# The derivative of the moments, with E the average over the valid rows of all shards and c = x - μ:
#
#     μ = E[x]           dμ = E[dx]
#     σ² = E[c²]         dσ² = 2 E[c (dx - dμ)] = 2 E[c dx]      because E[c] = 0
#
# It is linear in dx, so JAX transposes it. μ = pilot + offset, and how it is split is arbitrary, so that the offset can
# carry all of dμ and the pilot none.
def differentiate_statistics(
    rows: SharedRows, x: Array, mask: Array | None, m: Moments, dx: Array
) -> tuple[Array, Array]:
    """Return dμ and dσ² for a dx in the dtype of the moments; with groups, those of all groups."""
    layout, sync = rows.layout, rows.sums_over
    mine = sync.pick(m)
    centred = (x.astype(m.var.dtype) - layout.spread(mine.pilot)) - layout.spread(mine.offset)
    if mask is not None:
        centred, dx = where(mask, centred, 0), where(mask, dx, 0)
    s1, s2 = sync.total(sum_rows(layout, dx), sum_rows(layout, centred * dx))
    known = rows.count(mask, m.var.dtype)
    share = divide(1, m.count if known is None else known)
    return s1 * share, 2 * (s2 * share)


def tangent_moments(m: Moments, dmean: Array, dvar: Array) -> Moments:
    """Return the tangent of moments: the offset has that of the mean."""
    none = zeros_like(m.count)
    return Moments(none, zeros_like(m.pilot), vary_as(dmean, m.offset), vary_as(dvar, m.var), none)


@statistics.defjvp
def _statistics_jvp(rows: SharedRows, primals: Any, tangents: Any) -> tuple[Moments, Moments]:
    x, mask, _ = primals
    m = name_arrays(MOMENTS, statistics(rows, *primals))

    # What the transpose keeps is what the checkpointed function takes: x in its own dtype, and vectors.
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(x: Array, mask: Array | None, m: Moments, dx: Array) -> tuple[Array, Array]:
        return differentiate_statistics(rows, x, mask, m, dx.astype(m.var.dtype))

    return m, tangent_moments(m, *tangent(x, mask, m, tangents[0]))
