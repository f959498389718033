"""Named axes: which are bound, how many shards they have, sums over them.

JAX moved these spellings between 0.8 and 0.12, so they stand in this file and nowhere else.
"""

import math
import operator
from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

if jax.__version_info__ < (0, 8):
    raise ImportError(
        f"jbn needs jax 0.8 or newer; this is jax {jax.__version__}. Upgrade it with jaxlib, and with libtpu or the "
        "CUDA plugin: pip install -U jax."
    )

Tree = TypeVar("Tree")


class Sync(NamedTuple):
    """The shards that share statistics: those along ``names``, or the groups of them that ``groups`` lists.

    With groups, totals are tables, a row for each group, and every shard has all of them: ``lax.psum`` over groups is
    not there under ``jax.vmap`` and in a ``jax.shard_map`` that checks, and what all shards know they can agree on.
    """

    names: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    def in_groups_of(self, number: int) -> "Sync":
        """Let so many shards at a time, in the order of their indices, share statistics."""
        all_of_them = int(self.shards())
        if number == all_of_them:
            return self
        return self._replace(groups=tuple(tuple(range(i, i + number)) for i in range(0, all_of_them, number)))

    def shards(self) -> int | np.ndarray[Any, Any]:
        """Return the number of shards that share statistics; with groups, (groups,)."""
        if self.groups is not None:
            return np.array([len(group) for group in self.groups])
        return int(lax.psum(1, self.names)) if self.names else 1

    def total(self, *parts: Array) -> tuple[Array, ...]:
        """Sum every part over the shards, all of them in one collective."""
        if not self.names:
            return parts
        flat = jnp.concatenate([part.ravel() for part in parts])
        if self.groups is not None:  # chosen, not multiplied by 0 and 1: NaN stays in its row
            flat = jnp.where(jnp.arange(len(self.groups))[:, None] == self._row(), flat[None], 0)
        # What does not vary over an axis counts once for each shard: jax >= 0.10 wants to be told.
        marked = [name for name in self.names if name in _varying(lax.axis_index(name))]
        flat = lax.psum(_vary_over(flat, marked), self.names)
        pieces = jnp.split(flat, np.cumsum([part.size for part in parts])[:-1], axis=-1)
        return tuple(piece.reshape(*flat.shape[:-1], *part.shape) for piece, part in zip(pieces, parts, strict=True))

    def mine(self, table: Tree) -> Tree:
        """Pick the row of this shard's group in every array of ``table``; without groups, all there is."""
        if self.groups is None:
            return table
        return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, self._row(), keepdims=False), table)

    def _row(self) -> Array:
        group_of = {shard: row for row, group in enumerate(self.groups or ()) for shard in group}
        return jnp.asarray([group_of[shard] for shard in sorted(group_of)])[lax.axis_index(self.names)]

    def common(self, value: Array) -> Array:
        """Return one value for all shards, their mean, where it is known to differ between them."""
        names = tuple(name for name in self.names if name in _varying(value))
        return lax.pmean(value, names) if names else value


def sync_over(
    axis_name: Hashable | Sequence[Hashable] | None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Sync:
    """Read ``axis_name`` (one name or several) and its groups; an unbound name is a ``ValueError``."""
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError("axis_index_groups needs axis_name, the axis whose indices are grouped; it is None.")
        return Sync()
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axis_name is {axis_name!r}; expected one name or several different ones, or None.")
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            bound = bound_names()
            known = f"the names bound here are {', '.join(map(repr, bound))}" if bound else "no name is bound here"
            raise ValueError(
                f"axis_name {name!r} is not bound: {known}. Names are bound by jax.shard_map, jax.pmap and "
                "jax.vmap(..., axis_name=...); under jax.jit alone a sharded batch is already one batch, so leave "
                "axis_name out."
            ) from None
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mapped = [name for name in names if name not in manual]
    if mapped and any(name in _varying(lax.axis_index(name)) for name in manual):
        raise ValueError(
            f"axis_name {mapped[0]!r} is an axis of jax.vmap, and in a jax.shard_map that checks JAX has no "
            "collectives over such an axis. Pass check_vma=False to jax.shard_map, or make it an axis of rows of x."
        )
    sync = Sync(names)
    return sync if axis_index_groups is None else sync._replace(groups=_groups_of(axis_index_groups, sync))


def _groups_of(groups: Sequence[Sequence[int]], sync: Sync) -> tuple[tuple[int, ...], ...]:
    try:
        read = tuple(tuple(operator.index(shard) for shard in group) for group in groups)
    except TypeError:
        raise TypeError(f"axis_index_groups is {groups!r}; expected lists of integers, one for each group.") from None
    if sorted(shard for group in read for shard in group) != list(range(int(sync.shards()))) or not all(read):
        raise ValueError(
            f"axis_index_groups is {[list(group) for group in read]}; expected every index from 0 to "
            f"{int(sync.shards()) - 1} of axis {', '.join(map(repr, sync.names))} in exactly one group, none empty."
        )
    return read


def known_mesh() -> AbstractContextManager[Any]:
    """Say to JAX which mesh is in use, if any: where it was not said, its caches of traced programs do not match."""
    return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())


def check_replicas(sync: Sync, x: Array, mask: Array | None, mean: Array) -> None:
    """Refuse to give each shard a state of its own where all of them share the old one and JAX tells them apart."""
    from_batch = _varying(x) | (frozenset() if mask is None else _varying(mask))
    loose = sorted(from_batch - _varying(mean) - frozenset(sync.names), key=str)
    if loose:
        named, together = (names[0] if len(names) == 1 else tuple(names) for names in (loose, [*sync.names, *loose]))
        raise ValueError(
            f"x varies over the mesh axis {named!r}, the state does not, and axis_name lacks it: the new state would "
            f"differ between shards. Pass axis_name={together!r} for one batch over all shards; or give each shard a "
            f"state of its own: jax.lax.pcast(state, {named!r}, to='varying')."
        )


def bound_names() -> tuple[Hashable, ...]:
    """Return the axis names that are bound here, as far as this version of JAX tells."""
    try:
        from jax._src.core import get_axis_env

        return tuple(get_axis_env().axis_sizes)
    except (ImportError, AttributeError):  # a private place: an error message is not worth a failure
        return ()


def _varying(value: Array) -> frozenset[Hashable]:
    kind = jax.typeof(value)
    manual = getattr(kind, "manual_axis_type", None)  # jax >= 0.10
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def vary_as(value: Array, *others: Array) -> Array:
    """Mark ``value`` as varying over every manual mesh axis over which one of ``others`` varies."""
    return _vary_over(value, frozenset[Hashable]().union(*map(_varying, others)))


def _vary_over(value: Array, names: Collection[Hashable]) -> Array:
    missing = frozenset(names) - _varying(value)
    if not missing:
        return value
    ordered = tuple(sorted(missing, key=str))
    if hasattr(lax, "pcast"):  # jax >= 0.8.2
        return lax.pcast(value, ordered, to="varying")
    return lax.pvary(value, ordered)  # type: ignore[attr-defined]


def place_as(value: Array, like: Array) -> Array:
    """Give ``value`` the sharding in the type of ``like``, on a mesh whose axes are Explicit."""
    wanted, found = (jax.typeof(a).sharding for a in (like, value))
    return value if wanted.spec == found.spec else jax.sharding.reshard(value, NamedSharding(found.mesh, wanted.spec))


def cuts_of(value: Array, axis: int) -> int:
    """Return into how many parts the type of ``value`` cuts an axis: more than one on an Explicit mesh alone."""
    sharding = jax.typeof(value).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names or []))
