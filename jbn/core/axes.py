"""Named axes: which are bound, how many shards they have, sums over them.

JAX moved these spellings between 0.8 and 0.12, so they stand in this file and nowhere else.
"""

import math
from collections.abc import Collection, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.numpy import arange, asarray, broadcast_to, concatenate, split, where
from jax.sharding import NamedSharding, PartitionSpec

from jbn.core.lax import lax

if jax.__version_info__ < (0, 8):
    raise ImportError(
        f"jbn needs jax 0.8 or newer; this is jax {jax.__version__}. Upgrade it with jaxlib, and with libtpu or the "
        "CUDA plugin: pip install -U jax."
    )

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Sync:
    """The shards that share statistics: those along ``names``, or the groups of them that ``groups`` lists.

    With groups, sums carry a leading axis, one row for each group, and every shard holds all rows. The reason is that
    ``lax.psum(axis_index_groups=...)`` is not available under ``jax.vmap`` or in a ``jax.shard_map`` that checks, and
    that a full table lets all shards agree on the state.
    """

    names: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    def divide(self, size: int) -> "Sync":
        """Let ``size`` shards at a time, in the order of their indices, share statistics."""
        number = int(self.shards())
        if size == number:
            return self
        return replace(self, groups=tuple(tuple(range(i, i + size)) for i in range(0, number, size)))

    def shards(self) -> int | np.ndarray[Any, Any]:
        """Return the number of shards that share statistics; with groups, (groups,)."""
        if self.groups is not None:
            return np.array([len(group) for group in self.groups])
        return int(lax.psum(1, self.names)) if self.names else 1

    def total(self, *parts: Array) -> tuple[Array, ...]:
        """Sum every part over the shards, all of them in one collective."""
        if not self.names:
            return parts
        flat = concatenate([part.ravel() for part in parts])
        if self.groups is not None:
            # Chosen, not multiplied by 0 and 1, so that NaN stays in the row of its group.
            flat = where(arange(len(self.groups))[:, None] == self._row(), flat[None], 0)
        # A value that is the same on all shards must be added once for each. From jax 0.10 on ``psum`` does so only for
        # values whose type says that they vary, so that it is marked first, over the axes that have such types.
        marked = [name for name in self.names if name in varying_axes(lax.axis_index(name))]
        flat = lax.psum(_vary_over(flat, marked), self.names)
        pieces = split(flat, np.cumsum([part.size for part in parts])[:-1], axis=-1)
        return tuple(piece.reshape(*flat.shape[:-1], *part.shape) for piece, part in zip(pieces, parts, strict=True))

    def pick(self, table: Tree) -> Tree:
        """Return the row of this shard's group in every array of ``table``; without groups, all there is."""
        if self.groups is None:
            return table
        return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, self._row(), keepdims=False), table)

    def _row(self) -> Array:
        group_of = {shard: row for row, group in enumerate(self.groups or ()) for shard in group}
        return asarray([group_of[shard] for shard in sorted(group_of)])[lax.axis_index(self.names)]

    def agree(self, value: Array) -> Array:
        """Return one value for all shards: their mean, where JAX knows that it differs between them."""
        names = tuple(name for name in self.names if name in varying_axes(value))
        return lax.pmean(value, names) if names else value


def name_mesh() -> AbstractContextManager[Any]:
    """Name the current mesh explicitly, also where it is empty.

    JAX's caches of traced programs treat "no mesh was set" and "an empty mesh was set" as different keys, and would
    trace the statistics again for the derivative.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())


def manual_axes() -> frozenset[Hashable]:
    """Return the mesh axes over which the code at hand is written for one shard, as in ``jax.shard_map``."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def bound_names() -> tuple[Hashable, ...]:
    """Return the axis names that are bound here, as far as this version of JAX tells."""
    try:
        from jax._src.core import get_axis_env

        return tuple(get_axis_env().axis_sizes)
    except (ImportError, AttributeError):  # The place is private, and an error message is not worth a failure.
        return ()


def varying_axes(value: Array) -> frozenset[Hashable]:
    """Return the manual mesh axes over which a value may differ between shards, as its type says."""
    kind = jax.typeof(value)
    manual = getattr(kind, "manual_axis_type", None)  # jax >= 0.10
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def vary_as(value: Array, *others: Array) -> Array:
    """Mark ``value`` as varying over every manual mesh axis over which one of ``others`` varies."""
    return _vary_over(value, frozenset[Hashable]().union(*map(varying_axes, others)))


def _vary_over(value: Array, names: Collection[Hashable]) -> Array:
    missing = frozenset(names) - varying_axes(value)
    if not missing:
        return value
    ordered = tuple(sorted(missing, key=str))
    if hasattr(lax, "pcast"):  # jax >= 0.8.2
        return lax.pcast(value, ordered, to="varying")
    return lax.pvary(value, ordered)  # type: ignore[attr-defined]


@jax.custom_batching.custom_vmap
def hold_for_any(condition: Array) -> Array:
    """Return a condition, and under ``jax.vmap`` one for all members: whether it holds for any."""
    return condition


@hold_for_any.def_vmap
def _over_members(_: int, mapped: list[bool], condition: Array) -> tuple[Array, bool]:
    return hold_for_any(condition.any(0) if mapped[0] else condition), False


@jax.custom_batching.custom_vmap
def leave_to_members(condition: Array, new: Array, old: Array) -> Array:
    """Return what is new, and under ``jax.vmap`` for a member whose condition does not hold what is old.

    Outside of ``jax.vmap`` both are the same then, and nothing is computed.
    """
    return new


@leave_to_members.def_vmap
def _leave_to_each(size: int, mapped: list[bool], condition: Array, *arrays: Array) -> tuple[Array, bool]:
    new, old = (
        a if is_mapped else broadcast_to(a, (size, *a.shape)) for a, is_mapped in zip(arrays, mapped[1:], strict=True)
    )
    if mapped[0]:
        condition = condition.reshape(condition.shape + (1,) * (new.ndim - condition.ndim))
        return where(condition, new, old), True
    return leave_to_members(condition, new, old), True


def forbid_transformations(value: Array, error: Exception) -> Array:
    """Return a value that raises an error where it is mapped or differentiated, here or after it was traced."""

    def fail(*_: object) -> Any:
        raise error

    @jax.custom_batching.custom_vmap
    def mapped(value: Array) -> Array:
        return value

    mapped.def_vmap(fail)
    differentiated = jax.custom_jvp(lambda value: mapped(value))
    differentiated.defjvp(fail)
    return differentiated(value)  # type: ignore[no-any-return]


def place_as(value: Array, like: Array) -> Array:
    """Give ``value`` the sharding in the type of ``like``, on a mesh whose axes are Explicit.

    An axis on which ``value`` has one number for all of ``like`` is cut by nothing.
    """
    wanted, found = (jax.typeof(a).sharding for a in (like, value))
    cuts = [name if n == m else None for name, n, m in zip(wanted.spec, value.shape, like.shape, strict=True)]
    if tuple(cuts) == tuple(found.spec):
        return value
    mesh = wanted.mesh if found.mesh.empty else found.mesh  # Constants are on no mesh in jax 0.8.0.
    return jax.sharding.reshard(value, NamedSharding(mesh, PartitionSpec(*cuts)))


def count_cuts(value: Array, axis: int) -> int:
    """Return into how many parts the type of ``value`` cuts an axis: more than one on an Explicit mesh alone."""
    sharding = jax.typeof(value).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names or []))
