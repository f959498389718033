"""Named axes: which are bound, how many shards they have, sums over them.

JAX moved these spellings between 0.8 and 0.12, so they stand in this file and nowhere else.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

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


class Sync(NamedTuple):
    """The shards that share statistics: those along ``names``, or the groups of them that ``groups`` lists."""

    names: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """Return the number of shards that share statistics."""
        if not self.names:
            return 1
        return int(lax.psum(1, self.names, axis_index_groups=self.groups))

    def total(self, *parts: Array) -> tuple[Array, ...]:
        """Sum every part over the shards, all of them in one collective."""
        if not self.names:
            return parts
        flat = jnp.concatenate([part.ravel() for part in parts])
        flat = lax.psum(flat, self.names, axis_index_groups=self.groups)
        pieces = jnp.split(flat, np.cumsum([part.size for part in parts])[:-1])
        return tuple(piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def common(self, value: Array) -> Array:
        """Return one value for all shards, their mean, where it is known to differ between them."""
        names = tuple(name for name in self.names if name in _varying(value))
        return lax.pmean(value, names, axis_index_groups=self.groups) if names else value


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
    if not names:
        raise ValueError(f"axis_name is {axis_name!r}; expected one name or several, or None for no axis.")
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
    groups = None if axis_index_groups is None else tuple(tuple(map(int, group)) for group in axis_index_groups)
    return Sync(names, groups)


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
    missing = frozenset[Hashable]().union(*map(_varying, others)) - _varying(value)
    if not missing:
        return value
    names = tuple(sorted(missing, key=str))
    if hasattr(lax, "pcast"):  # jax >= 0.8.2
        return lax.pcast(value, names, to="varying")
    return lax.pvary(value, names)  # type: ignore[attr-defined]


def place_as(value: Array, like: Array) -> Array:
    """Give ``value`` the sharding in the type of ``like``, on a mesh whose axes are Explicit."""
    wanted, found = (jax.typeof(a).sharding for a in (like, value))
    return value if wanted.spec == found.spec else jax.sharding.reshard(value, NamedSharding(found.mesh, wanted.spec))
