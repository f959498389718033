"""``replace``: a context in which the norms of any Linen model compute with jbn."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jbn.core.numbers import is_schedule
from jbn.linen.contexts import Scope
from jbn.linen.module import BatchNorm
from jbn.linen.norms import Norms
from jbn.linen.statistics import holds_statistics
from jbn.norms import Classes
from jbn.paths import join
from jbn.replacing import Found, check_overrides

OPTIONS = (
    "momentum", "epsilon", "dtype", "axis_name", "axis_index_groups", "activation", "group_size", "unbiased",
    "normalize_by", "sow_moments",
)  # fmt: skip

_SCOPE = Scope[tuple[tuple[str, Hashable], ...]]("replace")


class StandIn(BatchNorm):
    """A layer in the scope of the one that was called, which reports to ``capture_intermediates`` itself."""

    @nn.nowrap
    def sow(self, col: str, name: str, *args: Any, **kwargs: Any) -> bool:
        """Leave what ``capture_intermediates`` stores to the layer that was called."""
        return name != "__call__" and super().sow(col, name, *args, **kwargs)


StandIn.__name__ = BatchNorm.__name__  # for contexts within this one, such as record, which tell classes by name


@contextmanager
def replace(*, also: Classes = (), **overrides: Any) -> Iterator[Found]:
    """Let every ``flax.linen.BatchNorm`` of any model compute with jbn inside a ``with`` block.

    The model and its variables stay what they are: names, shapes, dtypes, initial values, checkpoints. What differs in
    the figures is what differs between the layers, see docs/guides/flax_step.md. A function that is compiled already is
    compiled once more inside, and is what it was before after the block: ``jax.jit`` knows of this context. Only what
    was compiled ahead of time, or exported, keeps the arithmetic with which it was traced.

    Args:
        also: classes of norms that compute what Flax's does, such as a copy of its code: fields of Flax's names, a call
            like Flax's, the same variables. Their variables are made by their own code.
        overrides: fields to set on each layer, jbn's own included: ``momentum``, ``epsilon``, ``dtype``, ``axis_name``,
            ``axis_index_groups``, ``activation``, ``group_size``, ``unbiased``, ``normalize_by``, ``sow_moments``. The
            others keep their values. With a function as ``momentum`` variables that are made inside the block have a
            ``count``.

    Yields:
        ``Found(paths, skipped)``, which fills up as layers are traced or called: those that compute with jbn, and
        those that keep their own code: whatever else holds a ``mean`` and a ``var`` in ``batch_stats``.

    Raises:
        TypeError: for overrides of other names, and for classes of ``also`` whose fields or call are not Flax's.
        ValueError: for layers of ``also`` whose variables are not those of Flax's.
        RuntimeError: see ``jbn.linen.freeze``.

    Warns:
        UserWarning: at the end, where no layer was met.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jbn.linen
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(False), nn.relu]), jnp.ones((8, 3))
    >>> with jbn.linen.replace(momentum=0.9) as replaced:
    ...     variables = model.init(jax.random.key(0), x)
    ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
    >>> replaced
    Found(paths=('layers_1',), skipped=())
    """
    check_overrides(overrides, OPTIONS)
    norms = Norms.read(also)
    inside = False

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal inside
        layer = context.module
        if inside:
            return call(*args, **kwargs)
        kind = norms.find_class(layer) if context.method_name == "__call__" else None
        if kind is not None:
            found.meet(join(layer.path), True)
        if kind is None or (kind is BatchNorm and not overrides):
            y = call(*args, **kwargs)
            if holds_statistics(layer) and join(layer.path) not in found.paths:
                found.meet(join(layer.path), False)
            return y
        if kind in norms.also and layer.is_initializing():
            y = call(*args, **kwargs)  # its own code makes its variables
            norms.read_fields(layer)
            if is_schedule(overrides.get("momentum")):
                layer.scope.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
            return y
        fields = norms.read_fields(layer) | overrides | {"parent": layer.scope}
        inside = True
        try:  # a call like any other, which freeze, contexts within this one and other interceptors see
            return StandIn(**fields)(*args, **kwargs)
        finally:
            inside = False

    rule = (("also", norms.also), *((name, _key(value)) for name, value in sorted(overrides.items())))
    with _SCOPE.enter(rule) as found, nn.intercept_methods(intercept):
        yield found
    if not found.paths and (found.skipped or not _SCOPE.has_met(rule)):
        names = ", ".join(found.skipped)
        others = f" Norms of other classes, which keep their own code, are {names}; see also." if found.skipped else ""
        acts = "It acts on what is called inside the block."
        warnings.warn(f"replace() met no flax.linen.BatchNorm.{others} {acts}", stacklevel=3)


@dataclass(frozen=True)
class _Same:
    """What stands for a value that is equal to itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(value: Any) -> Hashable:
    """Return what stands for a value in the key of a cache; a text would not do, for it leaves out numbers."""
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        return value.shape, value.dtype, np.asarray(value).tobytes()
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value  # type: ignore[no-any-return]
