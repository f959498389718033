"""What a layer learns and remembers, how the state moves, and what a tool sees that observes a layer through it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import register_namedtuple_serialization
from jax.numpy import broadcast_to
from jax.tree_util import register_dataclass

from jbn.core.axes import place_as, varying_axes
from jbn.core.lax import lax
from jbn.core.statistics import Moments, merge
from jbn.core.sums import divide

StateT = TypeVar("StateT")
Upstream: TypeAlias = Literal["batch", "recalibrated"]
"""What layers normalize by while a model is observed; ``jbn.recalibrate`` says what each means."""


class Params(NamedTuple):
    """What a layer learns, per feature; either may be absent: ``Params(scale, bias)``.

    Attributes:
        scale: γ, (features,) or of the rank of x, one for each example or position; floating point. None for 1.
        bias: β, likewise. None for 0.
    """

    scale: Array | None
    bias: Array | None


class State(NamedTuple):
    """What a layer remembers, per feature: ``State(mean, var)``.

    Attributes:
        mean: running mean, (features,), float32 or float64, in the unit of x.
        var: running variance, (features,), of the same dtype, ≥ 0, in the unit of x squared; biased unless trained with
            ``unbiased=True``.
    """

    mean: Array
    var: Array


class CountedState(NamedTuple):
    """A state that counts how often it moved, for a momentum that depends on it: ``CountedState(mean, var, count)``.

    Attributes:
        mean: running mean, (features,), float32 or float64, in the unit of x.
        var: running variance, (features,), of the same dtype, ≥ 0, in the unit of x squared; biased unless trained with
            ``unbiased=True``.
        count: the number of updates done, an int32 scalar ≥ 0.
    """

    mean: Array
    var: Array
    count: Array  # type: ignore[assignment]  # it hides a method of tuples


# An exported program that takes or returns them is read by whoever has imported jbn, under these names.
register_namedtuple_serialization(Params, serialized_name="jbn.Params")
register_namedtuple_serialization(State, serialized_name="jbn.State")
register_namedtuple_serialization(CountedState, serialized_name="jbn.CountedState")


def move(mean: Array, var: Array, batch: Moments, weight: Array, unbiased: bool) -> tuple[Array, Array, Array]:
    r"""Move running statistics towards those of a batch, by the weight of the new value, 1 - momentum.

    .. math:: \mu \leftarrow \mu + w (\mu_B - \mu), \quad \sigma^2 \leftarrow \sigma^2 + w (\sigma_B^2 - \sigma^2)

    A channel keeps its statistics where those of the batch are not finite or come from fewer than two rows; and where
    the running ones are not numbers that can be used, it takes those of the batch.

    Args:
        mean: running mean, (features,), float32 or float64.
        var: running variance, (features,).
        batch: the moments of the batch.
        weight: the weight w of the new value, a scalar from 0 to 1.
        unbiased: whether the running variance is that of a sample, n/(n - 1) times the biased one.

    Returns:
        The new mean and variance, in their dtypes, without gradients; and which features moved, bool.
    """
    mean, var, batch, weight = jax.tree.map(lax.stop_gradient, (mean, var, batch, weight))
    wide, target = batch.var.dtype, batch.var
    old_mean, old_var = mean.astype(wide), var.astype(wide)
    if unbiased:
        target = target * divide(batch.count, batch.count - 1)

    # m·old + (1 - m)·new loses ten times more digits at a large mean; and where the pilot is the old mean, the
    # difference is the offset, exact. The way starts at the nearer end: a huge old value that hardly counts would leave
    # its rounding to the new one, up to a variance of 0.
    def go(old: Array, new: Array, difference: Array) -> Array:
        return lax.select(weight > 0.5, new - (1 - weight) * difference, old + weight * difference)

    new_mean = go(old_mean, batch.mean, (batch.pilot - old_mean) + batch.offset)
    new_var = go(old_var, target, target - old_var)
    known = lax.is_finite(old_mean) & lax.is_finite(old_var) & (old_var >= 0)
    new_mean = lax.select(known, new_mean, batch.mean).astype(mean.dtype)
    new_var = lax.select(known, new_var, target).astype(var.dtype)
    # Judged after the cast: what fits into the dtype of the arithmetic need not fit into that of the state.
    usable = (batch.count > 1) & lax.is_finite(new_mean) & lax.is_finite(new_var)
    return lax.select(usable, new_mean, mean), lax.select(usable, new_var, var), usable


@partial(
    register_dataclass,
    data_fields=["mean", "count", "pilot", "offset", "var", "rest", "updates"],
    meta_fields=["upstream"],
)
@dataclass(frozen=True)
class Observation:
    """What a tool puts in the place of a running mean, to learn what the layer sees in a run.

    It is a node of the tree of states, so it travels through every transformation like the array that it stands for.
    Its type and ``upstream`` are part of the structure of that tree, so that JAX compiles anew where they differ:
    otherwise a function compiled for an ordinary state would be used again, and observe nothing. All its arrays have
    the shape and the sharding of that array, because what shards or stacks states does it by the shape that it knows.

    A layer may be called more than once in a run, so the moments of its rows are merged.

    Attributes:
        mean: the running mean, (features,), that of ``State``.
        count: the number of rows seen, (features,), like the four that follow; as in ``Moments``.
        pilot: a number near the mean of these rows.
        offset: what is missing to their mean.
        var: their biased variance.
        rest: the number of rows - count.
        updates: how often the layer has taken statistics, int32.
        upstream: what the layer normalizes by: "batch", whatever its call asks for, or "recalibrated", the running
            statistics.
    """

    mean: Array
    count: Array
    pilot: Array
    offset: Array
    var: Array
    rest: Array
    updates: Array
    upstream: Upstream = field(default="batch", kw_only=True)

    def add(self, batch: Moments) -> Observation:
        """Return the observation with the rows of a batch."""
        shape, dtype = self.mean.shape, self.mean.dtype
        new = jax.tree.map(lambda value: place_as(broadcast_to(value, shape).astype(dtype), self.mean), batch)
        both = merge(Moments(self.count, self.pilot, self.offset, self.var, self.rest), new)
        found = {name: getattr(both, name) for name in ("count", "pilot", "offset", "var", "rest")}
        return replace(self, **found, updates=self.updates + 1)

    # A user's code may read the shape or the dtype of a running mean; an observation answers as the array would.

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mean."""
        return self.mean.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the mean."""
        return self.mean.dtype

    @property
    def ndim(self) -> int:
        """The rank of the mean."""
        return self.mean.ndim

    def __getitem__(self, key: object) -> Observation:
        """Return the whole of it, which is all that ``variable[...]`` of NNX asks for."""
        if key is not Ellipsis:
            raise TypeError(f"a running mean that is observed has no parts: got [{key!r}], expected [...].")
        return self


def advance(
    held: Array | Observation, var: Array, count: Array | None, batch: Moments, weight: Array, unbiased: bool
) -> dict[str, Any]:
    """Return the arrays of the new state: those that moved, or the observation with the rows of the batch."""
    if isinstance(held, Observation):
        return {"mean": held.add(batch)}
    seen = jax.tree.map(lambda value: place_as(value, held) if value.ndim else value, batch)
    mean, new_var, moved = move(held, place_as(var, held), seen, weight, unbiased)
    new = {"mean": mean, "var": place_as(new_var, var)}
    return new if count is None else new | {"count": _count_on(count, moved)}


def _count_on(count: Array, moved: Array) -> Array:
    """Return the number of updates with one in which these features moved, if any did; it ends at its largest."""
    one = place_as(moved.any(), count).astype(count.dtype)
    # Shards of features have one count: one of them may have had nothing to move by.
    over = varying_axes(one) - varying_axes(count)
    one = lax.pmax(one, tuple(sorted(over, key=str))) if over else one
    return count + lax.select(count == jnp.iinfo(count.dtype).max, lax.full_like(one, 0), one)


def replace_arrays(state: StateT, **fields: Any) -> StateT:
    """Return a state of the same type with new arrays."""
    if isinstance(state, MutableMapping):
        new = copy(state)
        new.update(fields)
        return new
    if isinstance(state, Mapping):
        return type(state)({**state, **fields})  # type: ignore[call-arg]
    return state._replace(**fields)  # type: ignore[attr-defined, no-any-return]
